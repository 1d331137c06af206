"""RoIAlign in three dimensions, on boxes: one small interpolation matrix per axis, contracted one after the other.

Averaging regularly placed linear samples is a linear map that factors over the axes, so nothing is gathered voxel by
voxel and the gradient is a matrix product too. Differences to torchvision's ``roi_align(aligned=True)``: three axes, a
roi may be mirrored, the tap's cells may be off their regular places, and beyond the first and last cell's centre the
map is extrapolated linearly where torchvision clamps (which costs up to half a cell, 16 voxels at stride 32).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def roi_align_3d(
    features: Tensor,
    rois: Tensor,
    bins: tuple[int, int, int],
    *,
    view_size: tuple[int, int, int],
    stride: tuple[int, int, int],
    offset: tuple[float, float, float],
    samples: int | None = None,
) -> Tensor:
    """The mean of the features over every bin of every view's roi; differentiable with respect to ``features``.

    Args:
        features: (N, C, I, J, K), a tap of any floating type.
        rois: (N, 2, 3), begin and end along each axis in fractions of the view. Along a mirrored axis a roi ends before
            it begins: bin r always covers ``begin + (end - begin) * [r, r + 1] / R``.
        bins: number of bins along each axis.
        view_size, stride, offset: in voxels. Cell n's centre is at input coordinate ``stride * (n + 0.5) + offset``.
        samples: per bin and axis; None for max(2, cells of the map per bin), enough to reach every cell of any roi.

    Returns:
        (N, C, *bins) float32 (float64 for float64 features). Its memory order is channels last: flattening the bins and
        moving the channels behind them costs nothing.

    Raises:
        ValueError: shapes that do not belong together, or a size that is not positive.

    The last axis, where the map is largest, is contracted in the features' own type, so that no float32 copy of a bf16
    or fp16 map exists; everything after that in float32. Independent of autocast.
    """
    if features.ndim != 5 or rois.shape != (features.shape[0], 2, 3):
        raise ValueError(
            "roi_align_3d: expected features (N, C, I, J, K) and rois (N, 2, 3) of the same N, found "
            f"{tuple(features.shape)} and {tuple(rois.shape)}."
        )
    # Not min(): torch 2.6 cannot compile that over sizes that may change.
    if any(n < 1 for n in (*bins, *view_size, *stride, *features.shape[2:], 1 if samples is None else samples)):
        raise ValueError(
            f"roi_align_3d: expected sizes of at least 1, found bins {bins}, view_size {view_size}, stride {stride}, "
            f"samples {samples}, map {tuple(features.shape[2:])}."
        )
    n, channels, *cells = features.shape
    exact = torch.float64 if features.dtype == torch.float64 else torch.float32
    with torch.autocast(features.device.type, enabled=False):
        x = features
        for axis in (2, 1, 0):
            weights = interpolation_matrices(
                rois[:, :, axis].detach().to(exact),
                bins[axis],
                cells[axis],
                view_size=view_size[axis],
                stride=stride[axis],
                offset=offset[axis],
                samples=samples,
            )
            # The new bins go to the front, so the next axis to contract is the last one again.
            x = _contract(x.reshape(n, -1, cells[axis]), weights).transpose(1, 2)
        return x.reshape(n, *bins, channels).permute(0, 4, 1, 2, 3)


def interpolation_matrices(
    ends: Tensor, bins: int, cells: int, *, view_size: int, stride: int, offset: float, samples: int | None = None
) -> Tensor:
    """(N, bins, cells): what every cell contributes to every bin along one axis, in the type of ``ends``.

    ``ends`` (N, 2): begin and end of the rois along this axis, in fractions of the view. A bin is the mean of S samples
    at its sub-positions (s + 0.5) / S. Every row sums to 1; entries are negative where a sample lies beyond the outer
    cell centres. The shape depends on no value, so nothing waits for the device.
    """
    if cells == 1:
        return ends.new_ones(ends.shape[0], bins, 1)
    per_bin = max(2, math.ceil(cells / bins)) if samples is None else samples
    within = (torch.arange(bins * per_bin, device=ends.device, dtype=ends.dtype) + 0.5) / (bins * per_bin)
    begin, end = ends[:, :1], ends[:, 1:]
    cell = ((begin + (end - begin) * within) * view_size - offset) / stride - 0.5  # (N, bins * S), centre of cell n: n
    lower = cell.floor().clamp(0, cells - 2)  # the outermost two cells also serve what lies beyond them
    part = (cell - lower)[..., None]
    position = torch.arange(cells, device=ends.device, dtype=ends.dtype) - lower[..., None]
    weights = torch.where(position == 0, 1 - part, torch.where(position == 1, part, torch.zeros_like(part)))
    return weights.unflatten(1, (bins, per_bin)).mean(dim=2)


def _contract(x: Tensor, weights: Tensor) -> Tensor:
    """(N, M, R) in the type of ``weights``: the product of x (N, M, cells) with weights (N, R, cells).

    A low-precision x is multiplied with the weights split into two numbers of its type, their rounding and what that
    left over. Rounded once, a row of bf16 weights would miss the sum of 1 by up to 1 % and move its bin by up to 0.2
    voxel (160 cells); split, by 0.0004 voxel. The products are still rounded to x's type, as x itself was: 0.4 % of the
    value for bf16. Twice 7 columns cost what 7 do, since reading x takes longer.
    """
    if x.dtype == weights.dtype:
        return torch.bmm(x, weights.transpose(1, 2))
    rounded = weights.to(x.dtype)
    rest = (weights - rounded.to(weights.dtype)).to(x.dtype)
    products = torch.bmm(x, torch.cat((rounded, rest), dim=1).transpose(1, 2))
    return products.unflatten(2, (2, -1)).sum(dim=2, dtype=weights.dtype)
