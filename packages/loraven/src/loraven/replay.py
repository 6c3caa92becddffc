# SPDX-License-Identifier: Apache-2.0
"""Run a model again and again without the blocks whose outputs are known.

To try a change in one layer, everything before it is computed in vain. The items of
the outermost ModuleLists and Sequentials give back what they gave in the first run,
if they ended before the layer began. It is only a short way: blocks that run twice,
return more than tensors, or whose output is written into later are left out, and if
one run over the known blocks differs in one bit, nothing is skipped at all.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loraven.batches import Output, main_output, run

__all__ = ["Replay"]

# Bytes of outputs that are kept.
_LIMIT = 1 << 30


class Replay:
    """First runs of a model over some batches, and shorter ones after them.

    Args:
        model: in evaluation mode, without gradients, until the last run.
        batches: what it runs on.
        layers: the layers that will be changed, one at a time.
        output: see `loraven.batches.main_output`.

    Attributes:
        reference: the model's output for each batch.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        >>> with torch.no_grad():
        ...     replay = Replay(model, [torch.ones(1, 2)], [model[1]])
        ...     again = replay.run(model[1])
        >>> torch.equal(again[0], replay.reference[0]), len(replay.before(model[1]))
        (True, 1)
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        layers: Sequence[nn.Module],
        output: Output = None,
    ) -> None:
        self.model, self.batches, self.output = model, batches, output
        # For each batch: when a layer began, when a block ended and with what.
        self._begun: list[dict[nn.Module, int]] = []
        self._ended: list[dict[nn.Module, tuple[int, Any]]] = []
        self._blocks = _blocks(model)
        self.reference = [self._first(batch, layers) for batch in batches]
        if not self._holds(layers):
            self._blocks = []

    def before(self, layer: nn.Module) -> list[nn.Module]:
        """The blocks that are known when ``layer`` begins, in every batch."""
        runs = list(zip(self._begun, self._ended, strict=True))
        return [
            block
            for block in self._blocks
            if all(
                block in ended and layer in begun and ended[block][0] < begun[layer]
                for begun, ended in runs
            )
        ]

    def run(self, layer: nn.Module) -> list[Tensor]:
        """The outputs for all batches, computed from the first block with ``layer``."""
        known = self.before(layer)
        return [self._again(number, known) for number in range(len(self.batches))]

    def _again(self, number: int, known: Sequence[nn.Module]) -> Tensor:
        with _given({block: self._ended[number][block][1] for block in known}):
            return main_output(run(self.model, self.batches[number]), self.output)

    def _first(self, batch: Any, layers: Sequence[nn.Module]) -> Tensor:
        clock, size = (
            0,
            sum(_size(found) for e in self._ended for _, found in e.values()),
        )
        begun: dict[nn.Module, int] = {}
        ended: dict[nn.Module, tuple[int, Any]] = {}
        versions: dict[nn.Module, list[int]] = {}
        twice: set[nn.Module] = set()

        def begin(layer: nn.Module, _: tuple) -> None:
            nonlocal clock
            clock += 1
            begun.setdefault(layer, clock)

        def end(block: nn.Module, _: tuple, found: Any) -> None:
            nonlocal clock, size
            clock += 1
            if block in ended or block in twice:
                twice.add(block)
            elif (tensors := _parts(found)) and size + _size(found) <= _LIMIT:
                size += _size(found)
                ended[block] = clock, found
                versions[block] = [tensor._version for tensor in tensors]
            else:
                twice.add(block)

        with ExitStack() as stack:
            for layer in layers:
                stack.callback(layer.register_forward_pre_hook(begin).remove)
            for block in self._blocks:
                stack.callback(block.register_forward_hook(end).remove)
            reference = main_output(run(self.model, batch), self.output)
        for block, (_, found) in list(ended.items()):
            changed = [tensor._version for tensor in _parts(found)] != versions[block]
            if block in twice or changed:
                del ended[block]
        self._begun.append(begun)
        self._ended.append(ended)
        return reference

    def _holds(self, layers: Sequence[nn.Module]) -> bool:
        """Whether the short way gives the same bits, for the layer that skips most."""
        if not self._blocks or not self.batches:
            return False
        last = max(layers, key=lambda layer: len(self.before(layer)))
        try:
            again = self._again(0, self.before(last))
        except Exception:
            # Whatever a model does with a block that does not run: it runs, then.
            return False
        return torch.equal(again, self.reference[0])


@contextmanager
def _given(outputs: dict[nn.Module, Any]) -> Iterator[None]:
    """Let each module return what is given for it; its hooks fire as ever."""
    try:
        for module, found in outputs.items():
            vars(module)["forward"] = lambda *_, found=found, **__: found
        yield
    finally:
        for module in outputs:
            vars(module).pop("forward", None)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The items of the outermost lists of modules."""
    found: list[nn.Module] = []
    queue = [model]
    while queue:
        module = queue.pop(0)
        items = list(module.children())
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(items) > 1:
            found += [item for item in items if "forward" not in vars(item)]
        else:
            queue += items
    return found


def _parts(found: Any) -> list[Tensor]:
    """The tensors of an output, or nothing where there is more than tensors in it."""
    parts = list(found) if type(found) in (tuple, list) else [found]
    fine = all(part is None or isinstance(part, Tensor) for part in parts)
    return [part for part in parts if part is not None] if fine else []


def _size(found: Any) -> int:
    return sum(tensor.nbytes for tensor in _parts(found))
