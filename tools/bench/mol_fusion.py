# SPDX-License-Identifier: Apache-2.0
"""What fusing two models buys, and what it costs.

Quality: the tour's two byte models (a GPT-2 trained on prose, a Llama trained
on code) on held-out text; nothing is trained after them, ridge adapters are
fitted in closed form on training text. Cost: random weights of a size at
which matrix products, not Python, take most of the time; both sides of a
ratio run in turns on one thread.
"""

import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import transformers
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import mol  # noqa: E402
from tools.tour.corpus import cut_test_windows, cut_windows, load_corpus  # noqa: E402
from tools.tour.experts import prepare_experts  # noqa: E402
from tools.tour.measures import window_nats  # noqa: E402
from tools.tour.training import WINDOW, Settings  # noqa: E402
from torchworks_core.bench import compare  # noqa: E402
from torchworks_core.testing import save_tiny  # noqa: E402

QUALITY = "mol-fusion-quality"
SIZES = {"vocab_size": 32_000, "hidden_size": 512, "num_hidden_layers": 6}
PROMPT, NEW = 32, 48


def rows() -> Iterable[dict]:
    """Yield all rows; about four minutes, one more where the tour never ran."""
    yield from quality()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        yield from cost(Path(name))
    yield from importing()


def quality() -> Iterable[dict]:
    """Bits per byte on held-out prose and code."""
    corpus = load_corpus()
    found = prepare_experts(Settings(), corpus, ROOT / "tools" / "tour" / "cache")
    prose, code = (str(found.folders[d]) for d in ("prose", "code"))
    windows = cut_test_windows(corpus, 96, WINDOW)
    fitting = torch.cat(
        [cut_windows(corpus.text(d), 256, WINDOW) for d in windows if d != "switch"]
    )
    best: float | None = None
    for name, log_probs in systems(prose, code, fitting):
        bits = {
            k: window_nats(log_probs, ids).mean().item() / math.log(2)
            for k, ids in windows.items()
        }
        mean = (bits["prose"] + bits["code"]) / 2
        if "alone" in name:
            best = min(mean, best or mean)
        yield {
            "measure": name,
            "value": mean,
            "unit": "bits per byte, mean of prose and code",
            "peer": "" if "alone" in name else f"{mean / best:.3f} x better single",
            "note": ", ".join(f"{k} {v:.3f}" for k, v in bits.items()),
            "table": QUALITY,
        }


def systems(
    prose: str, code: str, fitting: Tensor
) -> Iterable[tuple[str, Callable[[Tensor], Tensor]]]:
    """Name and log-probabilities of each way to use the two models."""
    both = mol.fuse(mol.MoLConfig([prose, code], stream="parallel"))
    for title, model in (("prose GPT-2", prose), ("code Llama", code)):
        yield f"{title} alone", _forced(both, model)

    def uniform(ids: Tensor) -> Tensor:
        parts = [_forced(both, model)(ids) for model in (prose, code)]
        return torch.stack(parts).logsumexp(0) - math.log(2)

    yield "parallel, uniform mixture of outputs", uniform
    for share in (0.0, 0.02, 0.05):
        config = mol.MoLConfig([prose, code], stream="parallel", gate_share=share)
        yield f"parallel, Bayes gate, share {share}", mol.fuse(config).logits
    for fit in ("random", "identity", "ridge"):
        single = mol.fuse(mol.MoLConfig([prose, code], router_init=None))
        if fit == "random":
            _randomise(single)
        if fit == "ridge":
            single.align(fitting)
        yield f"single stream, uniform router, {fit} adapters", _single(single)
        yield f"code blocks only, {fit} adapters", _forced(single, code)


def _randomise(runtime: mol.MoLRuntime) -> None:
    generator = torch.Generator().manual_seed(0)
    for layer in runtime.model.streams.layers:
        for adapter in (*layer.pre.values(), *layer.post.values()):
            noise = torch.randn(adapter.weight.shape, generator=generator)
            adapter.assign(noise * adapter.input_dim**-0.5, adapter.bias.detach() * 0)


def _forced(runtime: mol.MoLRuntime, name: str) -> Callable[[Tensor], Tensor]:
    def log_probs(ids: Tensor) -> Tensor:
        with runtime.force_expert(name):
            return runtime.logits(ids).log_softmax(-1)

    return log_probs


def _single(runtime: mol.MoLRuntime) -> Callable[[Tensor], Tensor]:
    return lambda ids: runtime.logits(ids).log_softmax(-1)


def cost(folder: Path) -> Iterable[dict]:
    """Cached greedy decoding against the models' own `generate`."""
    size = {**SIZES, "max_position_embeddings": 2304, "num_attention_heads": 8}
    llama = {"num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 1408}
    a = str(save_tiny(folder / "gpt2", "gpt2", **size))
    b = str(save_tiny(folder / "llama", "llama", **size, **llama))
    own = {n: mol.fuse(mol.MoLConfig([n], stream="parallel")) for n in (a, b)}
    bases = {n: own[n].model.streams.tower(n).causal for n in (a, b)}
    ids = torch.randint(0, 32_000, (1, PROMPT))
    for name, models, stream, goal in (
        ("decode, 1 expert, single stream", [a], "single", "<= 1.03"),
        ("decode, 2 experts, single stream", [a, b], "single", "<= 1.10"),
        ("decode, 2 models, Bayes gate", [a, b], "parallel", "<= 1.05"),
    ):
        fused = mol.fuse(mol.MoLConfig(models, stream=stream)).model
        peers = [bases[n] for n in models]
        found = compare(
            lambda fused=fused: _generate([fused], ids),
            lambda peers=peers: _generate(peers, ids),
            repeats=9,
            warmup=1,
            clock="process",
        )
        yield _ratio(name, found, "the base models, one after the other", goal)
    yield from _long(mol.fuse(mol.MoLConfig([a, b], stream="parallel")))


def _long(runtime: mol.MoLRuntime) -> Iterable[dict]:
    """A token at 2,048 positions, with the cache and by running all again."""
    ids = torch.randint(0, 32_000, (1, 2048))
    with torch.no_grad():
        cache = runtime.model(ids, logits_to_keep=1).past_key_values

        def cached() -> None:
            runtime.model(ids[:, :1], past_key_values=cache)
            cache.crop(-1)

        def again() -> None:
            runtime.model(ids, use_cache=False, logits_to_keep=1)

        found = compare(again, cached, repeats=5, warmup=1, clock="process")
    against = "the same model with its cache"
    yield _ratio(
        "2,048 tokens again for each token, Bayes gate", found, against, ">= 20"
    )


def importing() -> Iterable[dict]:
    """What `import mol` adds to `import torch`; and the peer's version."""
    code = (
        "import time, torch; begin = time.perf_counter(); import mol; "
        "print(time.perf_counter() - begin)"
    )
    command = [sys.executable, "-c", code]
    found = [float(subprocess.check_output(command)) for _ in range(7)]
    yield {
        "measure": "import mol after import torch",
        "value": statistics.median(found),
        "unit": "s",
        "goal": "<= 0.15",
    }
    yield {"measure": "transformers, the peer", "value": transformers.__version__}


def _generate(models: list[torch.nn.Module], ids: Tensor) -> None:
    for model in models:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            min_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
        )


def _ratio(name: str, found: object, against: str, goal: str) -> dict:
    return {
        "measure": name,
        "value": found.ratio,
        "unit": "x time",
        "peer": against,
        "goal": goal,
        "note": f"{found.low:.2f} to {found.high:.2f}",
    }
