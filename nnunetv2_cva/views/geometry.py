"""Where two views of a case lie, and what they share.

Axes are array axes (i, j, k). Coordinates are continuous: voxel n spans [n, n + 1), its centre is n + 0.5.

A pair is drawn in a *frame*: the case's own coordinates, or the case rotated about the middle of the pair. In the
frame both views are boxes with integer begin and extent, so the region they share is a box too. It is recorded as two
*rois*, one per view, in fractions of that view and oriented: along a mirrored axis a roi ends before it begins. Drawing
is separate from reading: nothing here touches voxels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.sizes import by

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class View:
    """One view: the box of the frame that it shows. ``begin`` and ``extent`` in case voxels, integers."""

    begin: Triple
    extent: Triple
    mirrored: tuple[bool, bool, bool]


@dataclass(frozen=True)
class Pair:
    """Two views of one case and what they share.

    ``shape``: voxels of the case; ``size``: voxels of a view; ``rotation``: (3, 3), frame to case about ``centre``, or
    None.
    """

    shape: Triple
    size: Triple
    views: tuple[View, View]
    rotation: np.ndarray | None = None

    @cached_property
    def centre(self) -> np.ndarray:
        """(3,) middle of the box around both views; the point that rotation leaves in place."""
        begin = np.min([v.begin for v in self.views], axis=0)
        end = np.max([np.add(v.begin, v.extent) for v in self.views], axis=0)
        return (begin + end) / 2

    def to_case(self, view: int) -> tuple[np.ndarray, np.ndarray]:
        """(3, 3) matrix and (3,) shift: view coordinates x (voxels) become case coordinates ``matrix @ x + shift``."""
        v = self.views[view]
        step = np.divide(v.extent, self.size)
        mirrored = np.asarray(v.mirrored)
        matrix = np.diag(np.where(mirrored, -step, step))
        shift = np.asarray(v.begin, float) + np.where(mirrored, v.extent, 0)
        if self.rotation is None:
            return matrix, shift
        return self.rotation @ matrix, self.rotation @ (shift - self.centre) + self.centre

    @cached_property
    def shared(self) -> np.ndarray:
        """(2, 3) begin and end of the shared region in the frame, clipped to the case (rotated: the box around it)."""
        low, high = _case_box(self)
        for v in self.views:
            low = np.maximum(low, v.begin)
            high = np.minimum(high, np.add(v.begin, v.extent))
        assert (high > low).all(), "two views of a pair always share part of the case"
        return np.stack([low, high])

    @cached_property
    def rois(self) -> np.ndarray:
        """(2 views, 2, 3) float32: the shared region as each view sees it, in fractions of the view, oriented."""
        rois = []
        for v in self.views:
            fractions = (self.shared - v.begin) / v.extent
            rois.append(np.where(v.mirrored, 1 - fractions, fractions))
        return np.stack(rois).astype(np.float32)

    @cached_property
    def overlap(self) -> float:
        """Shared volume / what the view with less of the case shows of it. 1: one view shows nothing of its own."""
        low, high = _case_box(self)
        visible = [np.prod(np.minimum(high, np.add(v.begin, v.extent)) - np.maximum(low, v.begin)) for v in self.views]
        return float(np.prod(self.shared[1] - self.shared[0]) / min(visible))

    def inside(self, view: int) -> np.ndarray:
        """(I, J, K) bool: which voxels of a view have their centre in the case."""
        matrix, shift = self.to_case(view)
        i, j, k = (np.arange(n) + 0.5 for n in self.size)
        if self.rotation is None:
            centres = (m * x + s for m, x, s in zip(np.diag(matrix), (i, j, k), shift, strict=True))
            i, j, k = ((0 <= c) & (c <= n) for c, n in zip(centres, self.shape, strict=True))
            return i[:, None, None] & j[:, None] & k
        # A case is convex: along a row of voxels its inside is an interval, and two comparisons per voxel do.
        first, last = np.zeros((len(i), len(j))), np.full((len(i), len(j)), len(k))
        for m, s, n in zip(matrix, shift, self.shape, strict=True):
            begin = m[0] * i[:, None] + m[1] * j + s
            ends = np.stack([-begin, n - begin]) / (m[2] if abs(m[2]) > 1e-9 else 1e-9)
            first, last = np.maximum(first, ends.min(0)), np.minimum(last, ends.max(0))
        row = k.astype(np.float32)
        return (first.astype(np.float32)[..., None] <= row) & (row <= last.astype(np.float32)[..., None])

    def coordinates(self, view: int) -> list[np.ndarray]:
        """Three (I, J, K) float32 arrays: case coordinates of a view's voxel centres."""
        matrix, shift = self.to_case(view)
        i, j, k = (np.arange(n, dtype=np.float32) + 0.5 for n in self.size)
        m, s = matrix.astype(np.float32), shift.astype(np.float32)
        return [((m[d, 0] * i)[:, None, None] + (m[d, 1] * j)[:, None]) + (m[d, 2] * k + s[d]) for d in range(3)]


def draw_pair(shape: Sequence[int], size: Sequence[int], config: CVAConfig, rng: np.random.Generator) -> Pair:
    """Two views of ``size`` voxels of a case of ``shape`` voxels (paper, section "view generation").

    The volume fraction t ~ U(overlap) that the views share is split over the axes by Dirichlet(1, 1, 1): f_d = t**w_d.
    Which view lies lower is drawn per axis. A view leaves the case only where the pair does not fit into it, and by no
    more than ``padding`` of its extent; where even that is not enough, the views move together. (Rotation turns the
    pair about its middle, which moves corners out of the case.)
    """
    mirrored, extents = _draw_spatial(size, config, rng)
    rotation = _draw_rotation(config, rng)
    t = rng.uniform(*config.overlap)
    fractions = t ** rng.dirichlet((1.0, 1.0, 1.0))
    lower = rng.random(3) < 0.5  # along these axes view 1 begins before view 0
    begins = np.empty((2, 3), int)
    for axis in range(3):
        first, second = extents[0][axis], extents[1][axis]
        common = max(1, round(fractions[axis] * min(first, second)))
        reach = int(config.padding * min(first, second))
        room = max(shape[axis] + 2 * reach, first, second)
        move = int(np.clip(common - second if lower[axis] else first - common, first - room, room - second))
        begins[:, axis] = _place(shape[axis], first, second, move, reach, rng)
    first_view, second_view = (
        View(_triple(b), _triple(e), (bool(m[0]), bool(m[1]), bool(m[2])))
        for b, e, m in zip(begins, extents, mirrored, strict=True)
    )
    return Pair(_triple(shape), _triple(size), (first_view, second_view), rotation)


def _place(case: int, first: int, second: int, move: int, reach: int, rng: np.random.Generator) -> tuple[int, int]:
    """Begins of two windows along one axis, the second ``move`` voxels after the first."""
    low, high = min(0, move), max(first, move + second)
    spare = case - (high - low)
    if spare >= 0:
        begin = int(rng.integers(0, spare + 1))
    elif -spare <= 2 * reach:
        begin = int(rng.integers(max(-reach, spare), min(0, reach + spare) + 1))
    else:  # one view reaches over the case and its padding: it is centred, the other keeps to its padding where it can
        begin = spare // 2
        return _keep(case, first, begin - low, reach), _keep(case, second, begin - low + move, reach)
    return begin - low, begin - low + move


def _keep(case: int, extent: int, begin: int, reach: int) -> int:
    """``begin``, moved so that the window leaves the case by ``reach`` at most; centred where that is impossible."""
    room = case + 2 * reach - extent
    return min(max(begin, -reach), room - reach) if room >= 0 else (case - extent) // 2


def _draw_spatial(size: Sequence[int], config: CVAConfig, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Per view and axis: mirrored (2, 3) bool, and the extent read from the case (2, 3) int."""
    mirrored = rng.random((2, 3)) < config.mirror_p
    scales = np.where(rng.random(2) < config.scale_p, rng.uniform(*config.scale_range, size=2), 1.0)
    if config.spatial == "shared":
        mirrored[1], scales[1] = mirrored[0], scales[0]
    return mirrored, np.maximum(1, np.rint(np.multiply.outer(scales, size))).astype(int)


def _draw_rotation(config: CVAConfig, rng: np.random.Generator) -> np.ndarray | None:
    """Rotation about the three axes, or None for none."""
    apply, angles = rng.random() < config.rotation_p, rng.uniform(-1, 1, 3) * np.deg2rad(config.rotation_degrees)
    if not apply or config.rotation_degrees == 0:
        return None
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        a, b = [d for d in range(3) if d != axis]
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def _triple(values: Iterable[float]) -> Triple:
    i, j, k = (int(v) for v in values)
    return i, j, k


def _case_box(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Low and high corner (3,) of the box around the case in the frame."""
    if pair.rotation is None:
        return np.zeros(3), np.asarray(pair.shape, float)
    corners = np.stack(np.meshgrid(*[(0, n) for n in pair.shape], indexing="ij"), -1).reshape(-1, 3)
    corners = (corners - pair.centre) @ pair.rotation + pair.centre
    return corners.min(0), corners.max(0)


@dataclass(frozen=True)
class Feasibility:
    """What overlaps a set of cases allows. ``overlaps``: 5 %, 50 % and 95 % quantile of the real overlap."""

    cases: int
    fits: int  # cases where at least half of the draws keep to the configured overlap
    identical: int  # cases where no draw gives either view anything of its own
    overlaps: tuple[float, float, float]

    def __str__(self) -> str:
        low, median, high = self.overlaps
        return (
            f"The drawn overlap fits into {self.fits} of {self.cases} cases (at least half of the draws); the real overlap of "
            f"two views will be {median:.2f} (5 %: {low:.2f}, 95 %: {high:.2f})."
        )


def feasibility(
    shapes: Iterable[Sequence[int]], size: Sequence[int], config: CVAConfig, rng: np.random.Generator, draws: int = 16
) -> Feasibility:
    """What the cases of these ``shapes`` allow, by drawing ``draws`` pairs of each."""
    cases = fits = identical = 0
    overlaps = []
    for shape in shapes:
        real = np.array([draw_pair(shape, size, config, rng).overlap for _ in range(draws)])
        cases += 1
        fits += bool(np.mean(real <= config.overlap[1] + 0.05) >= 0.5)
        identical += bool((real > 0.999).all())
        overlaps.append(real)
    low, median, high = np.quantile(np.concatenate(overlaps), (0.05, 0.5, 0.95))
    return Feasibility(cases, fits, identical, (float(low), float(median), float(high)))


def check_feasible(found: Feasibility, size: Sequence[int], config: CVAConfig) -> str | None:
    """A warning when less than half of the cases have room for two different views, else None.

    Raises:
        ValueError: most cases have no room at all and a loss compares views.
    """
    remedy = "Use a smaller patch_size in a configuration of its own (inherits_from), or larger cases."
    if config.needs_second_view and 2 * found.identical > found.cases:
        raise ValueError(
            f"{found.identical} of {found.cases} cases are too small for two different views of "
            f"{by(size)} voxels (patch_size of the plans): both views would show the same. {remedy}"
        )
    if config.needs_second_view and 2 * found.fits < found.cases:
        return (
            f"WARNING: only {found.fits} of {found.cases} cases have room for the configured overlap {config.overlap}. {remedy}"
        )
    return None
