"""Laws of the geometry: rois correspond, the drawn overlap is the real one, views stay where they may be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.model.roi_align import roi_align_3d
from nnunetv2_cva.views.geometry import Pair, check_feasible, draw_pair, feasibility

PLAIN = CVAConfig(mirror_p=0.0, rotation_p=0.0, scale_p=0.0)
SETTINGS = {
    "crop": PLAIN,
    "mirror": replace(PLAIN, mirror_p=0.5),
    "scale": replace(PLAIN, scale_p=1.0),
    "rotation": replace(PLAIN, rotation_p=1.0),
    "all": CVAConfig(rotation_p=0.5, scale_p=0.5),
    "independent": CVAConfig(spatial="independent", rotation_p=0.5, scale_p=0.8),
    "no padding": CVAConfig(padding=0.0, rotation_p=0.5, scale_p=0.5),
}
SIZE = (64, 32, 96)
SHAPES = {  # relative to SIZE, which differs per axis
    "larger": (190, 141, 223),
    "a little larger": (71, 36, 107),
    "equal": SIZE,
    "smaller": (41, 29, 55),
    "mixed": (200, 20, 100),
}
BINS = (7, 5, 6)


def draw(shape: tuple[int, int, int], config: CVAConfig, n: int, seed: int = 0) -> list[Pair]:
    rng = np.random.default_rng(seed)
    return [draw_pair(shape, SIZE, config, rng) for _ in range(n)]


def bin_centres(pair: Pair) -> torch.Tensor:
    """(3, *BINS) case coordinates of the middles of the shared region's bins, from the frame and nothing else."""
    low, high = pair.shared
    axes = [a + (b - a) * (np.arange(n) + 0.5) / n for a, b, n in zip(low, high, BINS, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"))
    if pair.rotation is not None:
        centre = pair.centre[:, None, None, None]
        points = np.tensordot(pair.rotation, points - centre, 1) + centre
    return torch.from_numpy(points)


def align(features: list[torch.Tensor], pairs: list[Pair], stride: tuple, offset: tuple) -> torch.Tensor:
    """(2, pairs, 3, *BINS): both views' bins."""
    rois = torch.from_numpy(np.stack([p.rois[v] for v in (0, 1) for p in pairs]))
    bins = roi_align_3d(torch.stack(features), rois, BINS, view_size=SIZE, stride=stride, offset=offset)
    return bins.unflatten(0, (2, -1))


@pytest.mark.parametrize("setting", SETTINGS)
def test_ramp_law_on_pooled_taps(setting: str) -> None:
    """Bins of both views hold the coordinates of the same piece of the case, whatever the stride."""
    for number, shape in enumerate(SHAPES.values()):
        pairs = draw(shape, SETTINGS[setting], 4, seed=number)
        expected = torch.stack([bin_centres(p) for p in pairs])
        tap = torch.from_numpy(np.stack([np.stack(p.coordinates(v)) for v in (0, 1) for p in pairs]))
        stride = np.array([1, 1, 1])
        while tap.shape[2] > 1:
            first, second = align(list(tap), pairs, tuple(stride.tolist()), (0.0, 0.0, 0.0))
            # An axis of one cell carries no ramp; rotated, it spoils the other coordinates too.
            known = [a for a in range(3) if tap.shape[2 + a] > 1]
            if len(known) == 3 or all(p.rotation is None for p in pairs):
                assert (first - second)[:, known].abs().max() < 1e-3
                assert (first - expected)[:, known].abs().max() < 1e-3
            pool = [min(2, n) for n in tap.shape[2:]]
            tap, stride = F.avg_pool3d(tap, pool), stride * pool


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("stride", [(4, 2, 8), (8, 4, 8), (16, 16, 16), (32, 16, 32)])
def test_ramp_law_on_taps_with_offsets(setting: str, stride: tuple[int, int, int]) -> None:
    """The same for cells that are off their regular places, as those of strided convolutions are."""
    offset = (-0.4 * stride[0], 0.25, -0.5 * stride[2])
    cells = [(np.arange(-(-n // s)) + 0.5) * s + o for n, s, o in zip(SIZE, stride, offset, strict=True)]
    places = np.stack(np.meshgrid(*cells, indexing="ij"))
    for shape in SHAPES.values():
        pairs = draw(shape, SETTINGS[setting], 40, seed=sum(stride))
        features = []
        for v in (0, 1):
            for p in pairs:
                matrix, shift = p.to_case(v)
                here = np.tensordot(matrix, places, 1) + shift[:, None, None, None]
                features.append(torch.from_numpy(here).float())
        first, second = align(features, pairs, stride, offset)
        assert (first - second).abs().max() < 1e-3
        assert (first - torch.stack([bin_centres(p) for p in pairs])).abs().max() < 1e-3


def test_forgetting_the_offset_breaks_the_ramp_law_once_a_view_is_mirrored() -> None:
    """The test above can fail: cells taken for regular are misplaced by twice their offset."""
    config = replace(PLAIN, mirror_p=0.5, spatial="independent")
    pairs = [p for p in draw(SHAPES["larger"], config, 40) if p.views[0].mirrored[0] != p.views[1].mirrored[0]]
    places = np.stack(np.meshgrid(*[(np.arange(n // 8) + 0.5) * 8 - 3.5 for n in SIZE], indexing="ij"))
    features = []
    for v in (0, 1):
        for p in pairs:
            matrix, shift = p.to_case(v)
            features.append(torch.from_numpy(np.tensordot(matrix, places, 1) + shift[:, None, None, None]))
    first, second = align(features, pairs, (8, 8, 8), (0.0, 0.0, 0.0))
    assert (first - second)[:, 0].abs().max() == pytest.approx(7.0, abs=0.01)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_inside_is_where_the_coordinates_lie_in_the_case(setting: str, shape: tuple[int, int, int]) -> None:
    for pair in draw(shape, SETTINGS[setting], 5, seed=7):
        for v in (0, 1):
            found, where = pair.inside(v), pair.coordinates(v)
            depth = np.min([np.minimum(x, n - x) for x, n in zip(where, shape, strict=True)], axis=0)
            assert found[depth > 1e-3].all() and not found[depth < -1e-3].any()
            assert found.any()


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_views_leave_the_case_only_where_they_must(setting: str, shape: tuple[int, int, int]) -> None:
    config = SETTINGS[setting]
    for pair in draw(shape, config, 200, seed=3):
        extents = np.array([v.extent for v in pair.views])
        begins = np.array([v.begin for v in pair.views])
        ends, reach = begins + extents, config.padding * extents.min(0)
        span = ends.max(0) - begins.min(0)
        outside = np.maximum(-begins, ends - shape)  # (views, axes), negative where inside
        assert (outside[:, span <= shape] <= 0).all()
        able = extents <= shape + 2 * np.floor(reach)
        assert (outside <= reach)[able].all()
        centred = np.abs(begins + extents / 2 - np.divide(shape, 2)) <= 0.5
        assert centred[~able].all()
        assert all(isinstance(x, int) for v in pair.views for x in v.begin + v.extent)


def test_extreme_scales_keep_both_views_in_the_case() -> None:
    """A small view beside one that is much larger than the case."""
    config = CVAConfig(spatial="independent", scale_p=1.0, scale_range=(0.1, 8.0))
    rng = np.random.default_rng(0)
    for _ in range(2000):
        shape = tuple(int(n) for n in rng.integers(1, 80, 3))
        pair = draw_pair(shape, (16, 24, 20), config, rng)
        assert 0 < pair.overlap <= 1
        assert (pair.rois >= 0).all() and (pair.rois <= 1).all()


@pytest.mark.parametrize("setting", SETTINGS)
def test_rois_are_exact_fractions_of_integer_boxes(setting: str) -> None:
    for shape in SHAPES.values():
        for pair in draw(shape, SETTINGS[setting], 40, seed=5):
            assert pair.rois.shape == (2, 2, 3) and pair.rois.dtype == np.float32
            assert (pair.rois >= 0).all() and (pair.rois <= 1).all()
            for view, roi in zip(pair.views, pair.rois, strict=True):
                backwards = roi[0] > roi[1]
                assert (backwards == view.mirrored).all()
                if pair.rotation is None:
                    voxels = roi.astype(float) * view.extent
                    np.testing.assert_allclose(voxels, np.rint(voxels), atol=1e-4)


@pytest.mark.parametrize("spatial", ["shared", "independent"])
def test_every_relative_position_occurs_and_the_overlap_is_uniform(spatial: str) -> None:
    config = replace(PLAIN, spatial=spatial)
    rng = np.random.default_rng(0)
    pairs = [draw_pair((400, 300, 350), (96, 80, 112), config, rng) for _ in range(3000)]
    begins = np.array([[v.begin for v in p.views] for p in pairs])
    moved = begins[:, 1] - begins[:, 0]
    clear = (moved != 0).all(1)
    corners = np.bincount((moved[clear] > 0) @ [1, 2, 4], minlength=8)
    assert stats.chisquare(corners).pvalue > 1e-3
    overlaps = [p.overlap for p in pairs]
    assert stats.kstest(overlaps, stats.uniform(0.4, 0.4).cdf).pvalue > 0.01
    # The product of the axes' fractions is the volume's, and no axis is preferred.
    shares = 1 - np.abs(moved) / (96, 80, 112)
    np.testing.assert_allclose(shares.prod(1), overlaps, rtol=1e-5)
    assert np.ptp(shares.mean(0)) < 0.015


def test_views_reach_everywhere_in_the_case() -> None:
    pairs = draw((150, 90, 210), PLAIN, 600)
    begins = np.array([v.begin for p in pairs for v in p.views])
    assert (begins.min(0) <= 2).all()
    assert (begins.max(0) >= np.subtract((150, 90, 210), SIZE) - 2).all()


def test_shared_views_are_oriented_alike_and_independent_ones_are_not() -> None:
    shared = draw(SHAPES["larger"], CVAConfig(scale_p=0.5), 100)
    assert all(p.views[0].mirrored == p.views[1].mirrored and p.views[0].extent == p.views[1].extent for p in shared)
    independent = draw(SHAPES["larger"], CVAConfig(scale_p=0.5, spatial="independent"), 100)
    assert any(p.views[0].mirrored != p.views[1].mirrored for p in independent)
    assert any(p.views[0].extent != p.views[1].extent for p in independent)


def test_rotation_is_a_rotation_within_its_range() -> None:
    config = replace(PLAIN, rotation_p=1.0, rotation_degrees=10.0)
    for pair in draw(SHAPES["larger"], config, 50):
        assert pair.rotation is not None
        np.testing.assert_allclose(pair.rotation @ pair.rotation.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(pair.rotation) == pytest.approx(1)
        angle = np.degrees(np.arccos((np.trace(pair.rotation) - 1) / 2))
        assert 0 < angle < 10 * np.sqrt(3) + 0.5
    assert all(p.rotation is None for p in draw(SHAPES["larger"], replace(config, rotation_degrees=0.0), 5))


def test_the_overlap_of_a_small_case_is_recorded_as_it_is() -> None:
    """The published code claimed different regions for identical views of small cases."""
    for pair in draw((10, 9, 12), PLAIN, 20):
        assert pair.overlap == 1.0
        assert pair.views[0].begin == pair.views[1].begin
        np.testing.assert_array_equal(pair.rois[0], pair.rois[1])


def test_feasibility_says_what_the_cases_allow() -> None:
    rng = np.random.default_rng(0)
    roomy = feasibility([(400, 300, 350)] * 4, SIZE, CVAConfig(), rng)
    assert (roomy.cases, roomy.fits, roomy.identical) == (4, 4, 0)
    assert check_feasible(roomy, SIZE, CVAConfig()) is None
    low, median, high = roomy.overlaps
    assert 0.35 < low < 0.5 < median < 0.7 < high < 0.85
    assert "fits into 4 of 4 cases" in str(roomy) and f"{median:.2f}" in str(roomy)


def test_too_little_room_is_warned_about() -> None:
    found = feasibility([(66, 32, 97)] * 3 + [(300, 300, 300)], SIZE, PLAIN, np.random.default_rng(0))
    cramped = feasibility([(66, 32, 97)] * 3 + [(300, 300, 300)], SIZE, replace(PLAIN, padding=0.0), np.random.default_rng(0))
    assert found.fits == 4  # reaching out of the case makes room
    assert cramped.fits == 1 and cramped.identical == 0
    warning = check_feasible(cramped, SIZE, PLAIN)
    assert warning is not None and "only 1 of 4 cases have room" in warning and "smaller patch_size" in warning


def test_no_room_at_all_is_refused_where_a_loss_compares_views() -> None:
    found = feasibility([(20, 16, 30)] * 3 + [(300, 300, 300)], SIZE, PLAIN, np.random.default_rng(0))
    assert found.identical == 3
    with pytest.raises(ValueError, match=r"3 of 4 cases are too small for two different views of 64x32x96 voxels"):
        check_feasible(found, SIZE, PLAIN)
    alone = replace(PLAIN, consistency_weight=0.0, contrastive_weight=0.0)
    assert check_feasible(found, SIZE, alone) is None
