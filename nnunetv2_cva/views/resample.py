"""From voxels of a case to the voxels of a view. Trilinear, and no more work than the view's transform asks for.

=================  ====================================================================================================
crop and mirror    a copy
scale              separable: linear interpolation axis by axis
rotation           ``grid_sample``
=================  ====================================================================================================

``window`` says which voxels are needed, ``show`` makes the view of them. Half a voxel next to the border of a case lies
beyond the outermost voxel centres: there the image is continued linearly.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from torch import Tensor

from nnunetv2_cva.views.geometry import Pair

SLAB = 16  # planes of a view at a time: bounds the memory for what lies between
AIR_POINTS = 12  # per axis
AIR_TOLERANCE = 0.2  # standard deviations of the case


def window(pair: Pair, view: int) -> np.ndarray:
    """(3, 2) integers: the box of the case that the view needs. That of a mere crop may reach out of the case, that of a
    rotated view by one voxel, which :func:`_continue` fills."""
    v, shape = pair.views[view], np.array(pair.shape)
    if _is_crop(pair, view):
        return np.stack([v.begin, np.add(v.begin, v.extent)], axis=1)
    if pair.rotation is None:
        first, last = np.array([[n.min(), n.max()] for n, _ in _neighbours(pair, view)]).T
        return np.stack([first, np.clip(last + 2, first + 1, shape)], axis=1)
    matrix, shift = pair.to_case(view)
    middle, reach = matrix @ np.divide(pair.size, 2) + shift, np.abs(matrix) @ (np.subtract(pair.size, 1) / 2)
    first, last = np.floor(middle - reach - 0.5), np.floor(middle + reach - 0.5)
    first = np.clip(first, -1, np.maximum(shape - 2, 0))
    enough = np.minimum(np.maximum(first, 0) + 2, shape)  # two voxels make a line
    return np.stack([first, np.clip(last + 2, enough, shape + 1)], axis=1).astype(int)


def show(voxels: np.ndarray, box: np.ndarray, pair: Pair, view: int, out: Tensor, inside: Tensor) -> None:
    """Write a view into ``out`` (C, I, J, K) float32, zeros outside the case, and where it is inside into ``inside``.

    ``voxels`` (C, ...): those of ``box``, which is the view's ``window``.
    """
    whole = _within_case(pair, view)
    if whole:
        inside.fill_(True)
    else:
        inside.copy_(torch.from_numpy(pair.inside(view)))
    if _is_crop(pair, view):
        _mirror(voxels, pair.views[view].mirrored, out)
        return
    x = torch.from_numpy(np.ascontiguousarray(voxels))
    if pair.rotation is None:
        _rescale(x, box, pair, view, out)
    else:
        _continue(x, box, pair.shape)
        _rotate(x, box, pair, view, out)
    if not whole:
        out.mul_(inside)


def read_pair(volume: np.ndarray, pair: Pair) -> Tensor:
    """(2, C, I, J, K) float32: both views of a case that is in memory, as ``pair`` was drawn for it; zeros outside the case.

    ``volume``: (C, I, J, K) of any real type, normalised. What the views share: ``pair.rois``.

    Raises:
        ValueError: the pair was drawn for a case of another shape.
    """
    if volume.ndim != 4 or volume.shape[1:] != pair.shape:
        raise ValueError(f"read_pair: expected a volume (C, {', '.join(map(str, pair.shape))}), found {volume.shape}.")
    views, inside = torch.empty(2, volume.shape[0], *pair.size), torch.empty(pair.size, dtype=torch.bool)
    for v, out in enumerate(views):
        box = window(pair, v)
        show(crop_and_pad_nd(volume, box.tolist(), cast_cropped_to=np.float32), box, pair, v, out, inside)
    return views


def air_fraction(voxels: np.ndarray, box: np.ndarray, pair: Pair) -> float:
    """How much of the shared region is air, 0 to 1, looked up at some thousand points of it as view 0 sees them.

    Looking at voxels that were read anyway, before they are resampled, costs less than a millisecond. Air is what lies within 0.2
    of the region's 1 % quantile in every channel: images are normalised, so 0.2 standard deviations, which is more than
    the noise of air. Where only the body was normalised, the background is not darker than it but exactly constant,
    and so is the median of a region that is mostly background: what equals the median is air too.

    Limits: the level of air is not known. Uniform tissue without noise counts as air (so does a constant region);
    background that is neither dark nor constant, such as ghosting, does not.
    """
    values = _samples(voxels, box, pair)
    if values.size == 0:
        return 1.0
    ranks = [values.shape[1] // 100, values.shape[1] // 2]  # np.quantile takes twice as long
    dark, median = np.partition(values, ranks, axis=1)[:, ranks].T[..., None]
    air = (np.abs(values - dark) <= AIR_TOLERANCE) | (np.abs(values - median) <= 1e-4)
    return float(air.all(0).mean())


def _samples(voxels: np.ndarray, box: np.ndarray, pair: Pair) -> np.ndarray:
    """(C, S): the voxels next to a regular grid of points of the shared region, as far as they are in the case."""
    matrix, shift = pair.to_case(0)
    begin, end = pair.rois[0] * np.array(pair.size)
    steps = (np.arange(AIR_POINTS) + 0.5) / AIR_POINTS
    along = [b + (e - b) * steps for b, e in zip(begin, end, strict=True)]
    last = np.subtract(voxels.shape[1:], 1)
    if pair.rotation is None:  # axis by axis: the same, a third of the time
        axes = [m * x + s for m, x, s in zip(np.diag(matrix), along, shift, strict=True)]
        axes = [x[(x >= 0) & (x < n)] for x, n in zip(axes, pair.shape, strict=True)]
        i, j, k = (np.clip(x.astype(int) - b, 0, n) for x, b, n in zip(axes, box[:, 0], last, strict=True))
        return voxels[:, i[:, None, None], j[:, None], k].reshape(len(voxels), -1)
    points = np.stack(np.meshgrid(*along, indexing="ij"), -1).reshape(-1, 3) @ matrix.T + shift
    points = points[((points >= 0) & (points < pair.shape)).all(1)]
    i, j, k = np.clip(points.astype(int) - box[:, 0], 0, last).T
    return voxels[:, i, j, k]


def _is_crop(pair: Pair, view: int) -> bool:
    return pair.rotation is None and pair.views[view].extent == pair.size


def _within_case(pair: Pair, view: int) -> bool:
    """Whether an unrotated view lies in the case, all of it."""
    v = pair.views[view]
    return pair.rotation is None and min(v.begin) >= 0 and all(b + e <= n for b, e, n in zip(v.begin, v.extent, pair.shape))


def _mirror(voxels: np.ndarray, mirrored: tuple[bool, bool, bool], out: Tensor) -> None:
    """Copy (C, I, J, K), backwards along mirrored axes. NumPy goes backwards along the last one voxel by voxel: torch's flip,
    a slab of planes at a time so that its copy stays in the cache, takes a third of the time."""
    if not mirrored[2]:
        flips = tuple(slice(None, None, -1 if m else 1) for m in mirrored)
        np.copyto(out.numpy(), voxels[(slice(None), *flips)])
        return
    x, axes = torch.from_numpy(voxels), [axis for axis, m in enumerate(mirrored, start=1) if m]
    planes = x.shape[1]
    for begin in range(0, planes, SLAB):
        end = min(begin + SLAB, planes)
        slab = x[:, planes - end : planes - begin] if mirrored[0] else x[:, begin:end]
        out[:, begin:end] = slab.flip(axes)


def _neighbours(pair: Pair, view: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per axis, for every plane of an unrotated view: the lower of the two case voxels it lies between and how far on.

    At the border of the case the outermost two voxels serve, with a part below 0 or above 1.
    """
    matrix, shift = pair.to_case(view)
    found = []
    for axis in range(3):
        position = matrix[axis, axis] * (np.arange(pair.size[axis]) + 0.5) + shift[axis] - 0.5
        lower = np.clip(np.floor(position), 0, max(pair.shape[axis] - 2, 0)).astype(int)
        found.append((lower, position - lower))
    return found


def _rescale(x: Tensor, box: np.ndarray, pair: Pair, view: int, out: Tensor) -> None:
    """Axis by axis. Planes and rows are contiguous and mixed whole; along the last axis a matrix beats gathering."""
    neighbours = [
        (torch.from_numpy(lower - begin), torch.from_numpy(part).float())
        for (lower, part), begin in zip(_neighbours(pair, view), box[:, 0], strict=True)
    ]
    for axis, (lower, part) in enumerate(neighbours[:2], start=1):
        upper = (lower + 1).clamp(max=x.shape[axis] - 1)
        part = part.reshape([-1] + [1] * (3 - axis))
        x = torch.lerp(x.index_select(axis, lower), x.index_select(axis, upper), part)
    lower, part = neighbours[2]
    upper = (lower + 1).clamp(max=x.shape[3] - 1)
    weights = x.new_zeros(x.shape[3], len(lower))
    columns = torch.arange(len(lower))
    weights.index_put_((lower, columns), 1 - part, accumulate=True)
    weights.index_put_((upper, columns), part, accumulate=True)
    torch.matmul(x, weights, out=out)


def _continue(x: Tensor, box: np.ndarray, shape: tuple[int, int, int]) -> None:
    """Fill the planes of ``box`` that lie one voxel outside the case: the line through the two outermost voxels goes on."""
    for axis, (n, (begin, end)) in enumerate(zip(shape, box.tolist(), strict=True), start=1):
        inner = min(n, 2)  # 1: nothing to draw a line through
        if begin < 0:
            x.select(axis, 0).copy_(2 * x.select(axis, 1) - x.select(axis, inner))
        if end > n:
            x.select(axis, -1).copy_(2 * x.select(axis, -2) - x.select(axis, -1 - inner))


def _rotate(x: Tensor, box: np.ndarray, pair: Pair, view: int, out: Tensor) -> None:
    """grid_sample with coordinates that are sums of one term per axis, a slab of planes at a time."""
    matrix, shift = pair.to_case(view)
    extent = box[:, 1] - box[:, 0]
    matrix = (2 / extent[:, None] * matrix)[::-1]  # to [-1, 1] over the box, last axis first
    shift = (2 / extent * (shift - box[:, 0]) - 1)[::-1]
    size = pair.size
    i, j, k = (torch.from_numpy(np.multiply.outer(np.arange(n) + 0.5, m)).float() for n, m in zip(size, matrix.T, strict=True))
    rows = (k + torch.from_numpy(shift.copy()).float()).reshape(1, -1) + j.repeat(1, size[2])  # (J, K * 3)
    for begin in range(0, size[0], SLAB):
        planes = i[begin : begin + SLAB]
        grid = (planes.repeat(1, size[2])[:, None] + rows).view(1, len(planes), size[1], size[2], 3)
        slab = F.grid_sample(x[None], grid, mode="bilinear", padding_mode="border", align_corners=False)
        out[:, begin : begin + len(planes)] = slab[0]
