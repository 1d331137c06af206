"""What a user watches: one table of the metrics, and how those of the representation are computed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True)
class Metric:
    """One number of every epoch. ``panel``: of the plot, by its title; none: it is not plotted."""

    name: str
    meaning: str
    better: Literal["higher", "lower", ""] = ""
    panel: str = ""

    @property
    def sign(self) -> int:
        """1 when higher is better, -1 when lower is."""
        return {"higher": 1, "lower": -1, "": 0}[self.better]


PARTS, LOSSES = "weighted losses, which add up to the total", "the losses themselves; dashed: without learning"
RETRIEVAL = "retrieval in watched pairs; dashed: by position; dotted: by chance"
ALIGNMENT = "alignment in watched pairs; dashed: by position"
RANK = "effective rank of the features; dotted: untrained"
SPREAD = "spread of the features (dotted: untrained); student and teacher"
SHARES, RATE = "real overlap; share of the time waiting for data", "learning rate"

ROUNDING = 1e-5  # of the whole length: float32 keeps 1e-7 of a number, and features are sums of many

METRICS = {
    m.name: m
    for m in (
        Metric("reconstruction_loss", "Huber loss of the hidden voxels", "lower", LOSSES),
        Metric("consistency_loss", "how far corresponding bins of student and teacher are apart", "lower", LOSSES),
        Metric("contrastive_loss", "NT-Xent of the images", "lower", LOSSES),
        Metric("total_loss", "weighted sum of the losses", "lower", PARTS),
        Metric("watched_loss", "total loss of the watched cases, where no views are compared", "lower", PARTS),
        Metric("overlap", "real overlap of the views", "", SHARES),
        Metric("learning_rate", "of this epoch", "", RATE),
        Metric("skipped", "steps left out because their loss or gradient was not finite", "lower"),
        Metric("data_wait", "share of the time spent waiting for data", "lower", SHARES),
        Metric("alignment", "mean cosine of corresponding bins, in what the losses compare", "higher", ALIGNMENT),
        Metric("retrieval", "how often the most similar bin of the other view is the corresponding one", "higher", RETRIEVAL),
        Metric("feature_alignment", "the same cosine, of the encoder features that fine-tuning gets", "higher", ALIGNMENT),
        Metric("feature_retrieval", "the same retrieval, by these features", "higher", RETRIEVAL),
        Metric("alignment_null", "alignment with the same place in another case: what position alone explains", "", ALIGNMENT),
        Metric("retrieval_null", "retrieval in another case, by the same place in the view", "", RETRIEVAL),
        Metric("retrieval_chance", "retrieval of guessing", "", RETRIEVAL),
        Metric("spread_start", "spread before the first step", "", SPREAD),
        Metric("effective_rank_start", "effective rank before the first step", "", RANK),
        Metric("feature_alignment_null", "feature_alignment with the same place in another case", "", ALIGNMENT),
        Metric("feature_retrieval_null", "feature_retrieval in another case, by the same place in the view", "", RETRIEVAL),
        Metric("reconstruction_null", "the reconstruction loss of predicting every view's mean", "", LOSSES),
        Metric("contrastive_null", "the contrastive loss of telling nothing apart", "", LOSSES),
        Metric("teacher_distance", "length of student minus teacher, in lengths of the teacher's weights", "", SPREAD),
        Metric("spread", "how far apart these features are; near 0: collapsed", "higher", SPREAD),
        Metric("effective_rank", "how many directions these features use; near 1: collapsed", "higher", RANK),
    )
}


def panels(record: Iterable[str]) -> dict[str, list[str]]:
    """Title -> names of the plot's panels for an epoch with these metrics, without panels that would be empty. Losses that the
    table does not know, of recipes with an objective of their own, are losses."""
    there = set(record)
    unknown = [name for name in there if is_loss(name) and name not in METRICS]
    found: dict[str, list[str]] = {PARTS: []}
    for title in (LOSSES, RETRIEVAL, ALIGNMENT, RANK, SPREAD, SHARES, RATE):
        known = [m.name for m in METRICS.values() if m.panel == title and m.name in there]
        found[title] = known + (sorted(unknown) if title == LOSSES else [])
    return {title: names for title, names in found.items() if names or title == PARTS}


def is_loss(name: str) -> bool:
    """Whether a metric is one of the losses."""
    return name.endswith("_loss")


def pair_metrics(first: Tensor, second: Tensor) -> dict[str, float]:
    """How well corresponding bins of two views agree. ``first``, ``second``: (B, R, D).

    ``alignment``: mean cosine of corresponding bins. ``retrieval``: how often the most similar bin of the other view of the same
    case is the corresponding one (top-1, chance 1/R).
    """
    similarity = normalize(first.float(), dim=-1) @ normalize(second.float(), dim=-1).transpose(1, 2)
    diagonal = similarity.diagonal(dim1=1, dim2=2)
    hits = similarity.argmax(-1) == torch.arange(similarity.shape[1], device=similarity.device)
    return {"alignment": diagonal.mean().item(), "retrieval": hits.float().mean().item()}


def standardised(features: Tensor, by: Tensor | None = None) -> Tensor:
    """(B, R, D) features with mean 0 and variance 1 per channel over all bins, or less the mean and divided by the standard
    deviation of those of ``by``: raw features share a large mean, so that all cosines are near 1."""
    rows = (features if by is None else by).float().flatten(0, 1)
    std, mean = torch.std_mean(rows, dim=0)
    return (features.float() - mean) / std.clamp_min(1e-6)


def collapse_metrics(features: Tensor) -> dict[str, float]:
    """Whether features still differ from each other. ``features``: (M, D).

    ``spread``: standard deviation of the L2-normalised features, times sqrt(D): 0 when all are the same, up to 1.
    ``effective_rank``: exp of the entropy of the normalised singular values of the centred features (Roy and Vetterli, 2007);
    1 when all lie on a line, at most min(M, D). Directions of less than 1e-5 of the features' whole length are rounding
    and do not count: features that are all the same have rank 1, whatever noise is on them.
    """
    rows = features.float()
    spread = normalize(rows, dim=-1).std(0).mean() * rows.shape[1] ** 0.5
    singular = _singular_values(rows - rows.mean(0))
    singular = singular.where(singular > ROUNDING * rows.norm().to(singular), 0)
    p = singular / singular.sum().clamp_min(torch.finfo(torch.float32).tiny)
    rank = torch.exp(-(p * p.clamp_min(1e-12).log()).sum())
    return {"spread": spread.item(), "effective_rank": rank.item()}


def _singular_values(rows: Tensor) -> Tensor:
    """By the eigenvalues of the smaller Gram matrix in float64, on the device: a tenth of the time of a decomposition."""
    exact = rows.cpu().double() if rows.device.type == "mps" else rows.double()
    gram = exact.T @ exact if len(exact) > exact.shape[1] else exact @ exact.T
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
