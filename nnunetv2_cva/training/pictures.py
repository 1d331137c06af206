"""views.png: what the network gets and gives back, of real pairs of the training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from nnunetv2_cva.datasets.pictures import Tile, middle, slice_of, tiles
from nnunetv2_cva.model.branches import Student
from nnunetv2_cva.training.objective import Prepared

SHOWN = 3  # cases


@torch.no_grad()
def draw_views(
    student: Student, batch: Prepared, titles: Sequence[str], autocast: Callable[[], AbstractContextManager], path: Path
) -> None:
    """A row per case of ``batch``, which holds the views of ``len(titles)`` cases, view-major: every view with the shared region
    framed, through its middle; what the student sees of the first; and what it makes of that, where it reconstructs.

    The student is left in evaluation mode.

    Raises:
        OSError: the picture cannot be written.
    """
    student.eval()
    cases = len(titles)
    mask = None if batch.mask is None else batch.mask[:cases]
    with autocast():
        rebuilt = student.backbone(batch.visible[:cases], mask)[2]
    tiles([(title, _row(batch, n, cases, rebuilt)) for n, title in enumerate(titles)], path)


def _row(batch: Prepared, case: int, cases: int, rebuilt: Tensor | None) -> list[Tile]:
    rois, planes = batch.rois.float().cpu().numpy(), batch.views.shape[2]
    views = len(batch.views) // cases
    at = [middle(rois[view * cases + case], planes) for view in range(views)]

    def plane(volumes: Tensor, view: int = 0) -> torch.Tensor:
        return volumes[view * cases + case, 0, at[view]].cpu()

    shown = []
    for view in range(views):
        inside, roi = plane(batch.inside, view).numpy(), rois[view * cases + case] if views > 1 else None
        title = f"view {view}, {slice_of(at[view], planes)}"
        shown.append(Tile(title, plane(batch.views, view).float().numpy(), roi, None, inside))
    first, inside = plane(batch.views).float(), plane(batch.inside).numpy()
    hidden = None if batch.hidden is None else plane(batch.hidden)
    if hidden is not None:
        shown.append(Tile("what the student sees of view 0", first.numpy(), None, hidden.numpy(), inside))
    if rebuilt is not None:
        made = plane(rebuilt).float()
        title = "view 0 as it reconstructs it" if hidden is None else "with its reconstruction of what was hidden"
        shown.append(Tile(title, (made if hidden is None else torch.where(hidden, made, first)).numpy(), None, None, inside))
    return shown
