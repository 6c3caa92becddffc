# SPDX-License-Identifier: Apache-2.0
"""What a conversion did, as plain values, and as a table for people.

Costs are in the unit that the conversion was asked for; the share of the whole
model's multiply-adds stands beside it, because layers that were not converted
still cost what they did.
"""

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["ConversionSummary", "LayerSummary", "LevelSummary"]


@dataclass(frozen=True)
class LayerSummary:
    """One converted layer.

    Attributes:
        name: qualified name in the model.
        in_features: length of an input vector.
        out_features: length of an output vector.
        ranks: rank at each level; min(in, out) where it runs dense.
        forms: "dense", "prefix" or "gauge" at each level.
        expected_error: at each level the expected squared error on data like the
            calibration's, as a share of the layer's output variance, in [0, 1]; both
            weighed by what the model's output depends on.
    """

    name: str
    in_features: int
    out_features: int
    ranks: dict[float, int]
    forms: dict[float, str]
    expected_error: dict[float, float]


@dataclass(frozen=True)
class LevelSummary:
    """One level of the whole family.

    Attributes:
        cost_fraction: cost of the converted layers on the calibration data, as a
            share of their dense cost; never above the level. Nor is it for each group
            of layers that ran equally often, so it isn't on other inputs.
        model_macs_fraction: multiply-adds of the whole model, as a share of those
            it had, for one batch of the calibration data.
        resident_bytes: weights of the converted layers with this level alone, as
            after `loraven.export_static`.
    """

    cost_fraction: float
    model_macs_fraction: float
    resident_bytes: int


@dataclass(frozen=True)
class ConversionSummary:
    """What `loraven.convert` or `loraven.load` made of a model.

    Attributes:
        layers: the converted layers, in the model's order.
        skipped: for each other linear layer the reason.
        levels: the levels, ascending.
        tokens: valid calibration vectors that the layer with the most has seen.
        seconds: how long the conversion took.
        cost: "macs", "latency", "energy", or the name of the function given.
        resident_bytes: weights of the converted layers with all levels and the
            dense form together.

    Example:
        >>> layer = LayerSummary("up", 64, 96, {0.5: 24}, {0.5: "gauge"}, {0.5: 0.01})
        >>> level = LevelSummary(0.49, 0.6, 13_000)
        >>> summary = ConversionSummary((layer,), {}, {0.5: level}, 640, 1.0)
        >>> print(summary)
        1 layer converted, 0 skipped; 640 tokens, 1.0 s, 0.0 MiB with all levels
        level    cost   model  MiB alone
          0.5  0.4900  0.6000        0.0
          out x in  rank and error at 0.5   layer
             96x64  gauge     24    0.0100  up
    """

    layers: tuple[LayerSummary, ...]
    skipped: dict[str, str]
    levels: dict[float, LevelSummary]
    tokens: int
    seconds: float
    cost: str = "macs"
    resident_bytes: int = 0

    def __str__(self) -> str:
        """The whole table."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        plural = "" if len(self.layers) == 1 else "s"
        yield (
            f"{len(self.layers)} layer{plural} converted, {len(self.skipped)} skipped; "
            f"{self.tokens} tokens, {self.seconds:.1f} s, "
            f"{self.resident_bytes / 2**20:.1f} MiB with all levels"
        )
        name = "cost" if self.cost == "macs" else self.cost
        yield f"level  {name:>6}   model  MiB alone"
        for level, found in self.levels.items():
            yield (
                f"{level:>5g}  {found.cost_fraction:6.4f}  "
                f"{found.model_macs_fraction:6.4f}  {found.resident_bytes / 2**20:9.1f}"
            )
        heads = [f"rank and error at {level:g}" for level in self.levels]
        yield "  ".join([f"{'out x in':>10}", *(f"{h:<22}" for h in heads), "layer"])
        for layer in self.layers:
            cells = [f"{layer.out_features}x{layer.in_features}".rjust(10)]
            cells += [
                f"{layer.forms[level]:<6} {layer.ranks[level]:>5}  "
                f"{layer.expected_error[level]:8.4f}"
                for level in self.levels
            ]
            yield "  ".join([*cells, layer.name])
        for name, reason in self.skipped.items():
            yield f"skipped {name!r}: {reason}"
