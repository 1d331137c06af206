"""Scores of the watched pairs: how far the representation has come, measured the same way in every epoch.

They come from cases that are kept back from training, where there are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.losses import reconstruction_loss
from nnunetv2_cva.model.branches import Student, Teacher
from nnunetv2_cva.training.metrics import METRICS, Metric, collapse_metrics, null_metrics, pair_metrics, standardised
from nnunetv2_cva.training.objective import Objective, Prepared, by_view, objective, prepare


@torch.no_grad()
def score(
    student: Student,
    teacher: Teacher | None,
    batches: Iterable[dict[str, Any]],
    config: CVAConfig,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    compute: Objective = objective,
) -> dict[str, float]:
    """Metrics of the watched pairs, student in eval mode, nothing hidden, augmentation as in training but always the same.

    ``alignment`` and ``retrieval`` compare what the losses compare: the student's predictions of view 0 and the teacher's
    embeddings of view 1 (the student's predictions, where there is no teacher). ``feature_*``, ``effective_rank`` and ``spread``
    are about what fine-tuning gets: the student's encoder features of both views. A recipe that compares no views has
    ``watched_loss``, on fixed masks, and of the features ``effective_rank`` and ``spread`` only. ``compute``: its objective.

    ``*_null``: what the same numbers are for the same place in another case, and for the mean of a view as its reconstruction.
    """
    student.eval()
    losses: list[Tensor] = []
    embedded: list[Tensor] = []
    features: list[Tensor] = []
    means: list[Tensor] = []
    for index, loaded in enumerate(batches):
        kept = {**loaded, "views": loaded["views"].clone()}  # augmentation works in place
        batch = prepare(kept, config, student.backbone.block, device, config.seed, index, 0)
        if config.reconstruction_weight > 0:
            means.append(_loss_of_means(batch))
        with autocast():
            seen = student.features(batch.views, batch.rois)
            if not config.needs_second_view:
                features.append(seen[None])
                losses.append(compute(student(batch.visible, batch.mask, batch.rois), {}, batch, config)["total"])
                continue
            features.append(by_view(seen))
            if config.consistency_weight > 0:
                predicted = by_view(student(batch.views, None, batch.rois)["bins"])
                other = predicted if teacher is None else by_view(teacher(batch.views, batch.rois)["bins"])
                embedded.append(torch.stack([predicted[0], other[1]]).float())
    found = {"watched_loss": torch.stack(losses).mean().item()} if losses else {}
    if embedded:
        pairs = torch.cat(embedded, dim=1)
        found.update({**pair_metrics(*pairs), **null_metrics(*pairs), "retrieval_chance": 1 / pairs.shape[2]})
    both = torch.cat(features, dim=1)
    if config.needs_second_view:
        compared = by_view(standardised(both.flatten(0, 1)))
        of_features = {**pair_metrics(*compared), **null_metrics(*compared)}
        found.update({f"feature_{name}": value for name, value in of_features.items()})
    if means:
        found["reconstruction_null"] = torch.stack(means).mean().item()
    if teacher is not None:
        found["teacher_distance"] = teacher.distance(student)
    return {**found, **collapse_metrics(both.flatten(0, 2))}


def _loss_of_means(batch: Prepared) -> Tensor:
    """The reconstruction loss of predicting the mean of what is inside the case, for every view and channel."""
    inside = batch.inside.expand_as(batch.views)
    sums = (batch.views * inside).sum(dim=(2, 3, 4), keepdim=True)
    means = sums / inside.sum(dim=(2, 3, 4), keepdim=True).clamp_min(1)
    return reconstruction_loss(means.expand_as(batch.views), batch.views, batch.hidden, batch.inside)


def criterion(config: CVAConfig) -> Metric:
    """The metric that chooses the best checkpoint."""
    if config.consistency_weight > 0:
        return METRICS["retrieval"]
    return METRICS["feature_retrieval" if config.needs_second_view else "watched_loss"]
