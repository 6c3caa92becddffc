# SPDX-License-Identifier: Apache-2.0
"""What a budget saves, what it costs in quality, and what deciding costs.

Quality: a real sentence encoder, sentences that no calibration saw, three draws of
them. Speed: both sides of a row run in turns on one thread; a row shows the ratio of
the fastest repeats, above 1 where ours is faster, and in its note that of the medians.
"""

import copy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import loraven  # noqa: E402
from tools.bench import loraven_quality as quality  # noqa: E402
from torchworks_core.bench import compare, measure  # noqa: E402

QUALITY = "loraven-quality"
LEVELS = (0.3, 0.5, 0.7, 0.85, 1.0)
GOALS = {0.5: ">= .92", 0.7: ">= .975", 0.85: ">= .992"}
CALIBRATION, UNSEEN, DISTILL_SECONDS = 320, 256, 600
DENSE, BARE = "nn.Linear", "the same two products, bare"


def rows() -> Iterable[dict]:
    """Yield all rows; ten minutes of them are distillation."""
    yield from encoder_quality()
    torch.set_num_threads(1)
    yield encoder_speed()
    yield from layers()
    yield from converted_layers()
    yield from decisions()
    yield from small_costs()
    yield from adaptivity()
    torch.set_num_threads(2)
    yield from distillation()


def encoder_quality() -> Iterable[dict]:
    """Cosine to the dense embedding at three budgets, over three draws of sentences."""
    found: dict[tuple[str, float], list[Tensor]] = {}
    spent: dict[float, float] = {}
    seconds = []
    for seed in range(3):
        texts = quality.sentences(seed)
        model, batches = quality.encoder()
        data = batches(texts[:CALIBRATION])
        test = batches(texts[CALIBRATION : CALIBRATION + UNSEEN])
        reference = quality.embed(model, test)
        for name, level, cosine in _peers(model, data, test, reference):
            found.setdefault((name, level), []).append(cosine)
        for name, options in (("loraven", {}), ("own errors", {"sensitivity": False})):
            family = copy.deepcopy(model)
            begin = time.process_time()
            loraven.convert(
                family, data, levels=LEVELS, include=["encoder*"], **options
            )
            if name == "loraven":
                seconds.append(time.perf_counter() - begin)
                spent |= _counted(family, test[0])
            for level in GOALS:
                loraven.set_budget(family, level)
                cosine = (quality.embed(family, test) * reference).sum(1)
                found.setdefault((name, level), []).append(cosine)
    for level, goal in GOALS.items():
        means = {n: _mean(c) for (n, at), c in found.items() if at == level}
        ours = found["loraven", level]
        spread = [round(float(c.mean()), 4) for c in ours]
        yield {
            "measure": f"mean cosine at budget {level}",
            "value": means["loraven"],
            "unit": f"{100 * spent[level]:.1f} % of the MACs, counted",
            "peer": f"Cholesky-whitened SVD {means['whitened']:.3f}, "
            f"plain SVD {means['plain']:.3f}",
            "goal": goal,
            "note": f"5th percentile {_low(ours):.3f}; draws {spread}; without "
            f"gradients {means['own errors']:.3f}",
            "table": QUALITY,
        }
    yield {
        "measure": "conversion of the encoder, 320 sentences",
        "value": statistics.median(seconds),
        "unit": "s on 2 threads",
        "goal": "<= 25",
        "table": QUALITY,
    }


def _peers(
    model: nn.Module, data: Sequence, test: Sequence, reference: Tensor
) -> Iterable[tuple[str, float, Tensor]]:
    targets = quality.encoder_layers(model)
    moments = quality.second_moments(model, data, targets)
    for name, given in (("plain", None), ("whitened", moments)):
        peer = quality.Svd(targets, given)
        for level in GOALS:
            with quality.two_factors(targets, peer.factors(level)):
                cosine = (quality.embed(model, test) * reference).sum(1)
            yield name, level, cosine


def _counted(family: nn.Module, batch: quality.Batch) -> dict[float, float]:
    """Counted multiply-adds of the converted layers, as shares of the dense ones."""
    loraven.set_budget(family, 1.0)
    dense = batch["input_ids"].numel() * sum(
        module.in_features * module.out_features
        for module in family.modules()
        if isinstance(module, loraven.NestedLinear)
    )
    rest = quality.layer_macs(family, batch) - dense
    found = {}
    for level in LEVELS:
        loraven.set_budget(family, level)
        found[level] = quality.layer_macs(family, batch, rest) / dense
    return found


def _mean(parts: Sequence[Tensor]) -> float:
    return float(torch.cat(list(parts)).mean())


def _low(parts: Sequence[Tensor]) -> float:
    return float(torch.cat(list(parts)).quantile(0.05))


def distillation() -> Iterable[dict]:
    """The same after ten minutes of more data and distillation, one draw."""
    texts = quality.sentences()
    model, batches = quality.encoder()
    test = batches(texts[CALIBRATION : CALIBRATION + UNSEEN])
    reference = quality.embed(model, test)
    others = texts[:CALIBRATION] + texts[CALIBRATION + UNSEEN :]
    begin = time.perf_counter()
    options = {"levels": (0.5, 0.7, 1.0), "include": ["encoder*"]}
    loraven.convert(model, batches(others), **options)
    converted = _cosines(model, test, reference)
    data, steps = batches(others, 16), 20
    started = time.perf_counter()
    loraven.distill(copy.deepcopy(model), data, steps=steps)
    each = (time.perf_counter() - started) / steps
    left = DISTILL_SECONDS - (time.perf_counter() - begin)
    steps = int(0.9 * left / each)
    summary = loraven.distill(model, data, steps=steps)
    seconds = time.perf_counter() - begin
    for level, cosine in _cosines(model, test, reference).items():
        yield {
            "measure": f"mean cosine at budget {level}, {len(others)} sentences, "
            "distilled",
            "value": float(cosine.mean()),
            "unit": f"{steps} steps, {seconds:.0f} s in all on 2 threads",
            "peer": f"before distillation {float(converted[level].mean()):.3f}",
            "goal": {0.5: ">= .96", 0.7: ">= .99"}[level],
            "note": f"5th percentile {float(cosine.quantile(0.05)):.3f}; {summary}",
            "table": QUALITY,
        }


def _cosines(
    model: nn.Module, test: Sequence, reference: Tensor
) -> dict[float, Tensor]:
    found = {}
    for level in (0.5, 0.7):
        loraven.set_budget(model, level)
        found[level] = (quality.embed(model, test) * reference).sum(1)
    return found


def adaptivity() -> Iterable[dict]:
    """Whether a level for each sentence pays."""
    texts = quality.sentences()
    model, batches = quality.encoder()
    levels = (0.4, 0.5, 0.6, 0.7, 0.775, 0.85, 1.0)
    loraven.convert(
        model, batches(texts[:CALIBRATION]), levels=levels, include=["encoder*"]
    )
    found = loraven.audit(model, batches(texts[600:2100]))
    yield {
        "measure": "budget for cosine >= .95 of 95 % of sentences, router",
        "value": found.router_budget,
        "unit": "of the dense cost, mean",
        "peer": f"coin {found.coin_budget:.3f}, static {found.static_budget:.3f}, "
        f"oracle {found.oracle_budget:.3f}",
        "goal": "<= coin - .045",
        "note": f"verdict {found.verdict}; violations {found.router_violation:.3f}",
        "table": QUALITY,
    }


def against(
    ours: Callable[[], object], theirs: Callable[[], object], repeats: int = 40
) -> dict[str, object]:
    """Row parts: how many times faster `ours` is."""
    calls = max(1, round(2e-3 / max(measure(theirs, repeats=3).median, 1e-7)))
    found = compare(ours, theirs, repeats=repeats, calls=calls)
    fastest = min(found.b.times) / min(found.a.times)
    return {
        "value": fastest,
        "unit": "x faster",
        "note": f"medians {1 / found.ratio:.2f}; {1e6 * min(found.a.times):.0f} us",
    }


@torch.no_grad()
def encoder_speed() -> dict:
    """The encoder end to end at budget .5, chosen by latency."""
    texts = quality.sentences()
    model, batches = quality.encoder()
    dense = copy.deepcopy(model)
    data = batches(texts[:CALIBRATION])
    options = {"levels": (0.5, 1.0), "include": ["encoder*"], "cost": "latency"}
    loraven.convert(model, data, **options)
    loraven.set_budget(model, 0.5)
    (batch,) = batches(texts[CALIBRATION : CALIBRATION + 32])
    found = against(lambda: model(**batch), lambda: dense(**batch))
    return {
        "measure": "encoder end to end, 32 sentences, latency budget .5",
        "peer": "dense encoder",
        "goal": ">= 1.45",
        **found,
    }


@torch.no_grad()
def layers() -> Iterable[dict]:
    """DynamicLowRankLayer at r = d/8, with and without scorer and gates."""
    for dim, batch in ((1024, 16), (1024, 64), (2048, 32)):
        dense, x = nn.Linear(dim, dim), torch.randn(batch, dim)
        layer = loraven.DynamicLowRankLayer(dim, dim, r_max=dim // 8, r_min=dim // 8)
        layer.eval()
        for fixed, goal in ((None, ">= 2.6"), (dim // 8, ">= 3.6")):
            layer.fixed_rank = fixed
            how = "scorer and gates" if fixed is None else "fixed_rank"
            yield {
                "measure": f"d={dim}, {batch} rows, rank d/8, {how}",
                "peer": DENSE,
                "goal": goal,
                **against(lambda f=layer, x=x: f(x), lambda f=dense, x=x: f(x)),
            }
        layer.fixed_rank = dim // 8
        down, up, bias = layer.down, (layer.up * layer.scale[:, None]).T, layer.bias
        up = up.contiguous()
        found = against(
            lambda f=layer, x=x: f(x),
            lambda x=x, d=down, u=up, b=bias: linear(linear(x, d), u, b),
        )
        yield {
            "measure": f"d={dim}, {batch} rows, rank d/8, fixed_rank, against bare",
            "peer": BARE,
            "goal": ">= .97",
            **found,
        }


@torch.no_grad()
def converted_layers() -> Iterable[dict]:
    """The slowest converted layer at any level, chosen by latency."""
    worst: tuple[float, str] = (0.0, "")
    count = 0
    for out, inner in (
        (384, 384),
        (1536, 384),
        (384, 1536),
        (1024, 1024),
        (4096, 1024),
    ):
        for batch in (1, 16, 64, 512):
            dense = nn.Linear(inner, out)
            family = nn.Sequential(copy.deepcopy(dense))
            mix = torch.randn(inner, inner) * torch.logspace(0, -2, inner)
            data = [torch.randn(batch, inner) @ mix for _ in range(-(-2048 // batch))]
            levels = (0.4, 0.6, 0.8, 1.0)
            loraven.convert(
                family, data, levels=levels, cost="latency", sensitivity=False
            )
            for level in levels:
                loraven.set_budget(family, level)
                x = data[0]
                found = against(
                    lambda f=family, x=x: f[0](x), lambda f=dense, x=x: f(x), 30
                )
                ratio = 1 / float(str(found["value"]))
                worst = max(worst, (ratio, f"{out} x {inner}, {batch} rows, {level}"))
                count += 1
    yield {
        "measure": f"slowest of {count} converted layers and levels, by latency",
        "value": worst[0],
        "unit": "of the dense layer's time",
        "peer": DENSE,
        "goal": "<= 1.05",
        "note": worst[1],
    }


@torch.no_grad()
def decisions() -> Iterable[dict]:
    """What choosing costs for one row of d=1024."""
    x = torch.randn(1, 1024)
    layer = loraven.DynamicLowRankLayer(1024, 1024, r_max=128, r_min=128).eval()
    layer.fixed_rank = 128
    down, up = layer.down[:128], (layer.up * layer.scale[:, None]).T.contiguous()
    bare = lambda: linear(linear(x, down), up, layer.bias)  # noqa: E731
    family = nn.Sequential(nn.Linear(1024, 1024))
    data = [torch.randn(2048, 1024)]
    loraven.convert(family, data, levels=(0.3, 1.0), sensitivity=False)
    loraven.set_budget(family, 1.0)
    dense = nn.Linear(1024, 1024)
    yield _extra("level mode", lambda: family[0](x), lambda: dense(x), "<= 4")
    layer.fixed_rank = None
    yield _extra("scorer and gates", lambda: layer(x), bare, "<= 25")


def _extra(
    what: str, ours: Callable[[], object], theirs: Callable[[], object], goal: str
) -> dict:
    found = compare(ours, theirs, repeats=60, calls=20)
    extra = min(found.a.times) - min(found.b.times)
    return {
        "measure": f"decision of one layer, d=1024, one row: {what}",
        "value": 1e6 * extra,
        "unit": "us more than the products",
        "goal": goal,
        "note": f"{1e6 * min(found.a.times):.0f} against "
        f"{1e6 * min(found.b.times):.0f} us",
    }


def small_costs() -> Iterable[dict]:
    """Switching a budget, the ledger, the import."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(36)))
    loraven.convert(model, [torch.randn(512, 64)], sensitivity=False)

    def switch() -> None:
        loraven.set_budget(model, 0.3)
        loraven.set_budget(model, 1.0)

    yield {
        "measure": "set_budget on 36 layers",
        "value": 1e6 * min(measure(switch, repeats=50, calls=50).times) / 2,
        "unit": "us",
        "goal": "<= 200",
    }
    ledger = loraven.BudgetManager(total_budget=1e9)

    def book() -> None:
        ledger.allocate_budget("a", 0.5, (64, 64))
        ledger.update_energy_consumption("a", 0.01)

    yield {
        "measure": "BudgetManager: allocate and update",
        "value": 1e6 * min(measure(book, repeats=50, calls=200).times),
        "unit": "us",
        "goal": "<= 15",
    }
    code = "import torch, time; t = time.perf_counter(); import loraven; "
    code += "print(time.perf_counter() - t)"
    times = [
        float(subprocess.check_output([sys.executable, "-c", code], text=True))
        for _ in range(5)
    ]
    yield {
        "measure": "import loraven, torch there already",
        "value": 1e3 * min(times),
        "unit": "ms",
        "goal": "<= 30",
    }
