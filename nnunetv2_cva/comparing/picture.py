"""Learning curves of a comparison."""

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
from nnunetv2_cva.comparing.report import Comparison, Score
from nnunetv2_cva.files import written_whole

COLOURS = ("#666666", "#1f77b4", "#d1495b", "#2e8b57", "#b8860b", "#7d5ba6", "#17a2b8")


def write_curves(
    path: Path, scores: Mapping[Job, Score], found: Sequence[Comparison], arms: Sequence[str], labels: Sequence[int]
) -> None:
    """Dice against iterations, one panel per number of labels; the last panel has the differences at the end."""
    with rc_context():
        rcdefaults()
        figure = Figure(figsize=(3.4 * (len(labels) + 1), 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(labels) + 1, squeeze=False)[0]
        for ax, k in zip(axes, labels):
            _curves(ax, scores, arms, k)
            ax.sharey(axes[0])
        axes[0].set_ylabel("Dice on the test cases")
        handles, names = axes[0].get_legend_handles_labels()
        _differences(axes[-1], found, arms, labels)
        figure.legend(handles, names, loc="outside lower center", ncols=len(arms), frameon=False)
        with written_whole(path) as partial:
            figure.savefig(partial, format="png", dpi=130)


def _curves(ax: Axes, scores: Mapping[Job, Score], arms: Sequence[str], labels: int) -> None:
    """Thin: every split; thick: their mean."""
    for colour, arm in zip(_colours(arms), arms):
        mine = [s.curve for job, s in scores.items() if job.arm == arm and job.labels == labels]
        for curve in mine:
            ax.plot(*zip(*curve), color=colour, alpha=0.3, linewidth=0.8)
        if mine:
            iterations = [n for n, _ in mine[0]]
            mean = np.mean([[dice for _, dice in curve] for curve in mine], axis=0)
            ax.plot(iterations, mean, color=colour, linewidth=2.2, marker="o", markersize=3, label=arm)
    ax.set(title=f"{labels} labelled case{'s' if labels > 1 else ''}", xlabel="iterations", ylim=(0, None))
    ax.grid(alpha=0.25)


def _differences(ax: Axes, found: Sequence[Comparison], arms: Sequence[str], labels: Sequence[int]) -> None:
    """Mean paired difference from scratch at the end, with its interval."""
    against = [c for c in found if c.against == SCRATCH and c.measure == "dice" and c.labels is not None]
    for n, (colour, arm) in enumerate(list(zip(_colours(arms), arms))[1:]):
        for c in (c for c in against if c.arm == arm):
            assert c.labels is not None
            place = labels.index(c.labels) + 0.15 * (n - (len(arms) - 2) / 2)
            p = c.found
            errors: Any = None if p.low is None or p.high is None else [[p.mean - p.low], [p.high - p.mean]]
            ax.errorbar([place], [p.mean], errors, color=colour, marker="o", markersize=4, capsize=3)
    ax.axhline(0, color=COLOURS[0], linewidth=1)
    ax.set(title="difference from scratch,\n95 % interval", xlabel="labelled cases")
    ax.set_xticks(range(len(labels)), [str(k) for k in labels])
    ax.set_xlim(-0.5, len(labels) - 0.5)
    ax.grid(alpha=0.25, axis="y")


def _colours(arms: Sequence[str]) -> list[str]:
    return [COLOURS[n % len(COLOURS)] for n in range(len(arms))]
