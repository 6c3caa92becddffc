# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from safetensors.torch import load_file, save_file

from mol import MoLConfig, UnsupportedArchitectureError
from mol.blocks import build_block, find_blocks, reindex, share
from mol.shell import Shell
from mol.sources import ModelSource
from mol.stack import Stack


def _source(folder):
    return ModelSource(str(folder), MoLConfig([str(folder)]))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_block_list_is_found(base, name):
    model = base[name]
    expected = model.transformer.h if name == "gpt2" else model.model.layers
    assert find_blocks(model).get(model) is expected


@pytest.mark.parametrize("name", ["gpt2", "llama", "scaled"])
def test_block_has_the_tensors_and_buffers_of_its_model(folders, base, name):
    built = build_block(_source(folders[name]), 2)
    expected = find_blocks(base[name]).get(base[name])[2]
    assert built.state_dict().keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert torch.equal(built.state_dict()[key], value)
    for (_, a), (_, b) in zip(
        built.named_buffers(), expected.named_buffers(), strict=True
    ):
        assert torch.equal(a, b)


def test_frame_buffers_equal_those_of_a_normal_model(folders, base):
    stack = Stack(_source(folders["llama"]))
    stack.add(3)
    assert torch.equal(
        stack.frame.rotary_emb.inv_freq, base["llama"].model.rotary_emb.inv_freq
    )
    shell = Shell(_source(folders["llama"]))
    shell.load_embeddings()
    assert torch.equal(
        shell.causal.model.rotary_emb.inv_freq, base["llama"].model.rotary_emb.inv_freq
    )


def test_shared_block_has_the_same_parameters_and_its_own_index(folders):
    block = build_block(_source(folders["llama"]), 1)
    twin = share(block)
    reindex(twin, 7)
    assert twin.self_attn.layer_idx == 7
    assert block.self_attn.layer_idx == 1
    for a, b in zip(block.parameters(), twin.parameters(), strict=True):
        assert a is b


@pytest.mark.parametrize("index", [-1, 4, True, "1", 1.0])
def test_layer_that_does_not_exist(folders, index):
    with pytest.raises(ValueError, match=r"4 layers"):
        build_block(_source(folders["llama"]), index)


def _damage(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return _source(folder)


KEY = "model.layers.1.mlp.up_proj.weight"


def test_missing_surplus_and_misshapen_tensors(copied):
    source = _damage(copied("llama", "a"), lambda t: t.pop(KEY))
    with pytest.raises(UnsupportedArchitectureError, match=r"lacks.*up_proj"):
        build_block(source, 1)
    build_block(source, 0)
    extra = {"model.layers.1.mlp.extra.weight": torch.ones(1)}
    source = _damage(copied("llama", "b"), lambda t: t.update(extra))
    with pytest.raises(UnsupportedArchitectureError, match=r"unknown.*mlp\.extra"):
        build_block(source, 1)
    source = _damage(copied("llama", "c"), lambda t: t.update({KEY: torch.ones(3, 3)}))
    with pytest.raises(UnsupportedArchitectureError, match="shape"):
        build_block(source, 1)


def test_weights_that_are_not_finite_are_refused(copied):
    source = _damage(copied("llama"), lambda t: t[KEY].fill_(float("nan")))
    with pytest.raises(ValueError, match=rf"{KEY}.* not finite"):
        Stack(source).add(1)


def _patched(monkeypatch, wrap):
    """Blocks of every Llama built from now on behave as ``wrap`` says."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    original = LlamaDecoderLayer.forward

    def forward(self, hidden_states, *args, **kwargs):
        return wrap(self, original(self, hidden_states, *args, **kwargs))

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)


def test_block_that_depends_on_its_index_is_refused(folders, monkeypatch):
    _patched(monkeypatch, lambda self, out: out * (1 + self.self_attn.layer_idx))
    with pytest.raises(UnsupportedArchitectureError, match=r"re-index check with \d"):
        Stack(_source(folders["llama"])).add(2)


def test_block_that_looks_ahead_is_refused(folders, monkeypatch):
    _patched(monkeypatch, lambda self, out: out + out.mean(1, keepdim=True))
    with pytest.raises(UnsupportedArchitectureError, match="future leak check"):
        Stack(_source(folders["llama"])).add(2)


def test_block_called_otherwise_than_recorded_is_refused(folders, monkeypatch):
    monkeypatch.setattr("mol.stack._natively", lambda f, w, b, x: b.mlp(x))
    with pytest.raises(UnsupportedArchitectureError, match="recorded call check"):
        Stack(_source(folders["llama"])).add(2)


def test_failed_add_leaves_the_stack_as_it_was(folders):
    stack = Stack(_source(folders["llama"]))
    stack.add(1)
    before = (list(stack.blocks), stack.picks, stack.frame)
    with pytest.raises(ValueError, match="does not exist"):
        stack.add(9)
    assert (list(stack.blocks), stack.picks, stack.frame) == before
    parameters = list(stack.blocks.parameters())
    stack.add(3)
    for a, b in zip(parameters, stack.blocks.parameters(), strict=False):
        assert a is b
