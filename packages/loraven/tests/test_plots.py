# SPDX-License-Identifier: Apache-2.0
import subprocess
import sys

import pytest
import torch

from loraven import (
    DynamicLowRankLayer,
    plot_energy_efficiency,
    plot_rank_evolution,
    plots,
)


@pytest.fixture
def shown(monkeypatch):
    """Names of the backends on which a window was asked for."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    calls = []
    monkeypatch.setattr(pyplot, "show", lambda: calls.append("show"))
    yield calls
    assert pyplot.get_fignums() == []


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_files_are_written_and_no_window_opens(shown, tmp_path, suffix):
    path = tmp_path / f"ranks.{suffix}"
    assert plot_rank_evolution([1, 2, 3], [0.1, 0.2, 0.3], str(path)) is None
    other = tmp_path / f"energy.{suffix}"
    assert plot_energy_efficiency({"a": [1.0, 2.0], "b": [3.0]}, other) is None
    assert path.stat().st_size > 500
    assert other.stat().st_size > 500
    plot_rank_evolution([1, 2], [])
    assert shown == []


def test_windows_open_where_there_are_windows(shown, monkeypatch):
    from matplotlib import pyplot

    monkeypatch.setattr(pyplot, "get_backend", lambda: "QtAgg")
    plot_energy_efficiency({"a": [1.0]})
    assert shown == ["show"]


def test_lines_and_labels(shown, monkeypatch):
    from matplotlib import pyplot

    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    plot_energy_efficiency({"low": [1.0, 2.0], "high": [3.0]})
    axes = figures[0].axes[0]
    assert [line.get_label() for line in axes.lines] == ["low", "high"]
    assert [list(line.get_ydata()) for line in axes.lines] == [[1.0, 2.0], [3.0]]
    plot_rank_evolution([4, 8], [0.1, 0.9])
    upper, lower = figures[1].axes
    assert list(upper.lines[0].get_ydata()) == [4, 8]
    assert list(lower.lines[0].get_ydata()) == [0.1, 0.9]
    monkeypatch.undo()
    pyplot.close("all")


def test_wrong_data(shown):
    with pytest.raises(ValueError, match="2 ranks and 1 scores"):
        plot_rank_evolution([1, 2], [0.1])
    with pytest.raises(ValueError, match="no line"):
        plot_energy_efficiency({})


def test_a_layer_draws_its_own_history(shown, tmp_path):
    layer = DynamicLowRankLayer(16, 16, r_max=8)
    layer(torch.randn(2, 16))
    layer.visualize_rank_history(str(tmp_path / "own.png"))
    assert (tmp_path / "own.png").stat().st_size > 500
    layer.visualize_rank_history()


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (
        lambda: plot_rank_evolution([1], [0.1]),
        lambda: plot_energy_efficiency({"a": [1.0]}),
    ):
        with pytest.raises(ImportError, match=r"pip install 'loraven\[plot\]'"):
            draw()


def test_importing_does_not_import_matplotlib():
    code = "import sys, loraven; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert plots.__doc__
