# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from mol import MoLConfig, fuse
from mol.align import Ridge


def test_ridge_equals_the_normal_equations():
    random = np.random.default_rng(0)
    x = random.normal(size=(200, 5)) * [1, 2, 3, 4, 0.1] + 7
    y = x @ random.normal(size=(5, 3)) + random.normal(size=(200, 3)) + 2
    fit = Ridge(5, 3)
    for part in np.array_split(np.arange(200), 7):
        fit.add(torch.tensor(x[part]), torch.tensor(y[part]))
    weight, bias, r2 = fit.solve(0.3)
    cx, cy = x - x.mean(0), y - y.mean(0)
    gram = cx.T @ cx
    expected = np.linalg.solve(gram + 0.3 * np.diag(gram).mean() * np.eye(5), cx.T @ cy)
    assert np.allclose(weight.T.numpy(), expected, atol=1e-5)
    assert np.allclose(bias.numpy(), y.mean(0) - x.mean(0) @ expected, atol=1e-4)
    residual = y - x @ expected - (y.mean(0) - x.mean(0) @ expected)
    assert r2 == pytest.approx(1 - (residual**2).sum() / (cy**2).sum(), abs=1e-6)


@pytest.mark.critical
def test_a_copy_of_the_primary_is_recovered(copied, folders, base):
    """The guest is the primary itself: aligned, its blocks must act as its own."""
    guest = str(copied("gpt2"))
    runtime = fuse(MoLConfig([folders["gpt2"], guest]))
    with torch.no_grad():
        for layer in runtime.model.streams.layers:
            layer.pre["1"].weight.normal_()
            layer.post["1"].weight.normal_()
    ids = torch.randint(0, 256, (64, 64))
    report = runtime.align(ids, ridge=1e-6, delta_ridge=1e-6)
    assert len(report) == 4
    assert all(row.r2_stream > 0.999 and row.r2_delta > 0.999 for row in report)
    assert all(row.tokens == 64 * 64 and not row.weak for row in report)
    held_out = torch.randint(0, 256, (4, 40))
    with torch.no_grad(), runtime.force_expert(guest):
        aligned = runtime.logits(held_out)
        expected = base["gpt2"](held_out).logits
    assert (aligned - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("pair", [("gpt2", "llama"), ("llama", "scaled")])
def test_r2_equals_a_fit_on_hooked_models(make, base, pair):
    runtime = make(*pair)
    ids = torch.randint(0, 256, (24, 64))
    report = runtime.align(ids)
    streams = {}
    for name in pair:
        model = base[name]
        blocks = model.model.layers if name == "llama" else model.transformer.h
        seen = streams[name] = []
        hooks = [
            block.register_forward_pre_hook(
                lambda _m, args, kwargs, seen=seen: seen.append(
                    args[0] if args else kwargs["hidden_states"]
                ),
                with_kwargs=True,
            )
            for block in blocks
        ]
        with torch.no_grad():
            model(ids, use_cache=False)
        for hook in hooks:
            hook.remove()
    for row, (_, guest) in zip(report, runtime.model.streams.rows, strict=True):
        x = streams[pair[0]][row.layer].flatten(0, 1).double().numpy()
        y = streams[pair[1]][guest[1]].flatten(0, 1).double().numpy()
        x, y = x - x.mean(0), y - y.mean(0)
        gram = x.T @ x
        fit = np.linalg.solve(
            gram + 1e-2 * np.diag(gram).mean() * np.eye(len(gram)), x.T @ y
        )
        r2 = 1 - ((y - x @ fit) ** 2).sum() / (y**2).sum()
        assert row.r2_stream == pytest.approx(r2, abs=1e-4)
        adapter = runtime.model.streams.layers[row.layer].pre["1"]
        width = gram.shape[0]
        assert np.allclose(adapter.weight[:, :width].T.detach(), fit, atol=1e-3)


def test_text_is_tokenised_and_experts_may_stand_out_of_order(folders, stir):
    from mol import MoLRuntime

    a, b = folders["gpt2"], folders["llama"]
    runtime = MoLRuntime(MoLConfig([a, b]))
    runtime.add_layer([(b, 3)], 0)
    runtime.add_layer([(a, 3), (b, 0)], 1)
    runtime.add_layer([(a, 1), (b, 2)], 2)
    report = runtime.align(["some text " * 300, "more of it " * 300], max_tokens=2048)
    assert [row.layer for row in report] == [0, 1, 2]
    assert [row.expert for row in report] == [(b, 3), (b, 0), (b, 2)]
    assert {row.tokens for row in report} == {2048}
    assert "R2 stream" in str(report)


def test_what_cannot_be_aligned_is_refused(make, folders, tmp_path):
    from torchworks_core.testing import save_tiny

    runtime = make("gpt2", "llama")
    bad = {
        "0 tokens": torch.zeros(0, 4, dtype=torch.long),
        "1 tokens": torch.zeros(1, 1, dtype=torch.long),
        "dtype torch.float32": torch.zeros(2, 4),
        "reach from 0 to 300": torch.tensor([[0, 300]]),
    }
    for message, data in bad.items():
        with pytest.raises(ValueError, match=message):
            runtime.align(data)
    with pytest.raises(ValueError, match="0 tokens"):
        runtime.align([])
    ids = torch.randint(0, 256, (4, 64))
    for options in ({"ridge": 0}, {"delta_ridge": float("inf")}, {"max_tokens": 1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            runtime.align(ids, **options)
    before = {k: v.clone() for k, v in runtime.model.state_dict().items()}
    with pytest.raises(ValueError, match="does not vary"):
        runtime.align(torch.zeros(64, 1, dtype=torch.long))
    for name, value in runtime.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert {row.tokens for row in runtime.align(ids, max_tokens=100)} == {64}
    endless = (text for _ in iter(int, 1) for text in ["some text "])
    assert {row.tokens for row in runtime.align(endless, max_tokens=300)} == {256}
    with pytest.raises(RuntimeError, match="nothing to align"):
        make("gpt2", "llama", stream="parallel").align(["text"])
    other = str(save_tiny(tmp_path / "other", "gpt2", vocab_size=300))
    with pytest.raises(NotImplementedError, match="one vocabulary"):
        fuse(MoLConfig([folders["gpt2"], other])).align(["text"])
