"""views.png: what the network gets and gives back, of real pairs of the training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunetv2_cva.files import written_whole
from nnunetv2_cva.model.branches import Student
from nnunetv2_cva.training.objective import Prepared

SHOWN = 3  # cases
SHARED = "#ffb000"


@torch.no_grad()
def draw_views(student: Student, batch: Prepared, cases: int, autocast: Callable[[], AbstractContextManager], path: Path) -> None:
    """A row per case of ``batch``, which holds the views of ``cases`` cases, view-major: every view with the shared region
    framed, through its middle; what the student sees of the first; and its reconstruction, where it reconstructs.

    The student is left in evaluation mode.

    Raises:
        OSError: the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    student.eval()
    chosen = torch.arange(min(SHOWN, cases), device=batch.views.device)
    mask = None if batch.mask is None else batch.mask[chosen]
    with autocast():
        rebuilt = student.backbone(batch.visible[chosen], mask)[2]
    views = len(batch.views) // cases
    panels = [_panels(batch, int(c), cases, views, None if rebuilt is None else rebuilt[c]) for c in chosen]
    figure = Figure(figsize=(2.4 * len(panels[0]), 2.6 * len(panels)), facecolor="black", layout="constrained")
    FigureCanvasAgg(figure)
    for r, row in enumerate(panels):
        low, high = np.percentile(row[0][1], (1, 99.5))
        for c, (title, plane, roi) in enumerate(row):
            axes = figure.add_subplot(len(panels), len(row), r * len(row) + c + 1)
            axes.imshow(plane, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
            axes.set_title(title, fontsize=7, color="white", pad=2)
            axes.set_axis_off()
            if roi is not None:
                _frame(axes, roi, plane.shape)
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=90, format="png")


def _panels(batch: Prepared, case: int, cases: int, views: int, rebuilt: Tensor | None) -> list[tuple[str, np.ndarray, Any]]:
    rois = batch.rois.float().cpu().numpy()
    shown = []
    for view in range(views):
        n = view * cases + case
        at = int(np.clip(rois[n, :, 0].mean() * batch.views.shape[2], 0, batch.views.shape[2] - 1))
        shown.append((f"view {view}", _plane(batch.views[n], at), rois[n, :, 1:] if views > 1 else None))
        if view == 0:
            first = at
    if batch.mask is not None:
        shown.append(("what the student sees", _plane(batch.visible[case], first), None))
    if rebuilt is not None:
        shown.append(("its reconstruction", _plane(rebuilt, first), None))
    return shown


def _plane(volume: Tensor, at: int) -> np.ndarray:
    return volume[0, at].float().cpu().numpy()


def _frame(axes: Any, roi: np.ndarray, size: tuple[int, ...]) -> None:
    from matplotlib.patches import Rectangle

    begin, end = (roi[side] * size - 0.5 for side in (0, 1))  # imshow centres pixel n at n
    low, extent = np.minimum(begin, end), np.abs(end - begin)
    axes.add_patch(Rectangle((low[1], low[0]), extent[1], extent[0], fill=False, edgecolor=SHARED, linewidth=1.5))
