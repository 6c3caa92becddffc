# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from mol import MoLConfig, MoLRuntime, UnsupportedArchitectureError


@pytest.mark.parametrize("stream", ["single", "parallel"])
def test_sound_model_passes(make, stir, stream):
    runtime = make("gpt2", "llama", stream=stream)
    if stream == "single":
        stir(runtime)
    runtime.train()
    report = runtime.verify()
    report.raise_if_failed()
    assert report.exact.value == 0.0
    assert report.leak.value == 0.0
    assert 0 < report.cached.value <= report.cached.limit
    assert runtime.model.training


def test_exact_has_no_meaning_without_the_primary_in_order(folders):
    a, b = folders["gpt2"], folders["llama"]
    for rows in ([[(b, 0)]], [[(a, 1)], [(a, 0)]], [[(a, 0), (a, 0)]]):
        runtime = MoLRuntime(MoLConfig([a, b]))
        runtime.setup_embeddings()
        runtime.setup_lm_head()
        for number, row in enumerate(rows):
            runtime.add_layer(row, number)
        report = runtime.verify()
        assert report.exact.value is None
        report.raise_if_failed()


def _wrapped(layer, change):
    original = layer.forward
    layer.forward = lambda *a, **k: change(*original(*a, **k))


def test_planted_faults_are_found(make, stir):
    faults = {
        "leak": lambda out, w: (out + out.mean(1, keepdim=True), w),
        "permutation": lambda out, w: (out + torch.arange(len(out))[:, None, None], w),
        "exact": lambda out, w: (out + 1e-3, w),
        "cached": lambda out, w: (out * (1 + out.shape[1]), w),
    }
    for name, change in faults.items():
        runtime = stir(make("gpt2", "llama"))
        _wrapped(runtime.model.streams.layers[1], change)
        report = runtime.verify()
        assert not getattr(report, name).passed, name
        with pytest.raises(UnsupportedArchitectureError, match=name):
            report.raise_if_failed()
    runtime = make("gpt2", "llama")
    _wrapped(runtime.model.streams.layers[0], lambda out, w: (out * float("nan"), w))
    with pytest.raises(UnsupportedArchitectureError, match="leak nan"):
        runtime.verify().raise_if_failed()
