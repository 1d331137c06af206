"""Feature maps of images of any size: windows of the network's own view, blended; and where their cells are.

The windows begin at multiples of the coarsest stride, so that cells of neighbouring windows coincide and are
averaged, never moved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from nnunetv2_cva.model.roi_align import roi_align_3d
from nnunetv2_cva.model.taps import Tap
from nnunetv2_cva.seeing.frozen import Encode
from nnunetv2_cva.sizes import by

Size = tuple[int, int, int]


@dataclass(frozen=True)
class DenseMap:
    """A tap's features of a whole image: ``values`` (C, gi, gj, gk) float32. The centre of cell n along an axis is at voxel
    coordinate ``stride * (n + 0.5) + offset`` of the image (voxel n spans [n, n + 1)); ``size``: of the image."""

    values: Tensor
    stride: Size
    offset: tuple[float, float, float]
    size: Size


@dataclass(frozen=True)
class Windows:
    """Where windows of ``view`` voxels begin in an image padded by ``before`` and ``after`` voxels; all multiples of ``step``."""

    view: Size
    before: Size
    after: Size
    starts: tuple[Size, ...]


def place_windows(size: Sequence[int], view: Sequence[int], step: Sequence[int], overlap: float = 0.5) -> Windows:
    """Windows that cover an image and overlap by at least ``overlap`` of their extent, or all but ``step`` where that is more.

    The image is padded, alike at both ends, to a view plus a multiple of ``step``.

    Raises:
        ValueError: ``overlap`` outside [0, 1), or a view that is no multiple of ``step``.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap: expected 0 to less than 1, found {overlap}.")
    if any(v % s for v, s in zip(view, step, strict=True)):
        raise ValueError(f"Windows of {by(view)} are no multiples of the network's strides {by(step)}.")
    before, after, starts = [], [], []
    for n, v, s in zip(size, view, step, strict=True):
        steps = max(0, -(-(n - v) // s))  # of the last window
        excess = v + steps * s - n
        before.append(excess // 2)
        after.append(excess - excess // 2)
        apart = max(1, int(v * (1 - overlap)) // s)
        count = -(-steps // apart) + 1
        starts.append([round(steps * w / max(1, count - 1)) * s for w in range(count)])
    i, j, k = view
    return Windows((i, j, k), _triple(before), _triple(after), tuple(_triple(s) for s in product(*starts)))


@torch.inference_mode()
def dense_maps(
    image: Tensor,
    encode: Encode,
    taps: Sequence[Tap],
    view: Sequence[int],
    overlap: float = 0.5,
    wanted: Sequence[int] | None = None,
    tick: Callable[[], object] = lambda: None,
) -> list[DenseMap]:
    """The maps of the ``wanted`` taps (default: all) of ``image`` (C, I, J, K), a preprocessed one, on the device of the network.

    Outside the image are zeros, as nnU-Net pads; cells whose centre lies there are left out. Where windows overlap, cells are
    averaged with nnU-Net's Gaussian weights. ``tick`` is called after every window.

    Raises:
        ValueError: no such tap; or as ``place_windows``.
    """
    wanted = check_taps(wanted, taps)
    windows = place_windows(image.shape[1:], view, _coarsest(taps), overlap)
    sums: dict[int, Tensor] = {}
    weights: dict[int, Tensor] = {}
    for start, maps in _through(image, encode, windows):
        for t in wanted:
            window, stride = maps[t][0].float(), taps[t].stride
            if t not in sums:
                whole = [n // s for n, s in zip(_padded(image.shape[1:], windows), stride)]
                sums[t] = window.new_zeros((len(window), *whole))
                weights[t] = window.new_zeros(whole)
            where = tuple(slice(b // s, b // s + n) for b, s, n in zip(start, stride, window.shape[1:]))
            weight = _gaussian(_triple(window.shape[1:])).to(window)
            sums[t][(slice(None), *where)] += window * weight
            weights[t][where] += weight
        tick()
    return [_without_padding(sums.pop(t) / weights[t], taps[t], windows, image.shape[1:]) for t in wanted]


def mean_vector(maps: Sequence[DenseMap]) -> np.ndarray:
    """(sum of C,): the mean of every map over its image."""
    return torch.cat([m.values.mean(dim=(1, 2, 3)) for m in maps]).cpu().numpy()


@torch.inference_mode()
def window_vectors(
    image: Tensor,
    encode: Encode,
    taps: Sequence[Tap],
    view: Sequence[int],
    overlap: float = 0.5,
    wanted: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Where all windows start (W, 3), in voxels of the image, and the mean of every wanted tap over each (W, sum of C).

    Raises:
        ValueError: as ``dense_maps``.
    """
    wanted = check_taps(wanted, taps)
    windows = place_windows(image.shape[1:], view, _coarsest(taps), overlap)
    starts, vectors = [], []
    for start, maps in _through(image, encode, windows):
        starts.append([s - b for s, b in zip(start, windows.before)])
        vectors.append(torch.cat([maps[t][0].float().mean(dim=(1, 2, 3)) for t in wanted]))
    return torch.tensor(starts), torch.stack(vectors).cpu()


def on_grid(maps: Sequence[DenseMap], bins: Sequence[int], exactly: bool = False) -> Tensor:
    """(sum of C, *bins) float32: all maps averaged over ``bins`` equal boxes of the image, as training averages them over the
    bins of a shared region. ``exactly``: interpolated at the boxes' centres instead."""
    whole = torch.tensor([[[0.0] * 3, [1.0] * 3]], device=maps[0].values.device)
    i, j, k = bins
    return torch.cat(
        [
            roi_align_3d(
                m.values[None],
                whole,
                (i, j, k),
                view_size=m.size,
                stride=m.stride,
                offset=m.offset,
                samples=1 if exactly else None,
            )[0]
            for m in maps
        ]
    )


def check_taps(wanted: Sequence[int] | None, taps: Sequence[Tap]) -> list[int]:
    """The numbers of the wanted taps, all for None; negative ones count from the coarsest.

    Raises:
        ValueError: there is no such tap.
    """
    if wanted is None:
        return list(range(len(taps)))
    if not all(-len(taps) <= t < len(taps) for t in wanted):
        raise ValueError(f"Taps: expected numbers from 0 to {len(taps) - 1} (or -1 for the coarsest), found {list(wanted)}.")
    return [t % len(taps) for t in wanted]


def _through(image: Tensor, encode: Encode, windows: Windows) -> Iterator[tuple[Size, list[Tensor]]]:
    amounts = [n for pair in zip(windows.before[::-1], windows.after[::-1]) for n in pair]
    padded = pad(image, amounts)
    for start in windows.starts:
        where = tuple(slice(b, b + n) for b, n in zip(start, windows.view))
        yield start, encode(padded[(slice(None), *where)][None])


def _padded(size: Sequence[int], windows: Windows) -> list[int]:
    return [b + n + a for b, n, a in zip(windows.before, size, windows.after)]


def _without_padding(values: Tensor, tap: Tap, windows: Windows, size: Sequence[int]) -> DenseMap:
    """Cells whose centre lies in the image, at least one along every axis."""
    offset = []
    for axis, (n, s, o, before) in enumerate(zip(size, tap.stride, tap.offset, windows.before), 1):
        o -= before
        first = max(0, math.ceil(-o / s - 0.5))  # centre of cell c: s (c + 0.5) + o
        last = min(values.shape[axis], math.ceil((n - o) / s - 0.5)) - 1
        if last < first:
            first = last = min(max(first, 0), values.shape[axis] - 1)
        values = values.narrow(axis, first, last - first + 1)
        offset.append(o + s * first)
    return DenseMap(values.contiguous(), tap.stride, (offset[0], offset[1], offset[2]), _triple(size))


def _gaussian(cells: Size) -> Tensor:
    from nnunetv2.inference.sliding_window_prediction import compute_gaussian

    return compute_gaussian(cells, dtype=torch.float32, device=torch.device("cpu"))


def _coarsest(taps: Sequence[Tap]) -> Size:
    return _triple([max(strides) for strides in zip(*(t.stride for t in taps))])


def _triple(values: Sequence[int]) -> Size:
    i, j, k = values
    return int(i), int(j), int(k)
