# SPDX-License-Identifier: Apache-2.0
"""One flat KV cache for all stacks, and state that travels in it as layers.

Beam search reorders, repeats and selects the batch through every layer of a
transformers ``Cache``; state kept as a layer at the end gets this for free.
Slot 0 is always an attention layer: ``get_seq_length`` reads it.
"""

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from mol.errors import InvalidValue

__all__ = [
    "KEPT_STEPS",
    "FlatCache",
    "GateLayer",
    "RunningMeanLayer",
    "StateLayer",
    "attention_layers",
    "view",
]

KEPT_STEPS = 64


class StateLayer:
    """Tensors by name, each with the batch first, behind the layer interface.

    A plain class: ``CacheLayerMixin`` would make the mask code take it for
    attention, and transformers 5.17 has no ``DummyLayer``. For ``crop`` the
    states after each of the latest 64 positions of the latest call are kept.
    """

    is_initialized = True
    is_sliding = is_compileable = supports_early_init = False
    is_croppable = True
    keys = values = None
    max_cache_len = max_batch_size = -1

    def __init__(self) -> None:
        self.state: dict[str, Tensor] | None = None
        self._before: dict[str, Tensor] | None = None
        self._after: list[dict[str, Tensor]] = []
        self._reaches_start = True

    def record(self, steps: int, at: Callable[[int], dict[str, Tensor]]) -> None:
        """Take the states of a call: ``at(t)`` is the one after position t."""
        first = max(0, steps - KEPT_STEPS)
        self._reaches_start = first == 0
        self._before = self.state
        self._after = [at(t) for t in range(first, steps)]
        self.state = self._after[-1]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the latest ``-tokens_to_remove`` positions (never positive).

        Raises:
            InvalidValue: for more positions than the latest call had, or 64.
        """
        drop = -tokens_to_remove
        if drop < 0:
            raise InvalidValue(
                f"crop({tokens_to_remove}) is positive",
                "caches take the number of tokens to remove, negated",
                f"Call crop(-{tokens_to_remove})",
            )
        if drop == 0 or self.state is None:
            return
        if drop > len(self._after) - (not self._reaches_start):
            raise InvalidValue(
                f"crop(-{drop}) reaches too far back",
                f"state is kept for the latest {len(self._after)} positions",
                "Crop less, or start again with a new cache",
            )
        self._after = self._after[: len(self._after) - drop]
        self.state = self._after[-1] if self._after else self._before

    def reset(self) -> None:
        """Back to an empty sequence."""
        self.__init__()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows of the batch, as beam search does after each step."""
        self._each(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self._each(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` of the batch."""
        self._each(lambda t: t[indices])

    def get_max_length(self) -> int:
        """No limit of its own."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The name of ``get_max_length`` in earlier releases."""
        return -1

    def get_seq_length(self) -> int:
        """Holds no keys, so nothing to count."""
        return 0

    def offload(self) -> None:
        """Too small to move."""

    def prefetch(self) -> None:
        """Never moved away."""

    def activate_past_recording(self) -> None:
        """The latest call is always recorded."""

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        def changed(state: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: change(t) for name, t in state.items()}

        if self.state is not None:
            self.state = changed(self.state)
        if self._before is not None:
            self._before = changed(self._before)
        self._after = [changed(state) for state in self._after]


class RunningMeanLayer(StateLayer):
    """Sum [B, 1, d] and count [B, 1, 1] of the stream, for ``SimpleRouter``."""

    def extend(self, total: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """Add what earlier calls summed, and remember the new sums.

        Args:
            total: [B, T, d], running sums of this call alone.
            count: [B, T, 1], running counts of this call alone.
        """
        if self.state is not None:
            total = total + self.state["total"]
            count = count + self.state["count"]
        sums = total.detach(), count.detach()
        self.record(
            total.shape[1],
            lambda t: {
                "total": sums[0][:, t : t + 1].clone(),
                "count": sums[1][:, t : t + 1].clone(),
            },
        )
        return total, count


class GateLayer(StateLayer):
    """State of the Bayes gate.

    ``log_weight`` [B, E], ``last`` [B, E, V] (log-probabilities after the
    latest token) and ``valid`` [B] (whether that token was real).
    """


class FlatCache(Cache):
    """The layers of all stacks in one list, state layers at the end."""


def attention_layers(config: PreTrainedConfig) -> list:
    """The cache layers that a backbone of this configuration needs."""
    return DynamicCache(config=config).layers


def view(cache: Cache | None, offset: int, length: int) -> Cache | None:
    """A cache over ``length`` of the flat cache's layers, sharing the objects."""
    if cache is None:
        return None
    return Cache(layers=cache.layers[offset : offset + length])
