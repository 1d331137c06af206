"""progress.png: the metrics over the epochs, beside what they would be without learning, with the verdict above."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.files import written_whole
from nnunetv2_cva.seeing.verdict import verdict
from nnunetv2_cva.training.metrics import PARTS, RATE, SHARES, is_loss, panels

COLOURS = {"LEARNING": "#1b7837", "PLATEAU": "#8c510a", "COLLAPSING": "#c51b1b", "COLLAPSED": "#c51b1b", "TOO EARLY": "#555555"}
REFERENCES = {"_null": "--", "_start": ":", "_chance": ":"}  # what a curve of the same colour is to be compared with
ADDS_UP = 1e-3  # of the total


def draw_curves(epochs: Sequence[dict[str, Any]], config: CVAConfig, path: Path) -> None:
    """Draw the panels of the table of metrics for ``epochs``, of which there is at least one; ``config``: of their run.

    Every axis but the learning rate's begins at 0, or lower where the values do: noise does not look like a collapse. The style
    is matplotlib's own, as nnU-Net's plots leave seaborn's large fonts behind.

    Raises:
        OSError: the picture cannot be written.
    """
    from matplotlib import rc_context, rcdefaults

    with rc_context():
        rcdefaults()
        figure = _figure(epochs, config)
        with written_whole(path) as partial:
            figure.savefig(partial, dpi=100, format="png")


def _figure(epochs: Sequence[dict[str, Any]], config: CVAConfig) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = panels(epochs[-1])
    rows = -(-len(shown) // 2)
    figure = Figure(figsize=(13, 3.6 * rows + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, names) in zip(figure.subplots(rows, 2, squeeze=False).flat, shown.items()):
        draw_panel(axes, title, names, epochs, config)
    found = verdict(epochs)
    words = f"{found.state} after {epochs[-1]['epoch'] + 1} epochs: {found.reason}"
    figure.suptitle("\n".join(textwrap.wrap(words, 110)), color=COLOURS[found.state])
    return figure


def draw_panel(axes: Any, title: str, names: Sequence[str], epochs: Sequence[dict[str, Any]], config: CVAConfig) -> None:
    """One of the panels of ``metrics.panels`` into ``axes`` of matplotlib. The legend lies below, where it hides no curve."""
    from matplotlib.ticker import MaxNLocator

    if title == PARTS:
        _parts(axes, epochs, config)
    else:
        _lines(axes, epochs, names)
    if title == SHARES and config.needs_second_view:
        axes.axhspan(*config.overlap, color="tab:blue", alpha=0.12, lw=0, label="overlap that is drawn")
    lowest = min(0.0, *(float(np.min(line.get_ydata())) for line in axes.lines)) if axes.lines else 0.0
    axes.set(title=title, xlabel="epoch")
    if title == SHARES:
        axes.set_ylim(0, 1)
    elif title != RATE:
        axes.set_ylim(bottom=lowest * 1.05)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(-0.5, max(e["epoch"] for e in epochs) + 0.5)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=3, frameon=False)


def _points(epochs: Sequence[dict[str, Any]], name: str, weight: float = 1.0) -> tuple[list[int], list[float]]:
    found = [(e["epoch"], weight * e[name]) for e in epochs if name in e]
    return [n for n, _ in found], [v for _, v in found]


def _lines(axes: Any, epochs: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Every metric with its references in the same colour."""
    colours: dict[str, str] = {}
    for name in names:
        x, y = _points(epochs, name)
        if not x:
            continue
        ending = next((e for e in REFERENCES if name.endswith(e)), "")
        of = name.removesuffix(ending).removesuffix("_loss")
        colour = colours.setdefault(of, f"C{len(colours)}")
        if ending:
            axes.plot(x, y, REFERENCES[ending], color=colour, lw=1.2, marker="_" if len(x) == 1 else None, label=name)
        else:
            axes.plot(x, y, color=colour, marker="." if len(x) < 30 else None, label=name)


def _parts(axes: Any, epochs: Sequence[dict[str, Any]], config: CVAConfig) -> None:
    """What every loss contributes to the total, one upon the other; only the total where they do not add up to it (an objective
    from outside)."""
    x, total = _points(epochs, "total_loss")
    names = [n for n in epochs[-1] if is_loss(n) and n not in ("total_loss", "watched_loss")]
    weights = {n: float(getattr(config, f"{n.removesuffix('_loss')}_weight", 0.0)) for n in names}
    parts = [_points(epochs, n, w)[1] for n, w in weights.items()]
    if parts and all(len(p) == len(x) for p in parts) and np.allclose(np.sum(parts, axis=0), total, rtol=ADDS_UP, atol=1e-6):
        labels = [f"{w:g} x {n}" for n, w in weights.items()]
        axes.stackplot(x, parts, labels=labels, alpha=0.5, colors=[f"C{n}" for n in range(len(parts))])
    axes.plot(x, total, color="black", marker="." if len(x) < 30 else None, label="total_loss")
    x, watched = _points(epochs, "watched_loss")
    if x:
        axes.plot(x, watched, "--", color="black", lw=1.2, label="watched_loss")
