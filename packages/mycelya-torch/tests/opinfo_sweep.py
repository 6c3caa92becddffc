# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Runs entries of PyTorch's OpInfo database on the device and on the CPU.

Decisions:
- A sample is rebuilt on both devices from its storages, so that views, overlaps,
  strides, conjugate and negative bits are the same there.
- Equal means equal to the last bit (NaN equals NaN), or an error of the same kind.
  What isn't, but lies within OpInfo's own tolerance, is counted apart.
- Sparse, quantized and nested layouts are out of scope: a sample that has one, or
  whose result on the CPU has one, is left out by its layout, not by its name.
"""

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map

SEED = 7
SAMPLES = 5
# The worst that can happen to an entry is what the entry is counted as.
OUTCOMES = (
    "none",  # the entry hasn't this mode
    "out of scope",
    "fails alike",  # every sample gives an error of the same kind on both sides
    "equal",
    "close",  # not equal, but within OpInfo's own tolerance
    "differs",
    "crash",
)


# torch wants these arguments on the CPU, on whatever device the tensor is.
LOCAL_ARGUMENTS = {"tensor_split"}


class OutOfScope(Exception):
    """A layout that the device doesn't have."""


class Differs(Exception):
    """The device's result is not the CPU's."""


@dataclass
class Result:
    """What became of one entry."""

    name: str
    outcome: str = "none"
    reason: str = ""
    samples: int = 0
    strides: str = ""  # where the values are equal, but the strides are not
    errors: int = 0  # samples that fail alike on both sides

    def worse(self, outcome: str, reason: str = "") -> None:
        if OUTCOMES.index(outcome) > OUTCOMES.index(self.outcome):
            self.outcome, self.reason = outcome, reason


def entries() -> list[Any]:
    """Return OpInfo's database; takes seconds."""
    from torch.testing._internal.common_methods_invocations import op_db

    return list(op_db)


def foreach_entries() -> list[Any]:
    """Return OpInfo's entries of operations on lists of tensors."""
    from torch.testing._internal import common_methods_invocations as all_entries

    kinds = ("binary", "other", "pointwise", "reduce", "unary")
    return [
        op for kind in kinds for op in getattr(all_entries, f"foreach_{kind}_op_db")
    ]


class Place:
    """Rebuilds tensors on a device, sharing storages as they do now."""

    def __init__(self, device: str | torch.device) -> None:
        self.device = torch.device(device)
        self.storages: dict[int, tuple[Any, torch.UntypedStorage]] = {}

    def __call__(self, tree: Any) -> Any:
        return tree_map(self.leaf, tree)

    def leaf(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.tensor(value)
        if isinstance(value, torch.device) and value.type == "cpu":
            return self.device
        if isinstance(value, torch.Generator):
            return torch.Generator(self.device).manual_seed(value.initial_seed())
        return str(self.device) if value == "cpu" else value

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device.type != "cpu":  # a bad input on the meta device
            return tensor
        in_scope(tensor)
        plain = tensor.detach()
        conjugate, negative = plain.is_conj(), plain.is_neg()
        plain = plain.conj() if conjugate else plain
        plain = torch._neg_view(plain) if negative else plain
        storage = self.storage(plain.untyped_storage())
        made = torch.empty(0, dtype=plain.dtype, device=self.device)
        layout = (plain.storage_offset(), plain.size(), plain.stride())
        made.set_(storage, *layout)
        made = made.conj() if conjugate else made
        made = torch._neg_view(made) if negative else made
        return made.requires_grad_(tensor.requires_grad)

    def storage(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        if storage._cdata not in self.storages:
            flat = torch.empty(0, dtype=torch.uint8).set_(storage)
            copy = flat.to(self.device, copy=True).untyped_storage()
            self.storages[storage._cdata] = (storage, copy)
        return self.storages[storage._cdata][1]


def in_scope(tensor: torch.Tensor) -> None:
    if tensor.layout != torch.strided:
        raise OutOfScope(str(tensor.layout))
    if tensor.is_quantized or tensor.is_nested:
        raise OutOfScope("quantized" if tensor.is_quantized else "nested")


def leaves(tree: Any) -> list[Any]:
    return tree_flatten(tree)[0]


def arguments(op: Any, place: Place, sample: Any) -> Any:
    if op.full_name in LOCAL_ARGUMENTS:
        return place(sample.input), sample.args, sample.kwargs
    return place((sample.input, sample.args, sample.kwargs))


def forward(op: Any, place: Place, sample: Any) -> Any:
    value, args, kwargs = arguments(op, place, sample)
    return op(value, *args, **kwargs)


def in_place(op: Any, place: Place, sample: Any) -> Any:
    value, args, kwargs = arguments(op, place, sample)
    return op.get_inplace()(value, *args, **kwargs), value


def gradients(op: Any, place: Place, sample: Any) -> Any:
    value, args, kwargs = arguments(op, place, sample)
    result = op.gradcheck_wrapper(op, value, *args, **kwargs)
    for tensor in tensors(result):
        in_scope(tensor)
    if sample.output_process_fn_grad is not None:
        result = sample.output_process_fn_grad(result)
    outputs = [t for t in tensors(result) if t.requires_grad]
    inputs = [t for t in tensors((value, args, kwargs)) if t.requires_grad]
    if not outputs or not inputs:
        return result
    random = torch.Generator().manual_seed(SEED)
    given = [place.tensor(random_like(t, random)) for t in outputs]
    found = torch.autograd.grad(outputs, inputs, given, allow_unused=True)
    return result, found


def random_like(tensor: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    return torch.randn(tensor.shape, dtype=tensor.dtype, generator=random)


def out_strided(op: Any, place: Place, sample: Any) -> Any:
    """Call with ``out=`` of the right size, other strides, and a value inside."""
    return with_out(op, place, sample, transposed)


def out_resized(op: Any, place: Place, sample: Any) -> Any:
    """Call with ``out=`` of size 0, which the operation has to resize."""
    return with_out(op, place, sample, empty)


def with_out(op: Any, place: Place, sample: Any, make: Callable[..., Any]) -> Any:
    expected = forward(op, Place("cpu"), sample)
    if not all(isinstance(leaf, torch.Tensor) for leaf in leaves(expected)):
        raise OutOfScope("results that are no tensors")
    torch.manual_seed(SEED)
    value, args, kwargs = arguments(op, place, sample)
    out = place(tree_map(make, expected))
    result = op(value, *args, **kwargs, out=out)
    # Some operations that write a list return None.
    pairs = zip(tensors(result), tensors(out), strict=False)
    return result, out, all(one.data_ptr() == two.data_ptr() for one, two in pairs)


def transposed(like: torch.Tensor) -> torch.Tensor:
    in_scope(like)
    return torch.full(like.shape[::-1], 3, dtype=like.dtype).permute(
        list(range(like.dim()))[::-1]
    )


def empty(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=like.dtype)


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in leaves(tree) if isinstance(leaf, torch.Tensor)]


def has_forward(op: Any) -> bool:
    return True


def has_gradient(op: Any) -> bool:
    supported = op.supported_backward_dtypes("cpu")
    return op.supports_autograd and torch.float32 in supported


def has_in_place(op: Any) -> bool:
    return op.get_inplace() is not None


def has_errors(op: Any) -> bool:
    return op.error_inputs_func is not None


def has_out(op: Any) -> bool:
    return op.supports_out


def spread(sample: Any) -> Any:
    """Give a sample's tensors gaps between their elements, if they are strided."""
    found = tensors((sample.input, sample.args, sample.kwargs))
    strided = all(tensor.layout == torch.strided for tensor in found)
    return sample.noncontiguous() if strided else sample


def permuted(sample: Any) -> Any:
    """Lay a sample's tensors out in the reverse order of their dimensions."""

    def turn(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
            return value
        order = list(range(value.dim()))[::-1]
        turned = value.detach().permute(order).contiguous().permute(order)
        return turned.requires_grad_(value.requires_grad)

    return sample.transform(turn)


@dataclass(frozen=True)
class Mode:
    """How the entries are called, and with what."""

    name: str
    dtype: torch.dtype = torch.float32
    samples: int = SAMPLES
    call: Callable[..., Any] = forward
    fits: Callable[..., bool] = has_forward
    gradients: bool = False
    layout: Callable[..., Any] | None = None
    warm: bool = False  # the device has run the same signature on other values
    errors: bool = False  # run OpInfo's bad inputs instead of the good ones


_MODES = (
    Mode("float32"),
    Mode("bfloat16", torch.bfloat16),
    Mode("float16", torch.float16),
    Mode("int64", torch.int64),
    Mode("bool", torch.bool),
    Mode("complex64", torch.complex64),
    Mode("noncontiguous", layout=spread),
    Mode("permuted", layout=permuted),
    Mode("warm", warm=True),
    Mode("backward", samples=3, call=gradients, fits=has_gradient, gradients=True),
    Mode("in-place", call=in_place, fits=has_in_place),
    Mode("out", samples=3, call=out_strided, fits=has_out),
    Mode("out-resized", samples=3, call=out_resized, fits=has_out),
    Mode("errors", fits=has_errors, errors=True),
)
MODES = {mode.name: mode for mode in _MODES}


def samples(
    op: Any, mode: Mode, reference: str = "cpu", seed: int = SEED
) -> Iterator[Any]:
    """Yield the first samples of an entry; none if it hasn't this mode.

    The forward run takes an entry without float32 in the first dtype it has.
    """
    known = op.supported_dtypes(reference)
    dtype = mode.dtype
    if dtype not in known and mode.name == "float32" and known:
        dtype = min(known, key=str)
    if dtype not in known or not mode.fits(op):
        return
    torch.manual_seed(seed)
    if mode.errors:
        yield from (error.sample_input for error in op.error_inputs("cpu"))
        return
    found = op.sample_inputs("cpu", dtype, requires_grad=mode.gradients)
    for sample in itertools.islice(found, mode.samples):
        if mode.call is in_place and sample.broadcasts_input:
            continue
        yield sample if mode.layout is None else mode.layout(sample)


def attempt(op: Any, mode: Mode, sample: Any, device: str | torch.device) -> Any:
    """Run one sample; return what came out, as `Seen`, or the exception."""
    try:
        place = Place(device)
        torch.manual_seed(SEED)
        result = mode.call(op, place, sample)
        seen = tree_map(Seen, result)
        if place.device.type == "mycelya":
            # An operation without results, or with empty ones, may fail later.
            torch.mycelya.synchronize(place.device)
        return seen
    except OutOfScope:
        raise
    except Exception as error:
        return error


class Seen:
    """A result: a tensor's values on the CPU and its strides, or a plain value."""

    def __init__(self, value: Any) -> None:
        self.is_tensor = isinstance(value, torch.Tensor)
        self.value = value
        if self.is_tensor:
            in_scope(value)
            self.stride = value.stride()
            self.bits = (value.is_conj(), value.is_neg())
            self.value = value.detach().cpu()


def tolerance(op: Any, dtype: torch.dtype) -> dict[str, float]:
    """Return the widest tolerance that OpInfo gives an entry, or torch's default."""
    from torch.testing._comparison import default_tolerances
    from torch.testing._internal.common_device_type import toleranceOverride

    rtol, atol = default_tolerances(dtype)
    for info in op.decorators:
        for one in getattr(info, "decorators", []):
            if isinstance(one, toleranceOverride) and dtype in one.d:
                atol, rtol = max(atol, one.d[dtype].atol), max(rtol, one.d[dtype].rtol)
    return {"rtol": rtol, "atol": atol}


def check_error(got: Any, want: Exception) -> None:
    text = f"CPU: {type(want).__name__}: {first_line(want)}"
    if not isinstance(got, Exception):
        raise Differs(f"no error; {text}")
    if not isinstance(got, type(want)):
        raise Differs(f"{type(got).__name__}: {first_line(got)}; {text}")


def first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def check_value(op: Any, got: Any, want: Any, result: Result) -> None:
    values, expected = leaves(got), leaves(want)
    if len(values) != len(expected):
        raise Differs(f"{len(values)} results instead of {len(expected)}")
    for one, other in zip(values, expected, strict=True):
        if one.is_tensor and other.is_tensor:
            check_tensor(op, one.value, other.value, result)
            if one.value.numel() and one.stride != other.stride:
                result.strides = f"{one.stride} instead of {other.stride}"
            if one.bits != other.bits:
                raise Differs(f"conj and neg are {one.bits} instead of {other.bits}")
        elif isinstance(other.value, torch.device) or other.value == "cpu":
            continue
        elif repr(one.value) != repr(other.value):
            raise Differs(f"{one.value!r} instead of {other.value!r}")


def check_tensor(op: Any, got: Any, want: torch.Tensor, result: Result) -> None:
    for name in ("dtype", "shape"):
        if getattr(got, name) != getattr(want, name):
            text = f"{getattr(got, name)} instead of {getattr(want, name)}"
            raise Differs(f"{name} {text}")
    if getattr(op, "has_nondeterministic_output", False):
        return
    if is_equal(got, want):
        return
    options = tolerance(op, want.dtype) | {"equal_nan": True}
    try:
        torch.testing.assert_close(got, want, **options)
    except AssertionError as error:
        raise Differs(" ".join(str(error).split())[:400]) from None
    difference = (got.to(torch.complex128) - want.to(torch.complex128)).abs()
    result.worse("close", f"by {difference.nan_to_num().max().item():.1e}")


def is_equal(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether two tensors are equal to the last bit, but for what a NaN says."""
    got, want = (one.resolve_conj().resolve_neg() for one in (got, want))
    if want.is_complex():
        got, want = torch.view_as_real(got), torch.view_as_real(want)
    if not want.is_floating_point():
        return torch.equal(got, want)
    if want.element_size() == 1:  # the 8-bit floats lack most operations
        return torch.equal(got.view(torch.uint8), want.view(torch.uint8))
    same = (got == want) & (got.signbit() == want.signbit())
    return bool((same | (got.isnan() & want.isnan())).all())


class Sweep:
    """Runs entries one by one; a dead worker costs its entry and is replaced."""

    def __init__(self, start: Callable[[], Any], reference: str = "cpu") -> None:
        """``start`` gives a running machine; None instead of it: the CPU itself."""
        self.start = start
        self.reference = reference
        self.machine = start()

    @property
    def device(self) -> str | torch.device:
        return "cpu" if self.machine is None else self.machine.device()

    def settle(self) -> bool:
        """Wait for the machine and drop deferred errors; False if it is dead."""
        if self.machine is None:
            return True
        for _ in range(3):
            try:
                self.machine.synchronize()
                return True
            except Exception:
                if not self.machine.is_running:
                    break
        self.machine.stop()
        self.machine = self.start()
        return False

    def run(self, op: Any, mode: Mode) -> Result:
        result = Result(op.full_name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if mode.warm:
                self.warm(op, mode)
            for number, sample in enumerate(samples(op, mode, self.reference)):
                try:
                    self.one(op, mode, sample, result)
                except OutOfScope as layout:
                    result.worse("out of scope", str(layout))
                except Differs as difference:
                    alive = self.settle()
                    outcome = "differs" if alive else "crash"
                    result.worse(outcome, f"sample {number}: {difference}")
        return result

    def warm(self, op: Any, mode: Mode) -> None:
        for sample in samples(op, mode, self.reference, SEED + 1):
            with contextlib.suppress(OutOfScope):
                if isinstance(attempt(op, mode, sample, self.device), Exception):
                    self.settle()

    def one(self, op: Any, mode: Mode, sample: Any, result: Result) -> None:
        want = attempt(op, mode, sample, self.reference)
        got = attempt(op, mode, sample, self.device)
        result.samples += 1
        if isinstance(want, Exception):
            check_error(got, want)
            result.errors += 1
            if not self.settle():
                raise Differs(f"the worker died; CPU: {first_line(want)}")
            result.worse("fails alike")
            return
        if isinstance(got, Exception):
            raise Differs(f"{type(got).__name__}: {first_line(got)}")
        check_value(op, got, want, result)
        result.worse("equal")

    def stop(self) -> None:
        self.machine.stop()
