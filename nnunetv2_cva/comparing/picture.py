"""Learning curves of a comparison, and its differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context, rcdefaults
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nnunetv2_cva.comparing.design import SCRATCH, Job
from nnunetv2_cva.comparing.report import END, WAY, Comparison, Curve, Score
from nnunetv2_cva.files import written_whole

COLOURS = ("#666666", "#1f77b4", "#d1495b", "#2e8b57", "#b8860b", "#7d5ba6", "#17a2b8")


def write_curves(
    path: Path, scores: Mapping[Job, Score], found: Sequence[Comparison], arms: Sequence[str], labels: Sequence[int]
) -> None:
    """Dice against iterations, one column per number of labels: mean over structures above, of all foreground below. The last
    column has what the tables say: differences at the end, and along the way."""
    with rc_context():
        rcdefaults()
        figure = Figure(figsize=(3.4 * (len(labels) + 1), 6.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, len(labels) + 1, squeeze=False)
        curves = [{job: s.curve for job, s in scores.items()}, {job: s.foreground for job, s in scores.items()}]
        for row, of_jobs in zip(axes, curves):
            for ax, k in zip(row, labels):
                _curves(ax, of_jobs, arms, k)
                ax.sharey(row[0])
            row[0].set_ylim(0, None)  # when all is drawn: from here on the upper end is fixed for the row
        for row, what in zip(axes, ("Dice, mean over structures", "Dice of all foreground as one")):
            row[0].set_ylabel(what)
        for ax, k in zip(axes[0], labels):
            ax.set_title(f"{k} labelled case{'s' if k > 1 else ''}")
        for row, measure, what in zip(axes, (END, WAY), ("at the end", "along the way")):
            _differences(row[-1], [c for c in found if c.measure == measure], arms, labels)
            row[-1].set_title(f"{what}: difference\nfrom scratch, 95 % interval")
        for ax in axes[1]:
            ax.set_xlabel("iterations" if ax is not axes[1, -1] else "labelled cases")
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(arms), frameon=False)
        with written_whole(path) as partial:
            figure.savefig(partial, format="png", dpi=130)


def _curves(ax: Axes, curves: Mapping[Job, Curve], arms: Sequence[str], labels: int) -> None:
    """Thin: every split; thick: their mean."""
    for colour, arm in zip(_colours(arms), arms):
        mine = [curve for job, curve in curves.items() if job.arm == arm and job.labels == labels]
        for curve in mine:
            ax.plot(*zip(*curve), color=colour, alpha=0.3, linewidth=0.8)
        if mine:
            iterations = [n for n, _ in mine[0]]
            mean = np.mean([[dice for _, dice in curve] for curve in mine], axis=0)
            ax.plot(iterations, mean, color=colour, linewidth=2.2, marker="o", markersize=3, label=arm)
    ax.grid(alpha=0.25)


def _differences(ax: Axes, found: Sequence[Comparison], arms: Sequence[str], labels: Sequence[int]) -> None:
    """Mean paired difference from scratch, with its interval."""
    against = [c for c in found if c.against == SCRATCH and c.labels is not None]
    for n, (colour, arm) in enumerate(list(zip(_colours(arms), arms))[1:]):
        for c in (c for c in against if c.arm == arm):
            assert c.labels is not None
            place = labels.index(c.labels) + 0.15 * (n - (len(arms) - 2) / 2)
            p = c.found
            errors: Any = None if p.low is None or p.high is None else [[p.mean - p.low], [p.high - p.mean]]
            ax.errorbar([place], [p.mean], errors, color=colour, marker="o", markersize=4, capsize=3)
    ax.axhline(0, color=COLOURS[0], linewidth=1)
    ax.set_xticks(range(len(labels)), [str(k) for k in labels])
    ax.set_xlim(-0.5, len(labels) - 0.5)
    ax.grid(alpha=0.25, axis="y")


def _colours(arms: Sequence[str]) -> list[str]:
    return [COLOURS[n % len(COLOURS)] for n in range(len(arms))]
