# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Views never leave the client: no operation, no byte, and the CPU's metadata."""

import pytest
import torch

import mycelya_torch

CHAINS = {
    "slice": lambda x: x[1:, 2:5],
    "step": lambda x: x[::2, 1::3],
    "select": lambda x: x[3],
    "ellipsis": lambda x: x[..., None, 2],
    "transpose": lambda x: x.t().unsqueeze(0).transpose(0, 2),
    "permute": lambda x: x.view(2, 4, 8).permute(2, 0, 1),
    "reshape": lambda x: x.reshape(4, 2, 8).view(-1),
    "expand": lambda x: x[:, :1].expand(8, 5).unsqueeze(1),
    "flatten": lambda x: x.unflatten(0, (2, 4)).flatten(1),
    "narrow": lambda x: x.narrow(1, 2, 3).squeeze(),
    "split": lambda x: x.split([3, 5])[1],
    "chunk": lambda x: x.chunk(3, dim=1)[2],
    "unbind": lambda x: x.unbind(1)[4],
    "diagonal": lambda x: x.diagonal(1),
    "unfold": lambda x: x.unfold(1, 3, 2),
    "as_strided": lambda x: x.as_strided((3, 3), (9, 1), 4),
    "movedim": lambda x: x.view(2, 2, 2, 8).movedim((0, 1), (2, 3)),
    "detach": lambda x: torch.ops.aten.alias(x.detach()),
    "dtype": lambda x: x.view(torch.int32)[2:],
    "complex": lambda x: torch.view_as_complex(x.view(8, 4, 2)).real,
    "conj": lambda x: torch.view_as_complex(x.view(8, 4, 2)).conj(),
    "imag": lambda x: torch.view_as_complex(x.view(8, 4, 2)).conj().imag,
    "adjoint": lambda x: torch.view_as_complex(x.view(8, 4, 2)).mH,
    "tensor_split": lambda x: x.tensor_split((2, 5), dim=1)[1],
}


@pytest.fixture
def pair(machine):
    """The same numbers on the CPU and on the device."""
    cpu = torch.randn(8, 8)
    return cpu, cpu.to(machine.device())


@pytest.mark.parametrize("name", CHAINS)
def test_a_view_costs_nothing(machine, pair, name):
    cpu, remote = pair
    machine.synchronize()
    machine.reset_stats()
    with mycelya_torch.forbid_sync():
        view = CHAINS[name](remote)
    stats = machine.stats()
    assert (stats.ops, stats.bytes_sent, stats.frames_sent) == (0, 0, 0)
    assert stats.queue_bytes == 0
    want = CHAINS[name](cpu)
    for what in ("shape", "dtype", "stride", "storage_offset", "is_conj", "is_neg"):
        got, expected = getattr(view, what), getattr(want, what)
        assert (got() if callable(got) else got) == (
            expected() if callable(expected) else expected
        ), what
    assert view.untyped_storage()._cdata == remote.untyped_storage()._cdata
    assert torch.equal(view.cpu(), want)


def test_a_view_shares_its_memory(pair):
    cpu, remote = pair
    for x in (cpu, remote):
        view = x[2:4].t()
        view.mul_(2)
        view[0] = 7
        x.diagonal().add_(1)
        x.view(-1)[5] += x[0, 0]
    assert torch.equal(remote.cpu(), cpu)


def test_views_have_one_storage_id(pair):
    _, remote = pair
    assert mycelya_torch.get_storage_id(remote[1:]) == mycelya_torch.get_storage_id(
        remote.t()
    )
    one, other = (
        mycelya_torch.get_metadata_hash(view) for view in (remote, remote.t())
    )
    assert one != other


def test_a_view_keeps_its_storage_alive(machine, pair):
    cpu, remote = pair
    view = remote[3:]
    del remote
    torch.ones(64, device=machine.device())
    assert torch.equal(view.cpu(), cpu[3:])


def test_gradients_pass_through_views(pair):
    grads = []
    for x in pair:
        leaf = x.detach().requires_grad_()
        view = leaf.unfold(0, 3, 2)[..., 1].t()[1:]
        (view * view).sum().backward()
        grads.append(leaf.grad.cpu())
    assert torch.equal(*grads)


def test_in_place_on_a_view_is_seen_by_autograd(pair):
    for x in pair:
        leaf = x.detach().requires_grad_()
        copy = leaf.clone()
        copy[0].zero_()
        copy.sum().backward()
        assert leaf.grad[0].sum().item() == 0
        assert leaf.grad.sum().item() == 56
        copy = leaf.clone()
        square = copy.pow(2)
        copy[0].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            square.sum().backward()


def test_one_element_moves_few_bytes(machine):
    big = torch.arange(1 << 20, dtype=torch.float32).to(machine.device())
    machine.synchronize()
    machine.reset_stats()
    assert big[5].item() == 5
    stats = machine.stats()
    assert stats.bytes_sent + stats.bytes_received <= 4 + 256


@pytest.mark.parametrize("format", [torch.channels_last, torch.contiguous_format])
def test_memory_formats(pair, format):
    cpu, remote = (x.view(2, 2, 4, 4) for x in pair)
    one = cpu.contiguous(memory_format=format)
    other = remote.contiguous(memory_format=format)
    assert other.is_contiguous(memory_format=format)
    assert other.stride() == one.stride()
    assert torch.equal(other.cpu(), one)
    assert other.cpu().stride() == one.stride()
    assert torch.relu(other).stride() == torch.relu(one).stride()


def test_resizing(pair):
    cpu, remote = (x.clone() for x in pair)
    for x in (cpu, remote):
        x.resize_(4, 4).resize_(10, 10)
        x[8:] = 1
        x.resize_as_(torch.empty(3, 3, device=x.device))
        x.set_(x.untyped_storage(), 3, (2, 5), (5, 1))
    assert torch.equal(remote.cpu(), cpu)


WRITES = {
    "add_": lambda x: x[0].expand(4, 8).add_(1),
    "copy_": lambda x: x[0].expand(4, 8).copy_(x[:4]),
    "out": lambda x: torch.add(x[0], 1, out=x.view(-1)[4:12]),
}


@pytest.mark.parametrize("name", WRITES)
def test_overlapping_writes_are_refused(pair, name):
    for x in pair:
        with pytest.raises(RuntimeError, match="single memory location"):
            WRITES[name](x).cpu()


@pytest.mark.parametrize(
    ("layout", "complaint"),
    [
        ((-1, (2,), (1,)), "offset"),
        ((1, (2,), (-1,)), "negative strides"),
        ((0, (-2,), (1,)), "negative dimension"),
        ((0, (2, 2), (1,)), "2 sizes with 1 strides"),
    ],
)
def test_set_refuses_what_no_storage_holds(device, layout, complaint):
    x = torch.ones(3, device=device)
    with pytest.raises(RuntimeError, match=complaint):
        torch.empty(0, device=device).set_(x.untyped_storage(), *layout)
