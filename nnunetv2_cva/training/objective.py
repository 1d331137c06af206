"""From a batch to the recipe's losses: augment, hide, compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nnunetv2_cva import losses
from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.seeding import stream, torch_seed
from nnunetv2_cva.training.device import Share
from nnunetv2_cva.views.augment import augment
from nnunetv2_cva.views.masking import draw_mask, expand_mask, hide


@dataclass(frozen=True)
class Prepared:
    """A batch on the device, augmented. N view-major views; ``visible``: the views with hidden voxels 0; ``mask``: hidden blocks
    (N, gi, gj, gk); ``hidden``: hidden voxels (N, 1, I, J, K). Both None when nothing is hidden."""

    views: Tensor
    rois: Tensor
    inside: Tensor
    visible: Tensor
    mask: Tensor | None
    hidden: Tensor | None


def prepare(
    batch: dict[str, Any],
    config: CVAConfig,
    block: tuple[int, int, int],
    device: torch.device,
    *seed: int,
    share: Share | None = None,
) -> Prepared:
    """Augment the loader's batch and draw its masks, all from ``seed``. On a CPU the batch's views are changed in place.

    ``share``: which cases of the step the batch has, None: all. Masks and what is done to intensities are drawn for the whole
    step, so that they do not depend on the number of processes; the noise itself does.
    """
    # Without waiting only from pinned memory: the loader writes into the batch's own memory again.
    at_once = device.type == "cuda"
    views, rois, inside = (batch[name].to(device, non_blocking=at_once) for name in ("views", "rois", "inside"))
    per_case = 2 if config.needs_second_view else 1
    share = share or Share((len(views) // per_case,))
    noise = torch.Generator(device).manual_seed(torch_seed("noise", *seed, share.rank))
    part = (share.begin, share.end, share.total)
    views = augment(views, config, stream("intensities", *seed), noise, part)
    if config.mask_ratio == 0:
        return Prepared(views, rois, inside, views, None, None)
    i, j, k = views.shape[2:]
    size = (i, j, k)
    mask = draw_mask(per_case * share.total, size, block, config.mask_ratio, stream("masks", *seed))
    mask = mask.unflatten(0, (per_case, share.total))[:, share.begin : share.end].flatten(0, 1).contiguous()
    if at_once:
        mask = mask.pin_memory()  # a copy from ordinary memory may wait for the GPU
    mask = mask.to(device, non_blocking=at_once)
    hidden = expand_mask(mask, block, size)
    return Prepared(views, rois, inside, hide(views, hidden), mask, hidden)


class Objective(Protocol):
    """What turns the branches' outputs into losses; see :func:`objective`. ``total`` is what is trained."""

    def __call__(
        self,
        student: dict[str, Tensor],
        teacher: dict[str, Tensor],
        batch: Prepared,
        config: Any,
        cases: Sequence[int] | None = None,
        /,
    ) -> dict[str, Tensor]: ...


def objective(
    student: dict[str, Tensor], teacher: dict[str, Tensor], batch: Prepared, config: CVAConfig, cases: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Every loss of the recipe, unweighted, and their weighted sum ``total`` (paper, total loss).

    ``student``, ``teacher``: what the branches say about the batch's views. ``cases``: of every rank's part of the step; None:
    the ranks are asked.
    """
    found = {}
    if config.reconstruction_weight > 0:
        prediction = student["reconstruction"]
        found["reconstruction"] = losses.reconstruction_loss(prediction, batch.views, batch.hidden, batch.inside)
    if config.consistency_weight > 0:
        mine, theirs = by_view(student["bins"]), by_view(teacher["bins"])
        found["consistency"] = losses.consistency_loss(config.consistency, mine, theirs, config.temperature, cases)
    if config.contrastive_weight > 0:
        mine, theirs = by_view(student["image"]), by_view(teacher["image"])
        found["contrastive"] = losses.nt_xent(mine, theirs, config.temperature, cases)
    total = torch.stack([getattr(config, f"{name}_weight") * loss for name, loss in found.items()]).sum()
    return {**found, "total": total}


def by_view(vectors: Tensor) -> Tensor:
    """View-major (2B, ...) as (2, B, ...)."""
    return vectors.unflatten(0, (2, -1))
