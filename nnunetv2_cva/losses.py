"""The three losses: reconstruction, consistency of the bins, contrast of the images. Float32, whatever autocast says.

With several ranks each returns its share, scaled so that the mean over ranks (what DDP makes of the gradients) is the loss of
one process that has all cases; ranks may hold different numbers of them.

Embeddings come view-major, ``(2, B, D)`` for image vectors and ``(2, B, R, D)`` for bins: student's from the predictor,
teacher's from the projector. No gradient ever reaches the teacher's. Every loss compares a view of the student with the
teacher's *other* view.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nnunetv2_cva.distributed import gather, items_per_rank, several_ranks, this_rank

# Similarities that are held at once, per pair of branches: 32 MB of float32.
_BLOCK = 2**23


def reconstruction_loss(prediction: Tensor, target: Tensor, voxel_mask: Tensor | None, inside: Tensor) -> Tensor:
    """Huber loss (delta 1), mean over the channels of the hidden voxels inside the case.

    Args:
        prediction, target: (N, C, I, J, K).
        voxel_mask: (N, 1, I, J, K) bool, True where hidden; None to reconstruct every voxel.
        inside: (N, 1, I, J, K) bool, False where a view reaches out of its case.

    Returns:
        A scalar; 0, still with a gradient (of 0), when no voxel is left.
    """
    assert prediction.shape == target.shape and inside.shape == (target.shape[0], 1, *target.shape[2:])
    assert voxel_mask is None or voxel_mask.shape == inside.shape
    with torch.autocast(prediction.device.type, enabled=False):
        chosen = inside if voxel_mask is None else voxel_mask & inside
        target = _float(target)
        # The target in place of the prediction has loss and gradient 0: one temporary, no indexing, hence no wait
        # for the device.
        total = F.huber_loss(torch.where(chosen, prediction, target), target, reduction="sum", delta=1.0)
        return _mean(total, chosen.sum() * target.shape[1])


def consistency_loss(
    objective: Literal["cosine", "nt_xent", "gram"],
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    cases: Sequence[int] | None = None,
) -> Tensor:
    """The consistency loss of that name (``CVAConfig.consistency``) on bins (2, B, R, D). ``cases``: see ``nt_xent``."""
    if objective == "cosine":
        return consistency_cosine(student, teacher)
    if objective == "gram":
        return consistency_gram(student, teacher)
    assert objective == "nt_xent"
    return nt_xent_bins(student, teacher, temperature, cases)


def consistency_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """CVA: 2 - 2 cos of corresponding bins (2, B, R, D), mean over both directions, cases and bins; in [0, 4]."""
    _check_pair("consistency_cosine", student, teacher, 4)
    with torch.autocast(student.device.type, enabled=False):
        ours, theirs = _directions(student), _directions(teacher.detach()).flip(0)
        return _mean((2 - 2 * (ours * theirs).sum(dim=-1)).sum(), ours.shape[:3].numel())


def consistency_gram(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the Gram matrices of corresponding sets of bins (2, B, R, D).

    With Z (R, D) the L2-normalised bins of one view, its Gram matrix is ``Z^T Z`` (D, D), a *sum* over bins: which
    channels occur together, not where. Mean over the D * D entries, then over both directions and the cases.
    """
    _check_pair("consistency_gram", student, teacher, 4)
    with torch.autocast(student.device.type, enabled=False):
        ours, theirs = _directions(student), _directions(teacher.detach()).flip(0)
        # With A, B the bins of the two branches, P = A - B and Q = A + B: A^T A - B^T B = (P^T Q + Q^T P) / 2. Unlike
        # the difference of the Gram matrices or of their norms this does not cancel when A is close to B.
        p, q = ours - theirs, ours + theirs
        bins, width = student.shape[2:]
        if width <= bins:
            product = p.mT @ q
            squares = ((product + product.mT) / 2).square().sum()
            return _mean(squares / width**2, ours.shape[:2].numel())
        # The squared norm of that sum from R x R products: |P^T Q|^2 = <P P^T, Q Q^T> and
        # <P^T Q, Q^T P> = <P Q^T, Q P^T>.
        across = p @ q.mT
        squares = (p @ p.mT) * (q @ q.mT) + across * across.mT
        return _mean(squares.sum() / (2 * width**2), ours.shape[:2].numel())


def nt_xent(student: Tensor, teacher: Tensor, temperature: float, cases: Sequence[int] | None = None) -> Tensor:
    """NT-Xent of image vectors (2, B, D), over the cases of all ranks (paper, contrastive loss).

    All 4B L2-normalised vectors are anchors. Positive: the other branch's vector of the other view of the case. The
    case's two remaining vectors are left out; negatives are the vectors of all other cases. Cross-entropy over
    temperature, mean over anchors.

    ``cases``: how many every rank holds; None: they are asked, which waits for the device.

    Raises:
        ValueError: fewer than 2 cases over all ranks.
    """
    _check_pair("nt_xent", student, teacher, 3)
    return _contrast(student, teacher, temperature, cases, "nt_xent: expected at least 2 cases")


def nt_xent_bins(student: Tensor, teacher: Tensor, temperature: float, cases: Sequence[int] | None = None) -> Tensor:
    """C-CVA: ``nt_xent`` with (case, bin) in the place of the case; bins (2, B, R, D). Every other bin is a negative.

    Raises:
        ValueError: fewer than 2 bins over all cases and ranks.
    """
    _check_pair("nt_xent_bins", student, teacher, 4)
    items = None if cases is None else [n * student.shape[2] for n in cases]
    student, teacher = student.flatten(1, 2), teacher.flatten(1, 2)
    return _contrast(student, teacher, temperature, items, "nt_xent_bins: expected at least 2 bins")


def _contrast(student: Tensor, teacher: Tensor, temperature: float, per_rank: Sequence[int] | None, expected: str) -> Tensor:
    """NT-Xent of M items (2, M, D), see ``nt_xent``."""
    with torch.autocast(student.device.type, enabled=False):
        ours, theirs = _directions(student), _directions(teacher.detach())
        counts = items_per_rank(ours.shape[1], ours.device) if per_rank is None else tuple(per_rank)
        rank = this_rank()
        assert counts[rank] == ours.shape[1]
        if sum(counts) < 2:
            raise ValueError(f"{expected} over all ranks, found {sum(counts)}: there is nothing to contrast with.")
        # Kept apart, so that no gradient is computed for the teacher's vectors.
        candidates = [gather(vectors, counts) for vectors in (ours, theirs)]
        start = sum(counts[:rank])
        losses = []
        for anchors, others in ((ours, theirs), (theirs, ours)):
            for view in (0, 1):
                positive = (anchors[view] * others[1 - view]).sum(dim=-1) / temperature
                negative = torch.logaddexp(*[_log_sum(anchors[view], c, start, temperature) for c in candidates])
                losses.append(F.softplus(negative - positive))  # -log(e^p / (e^p + e^n))
        return torch.cat(losses).sum() * (len(counts) / (4 * sum(counts)))


def _log_sum(anchors: Tensor, candidates: Tensor, start: int, temperature: float) -> Tensor:
    """(M,): log of the sum of exp(similarity / temperature) of anchors (M, D) with candidates (2, T, D) of other items.

    Anchor m is item ``start + m`` of the candidates. Long lists of anchors are taken in pieces whose similarities are
    computed again for the gradient instead of being kept.
    """
    rows = max(1, _BLOCK // (2 * candidates.shape[1]))
    if len(anchors) <= rows:
        return _log_sum_piece(anchors, candidates, start, temperature)
    again = functools.partial(checkpoint, _log_sum_piece, use_reentrant=False, preserve_rng_state=False)
    pieces = [again(a, candidates, start + n * rows, temperature) for n, a in enumerate(anchors.split(rows))]
    return torch.cat(pieces)


def _log_sum_piece(anchors: Tensor, candidates: Tensor, start: int, temperature: float) -> Tensor:
    own = torch.arange(start, start + len(anchors), device=anchors.device)[:, None, None]
    item = torch.arange(candidates.shape[1], device=anchors.device)
    similarity = ((anchors / temperature) @ candidates.flatten(0, 1).T).unflatten(1, candidates.shape[:2])
    return similarity.masked_fill(own == item, -torch.inf).flatten(1).logsumexp(dim=1)


def _mean(total: Tensor, count: Tensor | int) -> Tensor:
    """This rank's share of the mean: ``total`` and ``count`` of its own items; 0 where no rank has any."""
    counts = total.detach().new_zeros(()) + count
    ranks = 1
    if several_ranks():
        ranks = dist.get_world_size()
        dist.all_reduce(counts)
    return total * (ranks / counts.clamp(min=1))


def _check_pair(name: str, student: Tensor, teacher: Tensor, axes: int) -> None:
    assert student.shape == teacher.shape and student.ndim == axes and len(student) == 2, (
        f"{name}: expected student and teacher of one shape, view-major with {axes} axes, found {tuple(student.shape)} "
        f"and {tuple(teacher.shape)}."
    )


def _directions(vectors: Tensor) -> Tensor:
    """The vectors (..., D) scaled to length 1."""
    return F.normalize(_float(vectors), dim=-1)


def _float(x: Tensor) -> Tensor:
    """Float32, or float64 as it is (gradient checks)."""
    return x if x.dtype == torch.float64 else x.float()
