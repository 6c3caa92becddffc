# SPDX-License-Identifier: Apache-2.0
"""A low-rank linear layer that decides for each input how much of itself to run.

The one idea: y = x V S U^T + bias with a prefix of the columns. A scorer says how
hard the input is, a scheduler proposes a rank, the energy budget caps it, gates
close blocks of columns inside the prefix, and only what is left is computed.

Decisions: S is diagonal, for a dense one adds nothing that V can't hold. Factors are
stored with the rank first, so that each prefix is contiguous. A scheduler only
proposes: the cap holds whatever it says. Training computes all columns under 0/1
masks, so that every parameter takes part in every step (as data parallelism needs)
and the value equals ``rank_scope='row'`` inference; without a price on
``expected_cost`` in the loss nothing pulls a rank down. A quarter of the training
rows run with a random rank (nested dropout; Rippel, Gelbart and Adams,
arXiv:1402.0915), so that every prefix keeps working. Histories are plain Python
lists, no buffers. Each forward reads the parameters themselves: nothing made of
weights is kept from one to the next.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from loraven.adaptive import Work, run_adaptive
from loraven.checks import number
from loraven.energy import EnergyEstimator, get_default_hardware_profile
from loraven.products import join, project
from loraven.reporting import Last, LowRankReport, wrong_sizes
from loraven.sanitize import NonFiniteGuard
from loraven.schedulers import LinearRankScheduler
from loraven.scoring import (
    GateNetwork,
    LightweightScorer,
    gate_mask,
    rank_mask,
    row_ranks,
)
from torchworks_core.errors import InvalidValue

__all__ = ["DynamicLowRankLayer", "off_graph"]

_CACHED = 256


class DynamicLowRankLayer(LowRankReport):
    """Linear layer of variable rank: ``y = x V[:, :r] S[:r, :r]^T U[:, :r]^T + bias``.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        r_max: Largest rank, at most ``min(in_features, out_features)``.
        r_min: Smallest rank; it runs even where it exceeds the budget.
        init_rank: Rank reported before the first forward; None: ``r_min``.
        bias: Whether a bias is added.
        scorer_hidden: Width of the scorer's hidden layer.
        num_gate_blocks: Number of column blocks, at most ``r_max`` are used.
            Column i belongs to block floor(i * blocks / r_max); block 0 never closes.
        device: Where the parameters live.
        dtype: Their floating-point type.

    Attributes:
        down: Parameter (r_max, in_features), rows orthonormal at first.
        scale: Parameter (r_max,), decaying at first.
        up: Parameter (r_max, out_features), rows orthonormal at first.
        bias: Parameter (out_features,) or None.
        scorer: A `LightweightScorer`.
        gate: A `GateNetwork`.
        scheduler: Proposes the rank at inference with ``rank_scope='batch'``.
        energy_model: Anything with ``estimate(layer_dims, rank, batch_size=...)`` in
            mJ for the whole batch, not falling with the rank.
        rank_scope: ``"batch"``: one rank from all scores; ``"row"``: each row's rank
            is r_min + score (r_max - r_min), whatever the other rows are.
        nan_policy: ``"sanitize"``, ``"propagate"`` or ``"raise"``.
        fixed_rank: None, or the rank to run without scorer, gates and scheduler.
        gates_enabled: False leaves all blocks open and skips the gates.
        random_rank_share: Share of training rows with a random rank, 0.25.
        expected_cost: 0-dim tensor in [0, 1], set by training mode: mean share of
            columns computed. Add ``price * expected_cost`` to the loss.
        over_budget: Whether r_min alone exceeded the last forward's budget.

    Raises:
        InvalidValue: Sizes or ranks out of range; the message names all of them.

    Example:
        >>> layer = DynamicLowRankLayer(64, 32, r_max=16)
        >>> with torch.no_grad():
        ...     y, rank = layer(torch.randn(8, 64), budget=0.01)
        >>> y.shape, 4 <= rank <= 16
        (torch.Size([8, 32]), True)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r_max: int,
        r_min: int = 4,
        init_rank: int | None = None,
        bias: bool = True,
        scorer_hidden: int = 32,
        num_gate_blocks: int = 8,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        first = r_min if init_rank is None else init_rank
        sizes = {
            "in_features": in_features,
            "out_features": out_features,
            "r_max": r_max,
            "r_min": r_min,
            "init_rank": first,
            "scorer_hidden": scorer_hidden,
            "num_gate_blocks": num_gate_blocks,
        }
        if problems := wrong_sizes(sizes):
            where = f"DynamicLowRankLayer({in_features!r}, {out_features!r})"
            raise InvalidValue(where, "; ".join(problems), "Correct all of them")
        whole = [operator.index(size) for size in sizes.values()]
        in_features, out_features, r_max, r_min, first, scorer_hidden, blocks = whole
        self.in_features, self.out_features = in_features, out_features
        self.r_max, self.r_min, self.init_rank = r_max, r_min, first
        self.num_blocks = min(blocks, r_max)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.down = nn.Parameter(torch.empty(r_max, in_features, **made))
        self.scale = nn.Parameter(torch.empty(r_max, **made))
        self.up = nn.Parameter(torch.empty(r_max, out_features, **made))
        self.bias = nn.Parameter(torch.empty(out_features, **made)) if bias else None
        self.scorer = LightweightScorer(in_features, scorer_hidden, device, dtype)
        self.gate = GateNetwork(in_features, self.num_blocks, device, dtype)
        self.scheduler: Any = LinearRankScheduler(r_min, r_max)
        self._start()
        self.reset_parameters()

    def _start(self) -> None:
        """Settings and state that are no parameters."""
        self._rank_scope = "batch"
        self.random_rank_share = 0.25
        self._guard = NonFiniteGuard()
        self._fixed_rank: int | None = None
        self._gates_enabled = True
        self._last = Last(self.init_rank)
        self._caps: dict[tuple[int, float], tuple[int, bool]] = {}
        self._energies: dict[tuple[int, int], float] = {}
        self.energy_model = EnergyEstimator(get_default_hardware_profile())

    def reset_parameters(self) -> None:
        """Draw the factors anew; scorer and gate keep their values.

        Rows of ``down`` and ``up`` are random and orthonormal; scale i is
        proportional to ``(1 + i / r_min) ** -0.5`` with the sum of squares
        ``out_features / 3``, which gives the output variance of nn.Linear.
        """
        if self.down.is_meta:
            return
        with torch.no_grad():
            for factor in (self.down, self.up):
                # QR knows no half precision.
                wide = torch.empty_like(factor, dtype=torch.float32)
                factor.copy_(nn.init.orthogonal_(wide))
            step = torch.arange(self.r_max, device=self.scale.device) / self.r_min
            decay = (1 + step).rsqrt()
            self.scale.copy_(
                decay * (self.out_features / 3 / decay.square().sum()) ** 0.5
            )
            if self.bias is not None:
                bound = self.in_features**-0.5
                nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self, x: Tensor, budget: float | None = None, mode: str = "inference"
    ) -> tuple[Tensor, int]:
        """Run the layer.

        Args:
            x: (..., in_features), any number of leading dimensions, also none.
            budget: Energy in mJ per row; no rank above ``r_min`` exceeds it. 0 runs
                ``r_min``; None is no limit.
            mode: ``"inference"`` or ``"training"``.

        Returns:
            The output (..., out_features), and the largest prefix that any row
            used. Without rows the output is empty and the rank stays.

        Raises:
            TypeError: ``x`` is no tensor or ``budget`` no number.
            InvalidValue: The last dimension differs from ``in_features``, the mode
                is unknown, or the budget is negative or not finite.
        """
        _check_call(x, mode, self.in_features)
        shape = x.shape
        flat = x if len(shape) == 2 else x.reshape(-1, shape[-1])
        rows, cap, over = flat.shape[0], self.r_max, False
        if budget is not None:
            budget = number("budget", budget)
            cap, over = off_graph(self._cap)(max(rows, 1), budget)
        self._last.over_budget = over
        fixed = self._fixed_rank
        if fixed is not None:
            y, rank = self._run_fixed(flat, min(fixed, cap), shape, mode)
        elif mode == "training":
            y, rank = self._run_training(flat, cap, shape)
        elif rows:
            y, rank = off_graph(run_adaptive)(self, flat, cap, budget, shape)
        else:
            y, rank = self._prefix(flat, self.r_min), self._last.rank
        if len(shape) != 2:
            y = y.reshape(*shape[:-1], self.out_features)
        return y, rank

    def _run_fixed(
        self, x: Tensor, rank: int, shape: torch.Size, mode: str
    ) -> tuple[Tensor, int]:
        x, last = self._guard.clean(x, shape), self._last
        if mode == "training":
            y = self._product(x, slice(0, rank), None)
            last.cost = torch.full((), rank / self.r_max, device=y.device)
        else:
            y = self._prefix(x, rank)
        if not x.shape[0]:
            return y, last.rank
        last.rank = rank
        last.work = Work(rank, mode != "training", False, False)
        return y, rank

    def _run_training(
        self, x: Tensor, cap: int, shape: torch.Size
    ) -> tuple[Tensor, int]:
        x = self._guard.clean(x, shape)
        rows = x.shape[0]
        scores = self.scorer(x).reshape(-1)
        ranks = row_ranks(scores, self.r_min, self.r_max, cap)
        if self.random_rank_share:
            lucky = torch.rand_like(ranks) < self.random_rank_share
            chosen = torch.randint_like(ranks, self.r_min, cap + 1)
            ranks = torch.where(lucky, chosen, ranks)
        temperature = max((self.r_max - self.r_min) / 16, 0.5)
        mask = rank_mask(ranks, self.r_max, temperature)
        if self._gates_enabled:
            mask = mask * gate_mask(self.gate(x), self.r_max)
        self._last.cost = mask.sum() / (max(rows, 1) * self.r_max)
        y = self._product(x, slice(None), mask)
        if not rows:
            return y, self._last.rank
        mean = scores.detach().float().nan_to_num(1.0).mean()
        used = (ranks.detach().max() + 0.5).floor()
        return y, off_graph(self._note_training)(torch.stack([used, mean]))

    def _note_training(self, used_and_mean: Tensor) -> int:
        guard = self._guard
        counted = guard.counted(used_and_mean.device)
        used, mean, count = torch.cat([used_and_mean, counted]).tolist()
        guard.warn(int(count))
        work = Work(self.r_max, False, True, self._gates_enabled)
        self._last.note(int(used), work, mean)
        return int(used)

    def _prefix(self, x: Tensor, rank: int) -> Tensor:
        """The first ``rank`` columns, by the cheaper order of multiplication."""
        if torch.compiler.is_compiling() or not self._merges(rank, x.shape[0]):
            return self._product(x, slice(0, rank), None)
        with torch.autocast(x.device.type, enabled=False):
            down = self.down[:rank] * self.scale[:rank, None]
            weight = down.t() @ self.up[:rank]
        return join(self.bias, x, weight)

    def _product(
        self, x: Tensor, columns: slice | Tensor, mask: Tensor | None
    ) -> Tensor:
        """The factors' product over some columns."""
        down, scale, up = self.down, self.scale, self.up
        z = project(x, down[columns]) * scale[columns]
        if mask is not None:
            z = z * mask.to(z.dtype)
        return join(self.bias, z, up[columns])

    def energy(self, rank: int, batch_size: int = 1) -> float:
        """Energy of one forward of the whole batch at ``rank``, in mJ.

        The factors alone, by ``energy_model``: scorer and gates are not in it.

        Args:
            rank: From 1 to ``r_max``.
            batch_size: Rows, at least 1.
        """
        key = rank, batch_size
        found = self._energies.get(key)
        if found is None:
            dims = self.in_features, self.out_features
            found = self._energy_model.estimate(dims, rank, batch_size=batch_size)
            found = number("energy_model.estimate()", found)
            if len(self._energies) >= _CACHED:
                self._energies.clear()
            self._energies[key] = found
        return found

    def _cap(self, rows: int, budget: float) -> tuple[int, bool]:
        """Largest rank within the budget, at least r_min; and whether that exceeds."""
        key = rows, budget
        found = self._caps.get(key)
        if found is None:
            found = self._bisect(rows, budget)
            if len(self._caps) >= _CACHED:
                self._caps.clear()
            self._caps[key] = found
        return found

    def _bisect(self, rows: int, budget: float) -> tuple[int, bool]:
        def fits(rank: int) -> bool:
            return self.energy(rank, rows) / rows <= budget

        if not fits(self.r_min):
            return self.r_min, True
        if fits(self.r_max):
            return self.r_max, False
        inside, outside = self.r_min, self.r_max
        while outside - inside > 1:
            middle = (inside + outside) // 2
            inside, outside = (middle, outside) if fits(middle) else (inside, middle)
        return inside, False


def _check_call(x: Any, mode: Any, in_features: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a Tensor, not {type(x).__name__}")
    shape = x.shape
    if not shape or shape[-1] != in_features:
        raise InvalidValue(
            f"x of shape {tuple(shape)}",
            f"its last dimension must be in_features={in_features}",
            "Give a tensor of shape (..., in_features)",
        )
    if mode not in ("inference", "training"):
        raise InvalidValue(
            f"mode={mode!r}", "it is unknown", "Use 'inference' or 'training'"
        )


def off_graph(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep what reads data on the host, or Python state, out of compiled graphs."""
    if not torch.compiler.is_compiling():
        return function
    return functools.partial(_uncompiled, function)


# torch.compiler.disable would import torch._dynamo, a second or more, right here.
@_disable_dynamo
def _uncompiled(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)
