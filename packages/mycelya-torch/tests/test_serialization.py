# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Saving, loading and copying device tensors with torch's own means."""

import copy
import io
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from mycelya_torch import RemoteMachine, get_storage_id

pytestmark = pytest.mark.fast


def through_save(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, **options)


def through_old_save(value):
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    buffer.seek(0)
    return torch.load(buffer)


def through_pickle(value):
    return pickle.loads(pickle.dumps(value))


WAYS = [through_save, through_old_save, through_pickle, copy.deepcopy]


@pytest.mark.critical
@pytest.mark.parametrize("way", WAYS)
def test_tensor_keeps_its_value_and_device(both, way):
    x = torch.randn(5, 6, device=both.device())
    y = way(x)
    assert y.device == x.device
    assert torch.equal(y.cpu(), x.cpu())
    assert get_storage_id(y) != get_storage_id(x)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.int64, torch.bfloat16, torch.complex64, torch.uint8],
    ids=str,
)
def test_dtypes(both, way, dtype):
    x = torch.ones(7, device=both.device()).to(dtype)
    y = way(x)
    assert y.dtype == dtype
    assert torch.equal(y.cpu(), x.cpu())


# Pickle by itself takes each tensor's storage as another one, on the CPU, too.
@pytest.mark.parametrize("way", [through_save, through_old_save, copy.deepcopy])
def test_views_keep_sharing(both, way):
    x = torch.arange(12.0, device=both.device())
    first, second = way([x[2:8].view(2, 3).t(), x])
    assert torch.equal(first.cpu(), x[2:8].view(2, 3).t().cpu())
    assert get_storage_id(first) == get_storage_id(second)
    second.zero_()
    assert first.sum().item() == 0


@pytest.mark.parametrize("way", WAYS)
def test_empty_and_scalar(both, way):
    for x in (
        torch.empty(0, 3, device=both.device()),
        torch.tensor(2.5, device=both.device()),
    ):
        y = way(x)
        assert y.shape == x.shape
        assert y.tolist() == x.tolist()


@pytest.mark.parametrize("way", [through_save, through_pickle])
def test_conjugate_and_negative_bits(both, way):
    x = torch.tensor([1 + 2j, 3 - 4j], device=both.device())
    assert way(x.conj()).tolist() == [1 - 2j, 3 + 4j]
    assert way(x.conj().imag).tolist() == [-2, 4]


@pytest.mark.parametrize("way", WAYS)
def test_model_and_optimizer(both, way):
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)
    ).to(both.device())
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(5, 4, device=both.device())).sum().backward()
    optimizer.step()
    state = way({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    for name, value in model.state_dict().items():
        assert torch.equal(state["model"][name].cpu(), value.cpu())
    optimizer.load_state_dict(state["optimizer"])
    model.load_state_dict(state["model"])


def test_moving_a_module_keeps_ties_and_its_parameters(both):
    """As on CUDA: an optimizer made before the move goes on with the parameters."""
    embedding, head = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5, bias=False)
    head.weight = embedding.weight
    model = torch.nn.ModuleList([embedding, head])
    (parameter,) = model.parameters()
    model.to(both.device())
    assert model[0].weight is model[1].weight is parameter
    assert parameter.device == both.device()
    parameter.sum().backward()
    model.cpu()
    assert parameter.device == parameter.grad.device == torch.device("cpu")
    assert model[0].weight is model[1].weight is parameter


def test_deepcopy_of_a_module_keeps_ties(both):
    embedding = torch.nn.Embedding(5, 4)
    head = torch.nn.Linear(4, 5, bias=False)
    head.weight = embedding.weight
    model = torch.nn.ModuleList([embedding, head]).to(both.device())
    model[1](model[0](torch.tensor([1, 2], device=both.device()))).sum().backward()
    other = copy.deepcopy(model)
    assert other[0].weight is other[1].weight
    assert torch.equal(other[0].weight.cpu(), model[0].weight.cpu())
    assert other[0].weight.grad is None  # a copied Parameter has none, on the CPU too


def test_map_location(both):
    x = torch.randn(3, device=both.device())
    assert through_save(x, map_location="cpu").device.type == "cpu"
    there = through_save(x.cpu(), map_location=both.device())
    assert there.device == both.device()
    assert torch.equal(there.cpu(), x.cpu())


def test_loading_without_the_machine_says_so():
    buffer = io.BytesIO()
    with RemoteMachine("mock") as machine:
        index = machine.device().index
        torch.save(torch.ones(2, device=machine.device()), buffer)
    buffer.seek(0)
    if index < torch.mycelya.device_count():
        pytest.skip("another machine has a higher index")
    with pytest.raises(RuntimeError, match="mycelya"):
        torch.load(buffer)


def test_safetensors(both, tmp_path):
    x = {"a": torch.randn(3, 4, device=both.device())}
    save_file(x, tmp_path / "x.safetensors")
    assert torch.equal(load_file(tmp_path / "x.safetensors")["a"], x["a"].cpu())


def test_storage(both):
    x = torch.arange(4, dtype=torch.uint8, device=both.device())
    storage = x.untyped_storage()
    assert storage.device == both.device()
    assert storage.nbytes() == 4
    assert list(storage.cpu()) == [0, 1, 2, 3]
    assert copy.deepcopy(storage).cpu().tolist() == [0, 1, 2, 3]
    moved = torch.UntypedStorage(4).fill_(7).mycelya(both.device())
    assert moved.device == both.device()
