"""Scores of the watched pairs: how far the representation has come, measured the same way in every epoch.

They come from cases that are kept back from training, where there are enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.losses import reconstruction_loss
from nnunetv2_cva.model.branches import Student, Teacher
from nnunetv2_cva.training.metrics import METRICS, Metric, collapse_metrics, pair_metrics, standardised
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

    ``*_null``: what the same numbers are for another case seen at the same place in the view, and for the mean of a view as its
    reconstruction.
    """
    student.eval()
    losses: list[Tensor] = []
    bins, features = Agreement(), Agreement()
    seen: list[Tensor] = []  # features of all views
    means: list[Tensor] = []
    before: Tensor | None = None
    for index, loaded in enumerate(batches):
        kept = {**loaded, "views": loaded["views"].clone()}  # augmentation works in place
        batch = prepare(kept, config, student.backbone.block, device, config.seed, index, 0)
        if config.reconstruction_weight > 0:
            means.append(_loss_of_means(batch))
        with autocast():
            seen.append(student.features(batch.views, batch.rois))
            if not config.needs_second_view:
                losses.append(compute(student(batch.visible, batch.mask, batch.rois), {}, batch, config)["total"])
                continue
            (_, second), (_, rois) = by_view(batch.views), by_view(batch.rois)
            others, before = _cases_before(second, before), second[-1:]
            of_others = None if others is None else student.features(others, rois)
            one, other = by_view(seen[-1])
            features.add(one, other, of_others)
            if config.consistency_weight > 0:
                predicted = by_view(student(batch.views, None, batch.rois)["bins"])
                taught = predicted if teacher is None else by_view(teacher(batch.views, batch.rois)["bins"])
                if others is not None:
                    of_others = (student(others, None, rois) if teacher is None else teacher(others, rois))["bins"]
                bins.add(predicted[0], taught[1], of_others)
    found = {"watched_loss": torch.stack(losses).mean().item()} if losses else {}
    if bins.first:
        found.update({**bins.metrics(), "retrieval_chance": 1 / bins.first[0].shape[1]})
    if features.first:
        found.update({f"feature_{name}": value for name, value in features.metrics(torch.cat(seen)).items()})
    if means:
        found["reconstruction_null"] = torch.stack(means).mean().item()
    if teacher is not None:
        found["teacher_distance"] = teacher.distance(student)
    return {**found, **collapse_metrics(torch.cat(seen).flatten(0, 1))}


@dataclass
class Agreement:
    """Bins of view 0, of view 1, and of another case's view 1 in their place; each (B, R, D), a batch after the other."""

    first: list[Tensor] = field(default_factory=list)
    second: list[Tensor] = field(default_factory=list)
    unrelated: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # of view 0, of the other case

    def add(self, first: Tensor, second: Tensor, others: Tensor | None) -> None:
        self.first.append(first)
        self.second.append(second)
        if others is not None:
            self.unrelated.append((first, others))

    def metrics(self, by: Tensor | None = None) -> dict[str, float]:
        """``pair_metrics`` and their nulls; ``by``: of features standardised by all these (M, R, D)."""
        nulls = [torch.cat(part) for part in zip(*self.unrelated)]
        pairs = [torch.cat(self.first), torch.cat(self.second)]
        if by is not None:
            pairs, nulls = ([standardised(part, by) for part in both] for both in (pairs, nulls))
        null = {f"{name}_null": value for name, value in pair_metrics(*nulls).items()} if nulls else {}
        return {**pair_metrics(*pairs), **null}


def _cases_before(views: Tensor, before: Tensor | None) -> Tensor | None:
    """In the place of every case's view (B, C, I, J, K) the one of the case before; of the first that of the last of the batch
    before, or, in the first batch, of this one. None where there is no other case."""
    if before is None and len(views) == 1:
        return None
    return torch.cat([views[-1:] if before is None else before, views[:-1]])


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
