# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Exceptions: their kinds, what they know, and how they come out of C++."""

import pickle

import pytest
import torch

import mycelya_torch
from mycelya_torch import RemoteError, RemoteExecutionError, _errors

pytestmark = pytest.mark.fast

TEXT = (
    "aten::gather failed on local-1a2b: index 9 is out of [bounds] "
    "[arguments float32[64,64], int64, int64[64,64], bool[]; op 12; "
    "set MYCELYA_BLOCKING=1 to raise at the calling line]"
)
KINDS = {
    1: IndexError,
    2: ValueError,
    3: TypeError,
    4: NotImplementedError,
    5: torch.linalg.LinAlgError,
    6: torch.OutOfMemoryError,
}


def test_text_is_parsed():
    error = _errors.RemoteIndexError(TEXT)
    assert str(error) == TEXT
    assert error.op == "aten::gather"
    assert error.machine_id == "local-1a2b"
    assert error.remote_type == "IndexError"
    assert error.shapes == ((64, 64), (64, 64), ())


@pytest.mark.parametrize(
    ("text", "op", "machine"),
    [
        ("", "", ""),
        ("something else", "", ""),
        ("a request failed on tcp-0: no such folder", "", "tcp-0"),
    ],
)
def test_other_texts_are_kept(text, op, machine):
    error = RemoteExecutionError(text)
    assert (str(error), error.op, error.machine_id, error.shapes) == (
        text,
        op,
        machine,
        (),
    )


@pytest.mark.parametrize(("number", "builtin"), KINDS.items())
def test_kinds_are_the_builtins(number, builtin):
    kind = _errors.BY_KIND[number]
    assert issubclass(kind, builtin)
    assert issubclass(kind, RemoteExecutionError)
    assert issubclass(kind, RuntimeError)
    assert _errors.kind_of(builtin("x")) == number


def test_kind_of_other_exceptions():
    assert _errors.kind_of(RuntimeError()) == 0
    assert _errors.kind_of(KeyError()) == 0
    assert _errors.kind_of(MemoryError()) == 6
    assert _errors.kind_of(FileNotFoundError()) == 0


@pytest.mark.parametrize("kind", _errors.BY_KIND[:-1])
def test_pickle_keeps_everything(kind):
    error = kind(TEXT)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert str(copy) == TEXT
    assert vars(copy) == vars(error)


def test_public_classes():
    for name in (
        "MachineDiedError",
        "AuthenticationError",
        "ProtocolError",
        "SyncForbiddenError",
        "RemoteExecutionError",
    ):
        assert issubclass(getattr(mycelya_torch, name), RemoteError)
    assert issubclass(RemoteError, RuntimeError)


# ---- out of C++: torch turns the look-alike of its own exception class into the
# Python class that the library was given ----


@pytest.mark.critical
def test_the_look_alike_is_still_recognised_in_operators():
    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="mycelya tensor"):
        torch.ops.mycelya.storage_id(x)
    with mycelya_torch.RemoteMachine("mock") as machine, mycelya_torch.forbid_sync():
        with pytest.raises(mycelya_torch.SyncForbiddenError):
            torch.ones(3, device=machine.device()).tolist()
        with pytest.raises(mycelya_torch.SyncForbiddenError):
            torch.ops.mycelya.synchronize(machine.device().index, "synchronize")


def bad_gather(device):
    return torch.zeros(64, 5, device=device).gather(
        1, torch.full((6, 3), 99, device=device)
    )


def bad_index(device):
    return torch.zeros(4, device=device)[torch.tensor([7, 1], device=device)]


def no_kernel(device):
    return torch.zeros(2, 3, dtype=torch.int64, device=device).histc(bins=4)


FAILING = [
    (bad_gather, RuntimeError, "aten::gather", ((64, 5), (6, 3))),
    (bad_index, IndexError, "aten::index", ((4,), (2,))),
    (no_kernel, NotImplementedError, "aten::histc", ((2, 3),)),
]


@pytest.mark.critical
@pytest.mark.parametrize(("fail", "kind", "op", "shapes"), FAILING)
def test_failure_comes_at_the_next_read_with_its_kind(both, fail, kind, op, shapes):
    with pytest.raises(kind) as local:
        fail("cpu")
    x = torch.zeros(3, device=both.device())
    fail(both.device())
    with pytest.raises(RemoteExecutionError) as caught:
        x.sum().item()
    error = caught.value
    assert type(error) is _errors.BY_KIND[_errors.kind_of(local.value)]
    assert isinstance(error, kind)
    assert (error.remote_type, error.op) == (kind.__name__, op)
    assert error.machine_id == both.machine_id
    assert error.shapes == shapes
    assert str(local.value) in str(error)
    assert x.sum().item() == 0  # the machine goes on


def test_failure_comes_at_a_synchronize(both):
    bad_index(both.device())
    with pytest.raises(IndexError, match="aten::index failed"):
        both.synchronize()
    both.synchronize()  # it is told once


def test_linear_algebra_error(both):
    singular = torch.zeros(3, 3, device=both.device())
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        torch.linalg.inv(singular).sum().item()


def test_out_of_memory_leaves_the_machine_usable(machine, device):
    x = torch.empty(1 << 37, dtype=torch.uint8, device=device)
    with pytest.raises(torch.OutOfMemoryError):
        machine.synchronize()
    del x
    assert torch.ones(4, device=device).sum().item() == 4


def test_metadata_errors_are_torchs_own_and_come_at_once(both):
    x = torch.ones(2, 3, device=both.device())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        x @ x


def test_mixed_devices_are_refused(both):
    x = torch.ones(2, 3, device=both.device())
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(2, 3)


def test_unseen_failure_is_reported_by_stop(capfd):
    machine = mycelya_torch.RemoteMachine("mock")
    x = torch.zeros(4, device=machine.device())
    x.index_select(0, torch.tensor([7], device=machine.device()))
    machine.stop()
    assert "aten::index_select failed" in capfd.readouterr().err


def test_failure_in_backward(both):
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad.index_select(0, torch.full((4,), 9, device=grad.device))

    x = torch.ones(4, device=both.device(), requires_grad=True)

    def train():
        Bad.apply(x).sum().backward()
        return x.grad.tolist()

    with pytest.raises(IndexError) as caught:
        train()
    assert caught.value.op == "aten::index_select"
    assert (x.detach() + 1).tolist() == [2, 2, 2, 2]


def test_pooling_backward_looks_at_its_indices(device):
    grad, pooled = torch.ones(1, 1, 4, 4, device=device), torch.ones(1, 1, 8, 8)
    indices = torch.full((1, 1, 4, 4), 64, device=device)
    layout = [2, 2], [2, 2], [0, 0], [1, 1], False
    backward = torch.ops.aten.max_pool2d_with_indices_backward
    with pytest.raises(IndexError, match="in a plane of 64"):
        backward(grad, pooled.to(device), *layout, indices).cpu()
    assert backward(grad, pooled.to(device), *layout, indices - 1).sum().item() == 16
