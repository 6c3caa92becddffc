# SPDX-License-Identifier: Apache-2.0
"""Two plots of what a layer did. Nothing imports matplotlib before one is asked for.

Decisions: a window opens only on a backend that has windows; a figure that is
drawn is closed, so that a thousand calls keep no thousand figures.
"""

from typing import TYPE_CHECKING, Any

from torchworks_core.errors import InvalidValue, MissingExtra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_energy_efficiency", "plot_rank_evolution"]

_WITHOUT_WINDOWS = {"agg", "cairo", "pdf", "pgf", "ps", "svg", "template"}


def plot_rank_evolution(
    rank_history: list[int],
    complexity_history: list[float],
    save_path: str | None = None,
) -> None:
    """Draw the rank of each forward pass above its mean complexity score.

    Args:
        rank_history: Ranks, one for each forward pass.
        complexity_history: Mean scores in [0, 1], as many; or empty.
        save_path: File to write (its suffix is the format); None writes none.

    Raises:
        InvalidValue: The two lists differ in length.
        MissingExtra: matplotlib is not installed (an ImportError).

    Example:
        >>> import os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "ranks.png")
        >>> plot_rank_evolution([4, 8, 6], [0.1, 0.5, 0.3], save_path=path)
        >>> os.path.getsize(path) > 0
        True
    """
    if complexity_history and len(complexity_history) != len(rank_history):
        raise InvalidValue(
            f"{len(rank_history)} ranks and {len(complexity_history)} scores",
            "each forward pass has one of both",
            "Give lists of one length, or an empty complexity_history",
        )
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(2, 1, sharex=True, layout="constrained")
    axes[0].plot(rank_history, drawstyle="steps-mid")
    axes[0].set_ylabel("rank")
    axes[1].plot(complexity_history)
    axes[1].set(xlabel="forward pass", ylabel="mean complexity", ylim=(0, 1))
    _finish(pyplot, figure, save_path)


def plot_energy_efficiency(
    energy_data: dict[str, list[float]], save_path: str | None = None
) -> None:
    """Draw one line for each key of ``energy_data``.

    Args:
        energy_data: Label -> values, in mJ per sample.
        save_path: File to write (its suffix is the format); None writes none.

    Raises:
        InvalidValue: ``energy_data`` is empty.
        MissingExtra: matplotlib is not installed (an ImportError).

    Example:
        >>> import os, tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "energy.svg")
        >>> plot_energy_efficiency({"low": [0.1, 0.2], "high": [0.5]}, path)
        >>> os.path.getsize(path) > 0
        True
    """
    if not energy_data:
        raise InvalidValue(
            "energy_data={}", "it has no line to draw", "Give one list per label"
        )
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(layout="constrained")
    for label, values in energy_data.items():
        axes.plot(values, label=label)
    axes.set(xlabel="forward pass", ylabel="energy (mJ per sample)")
    axes.legend()
    _finish(pyplot, figure, save_path)


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingExtra(
            "matplotlib", "plots need it", "Run: pip install 'loraven[plot]'"
        ) from error
    return pyplot


def _finish(pyplot: Any, figure: "Figure", save_path: str | None) -> None:
    try:
        if save_path is not None:
            figure.savefig(save_path)
        if pyplot.get_backend().lower() not in _WITHOUT_WINDOWS:
            pyplot.show()
    finally:
        pyplot.close(figure)
