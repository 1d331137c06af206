"""From cases on disk to batches: exact voxels, the same whatever the processes, and clear words when it breaks."""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.cases import ramp, texture, write_case
from scipy import stats
from scipy.ndimage import map_coordinates

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.model.roi_align import roi_align_3d
from nnunetv2_cva.seeding import stream
from nnunetv2_cva.views import cases as cases_module
from nnunetv2_cva.views import loader as loader_module
from nnunetv2_cva.views import resample, resources
from nnunetv2_cva.views.cases import Cases, check_cases
from nnunetv2_cva.views.geometry import Pair, draw_pair
from nnunetv2_cva.views.loader import Batches, PairDataset, make_loader
from nnunetv2_cva.views.resample import air_fraction, window
from nnunetv2_cva.views.resources import fit_into_memory, usable_cores, worker_count

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),  # more workers than cores, on purpose
]

SIZE = (16, 24, 20)
PLAIN = CVAConfig(mirror_p=0.0, rotation_p=0.0, scale_p=0.0, max_air=1.0)
SETTINGS = {
    "crop": PLAIN,
    "mirror": replace(PLAIN, mirror_p=0.5),
    "scale": replace(PLAIN, scale_p=1.0, mirror_p=0.5),
    "rotation": replace(PLAIN, rotation_p=1.0, mirror_p=0.5),
    "all": replace(PLAIN, rotation_p=0.5, scale_p=0.7, mirror_p=0.5, spatial="independent"),
}
SHAPES = {"larger": (45, 52, 61), "padded": (18, 25, 22), "equal": SIZE, "smaller": (9, 13, 3)}


def dataset(folder: Path, keys: list[str], config: CVAConfig, batch: int = 1, **options: Any) -> PairDataset:
    options = {"rank_slice": (0, batch), "seed": 0, **options}
    return PairDataset(Cases(folder, keys), keys, SIZE, config, batch, **options)


def drawn(data: PairDataset, step: int, index: int = 0) -> Pair:
    """The pair that the dataset draws first for this place in the batch."""
    key = data[step]["keys"][index]
    return draw_pair(data.cases.shape(key), SIZE, data.config, stream("views", data.seed, step, index))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six cases of texture, of different shapes."""
    for n in range(6):
        write_case(tmp_path, f"case_{n}", texture((40 + n, 45, 50 - n), seed=n))
    return tmp_path


KEYS = [f"case_{n}" for n in range(6)]


# ---------------------------------------------------------------- voxels


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_views_of_a_ramp_are_the_coordinates_of_their_voxels(setting: str, shape: tuple[int, int, int], tmp_path: Path) -> None:
    """The ramp law through the whole path from the disk."""
    write_case(tmp_path, "ramp", ramp(shape))
    data = dataset(tmp_path, ["ramp"], SETTINGS[setting])
    for step in range(12):
        batch, pair = data[step], drawn(data, step)
        torch.testing.assert_close(batch["rois"], torch.from_numpy(pair.rois))
        for v in (0, 1):
            view, inside = batch["views"][v].numpy(), batch["inside"][v, 0].numpy()
            where = np.stack(pair.coordinates(v))
            depth = np.min([np.minimum(x, n - x) for x, n in zip(where, shape, strict=True)], axis=0)
            assert np.array_equal(inside, depth >= 0) or pair.rotation is not None
            assert np.abs(view - where)[:, inside].max(initial=0) < 1e-3
            assert (view[:, ~inside] == 0).all()


@pytest.mark.parametrize("setting", SETTINGS)
def test_ramp_law_from_case_to_bins(setting: str, tmp_path: Path) -> None:
    """200 pairs as the loader makes them of a case on disk, both views on pooled taps: same bins, same coordinates. Views that
    reach out of the case show zeros there, which are no ramp."""
    write_case(tmp_path, "ramp", ramp((70, 90, 80)))
    data = dataset(tmp_path, ["ramp"], SETTINGS[setting])
    seen, step = 0, 0
    while seen < 200:
        batch, step = data[step], step + 1
        if not batch["inside"].all():
            assert step < 2000, "views rarely lie in the case"
            continue
        seen += 1
        for stride in (1, 2, 4):
            tap = F.avg_pool3d(batch["views"], stride)
            first, second = roi_align_3d(
                tap, batch["rois"], (4, 3, 5), view_size=SIZE, stride=(stride,) * 3, offset=(0.0, 0.0, 0.0)
            )
            assert (first - second).abs().max() < 1e-3


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_resampling_matches_scipy(setting: str, shape: tuple[int, int, int], tmp_path: Path) -> None:
    """Against scipy's trilinear interpolation, voxel by voxel, between the outermost voxel centres."""
    image = texture(shape, seed=1, channels=2)
    write_case(tmp_path, "case", image)
    data = dataset(tmp_path, ["case"], SETTINGS[setting])
    for step in range(6):
        batch, pair = data[step], drawn(data, step)
        for v in (0, 1):
            points = np.stack(pair.coordinates(v)) - 0.5
            between = np.all([(x >= 0) & (x <= n - 1) for x, n in zip(points, shape, strict=True)], axis=0)
            for c in range(2):
                expected = map_coordinates(image[c], points, order=1, mode="nearest")
                assert np.abs(batch["views"][v, c].numpy() - expected)[between].max(initial=0) < 1e-3


@pytest.mark.parametrize("mirrored", list(np.ndindex(2, 2, 2)))
def test_mirroring_is_numpys(mirrored: tuple[bool, bool, bool]) -> None:
    """Against plain indexing, from a part of a larger array, with more planes than a slab and a last slab that is not full."""
    voxels = texture((40, 12, 14), channels=2)[:, 2:37, 1:9, 3:13]
    out = torch.empty(2, 35, 8, 10)
    resample._mirror(voxels, mirrored, out)
    i, j, k = (slice(None, None, -1 if m else 1) for m in mirrored)
    np.testing.assert_array_equal(out.numpy(), voxels[:, i, j, k])


def test_a_case_one_voxel_thick_is_shown(tmp_path: Path) -> None:
    image = texture((1, 30, 26))
    write_case(tmp_path, "thin", image)
    for setting in SETTINGS.values():
        batch = dataset(tmp_path, ["thin"], setting)[0]
        assert batch["views"].isfinite().all()
    batch = dataset(tmp_path, ["thin"], PLAIN)[0]
    assert batch["inside"][0, 0].any(dim=2).any(dim=1).sum() == 1


def test_half_precision_cases_are_read_as_float32(tmp_path: Path) -> None:
    image = texture((40, 30, 26)).astype(np.float16)
    write_case(tmp_path, "half", image)
    data = dataset(tmp_path, ["half"], PLAIN)
    begin = drawn(data, 0).views[0].begin
    views = data[0]["views"]
    i, j, k = (slice(b, b + n) for b, n in zip(begin, SIZE, strict=True))
    assert views.dtype == torch.float32
    np.testing.assert_array_equal(views[0].numpy(), image[:, i, j, k].astype(np.float32))


@pytest.mark.parametrize("setting", SETTINGS)
def test_only_the_voxels_of_the_views_are_read(setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And never from the segmentation, whose file is garbage."""
    write_case(tmp_path, "large", texture((120, 130, 140)))
    config = replace(SETTINGS[setting], spatial="shared")
    data = dataset(tmp_path, ["large"], config)
    opened, boxes = [], []
    get, open_ = blosc2.NDArray.__getitem__, blosc2.open
    monkeypatch.setattr(blosc2.NDArray, "__getitem__", lambda self, key: (boxes.append(key), get(self, key))[1])
    monkeypatch.setattr(blosc2, "open", lambda **kw: (opened.append(kw["urlpath"]), open_(**kw))[1])
    for step in range(8):
        boxes.clear()
        pair = drawn(data, step)
        boxes.clear()
        data[step]
        read = sum(np.prod([s.stop - s.start for s in box[1:]]) for box in boxes)
        windows = [window(pair, v) for v in (0, 1)]
        needed = sum(np.prod(w[:, 1] - w[:, 0]) for w in windows)
        assert 0 < read <= 1.1 * needed
        scale = np.divide(pair.views[0].extent, SIZE).max()
        if pair.rotation is None:
            assert needed <= 2 * np.prod(np.multiply(SIZE, scale) + 3)
    assert {Path(p).name for p in opened} == {"large.b2nd"}


def test_views_that_overlap_are_read_at_once_and_distant_ones_are_not(tmp_path: Path) -> None:
    case = cases_module.Case(str(write_case(tmp_path, "case", texture((120, 130, 140)))))
    reads: list[np.ndarray] = []
    read = case.read
    case.read = lambda box: (reads.append(box), read(box))[1]
    near = [np.array([[8, 24], [8, 32], [8, 28]]), np.array([[12, 28], [8, 32], [8, 28]])]
    far = [near[0], near[0] + [[80], [80], [80]]]
    for boxes, count in ((near, 1), (far, 2)):
        reads.clear()
        parts = loader_module._read(case, boxes)
        assert len(reads) == count
        for part, box in zip(parts, boxes, strict=True):
            np.testing.assert_array_equal(part, read(box))


# ---------------------------------------------------------------- batches


def test_a_batch_is_view_major_and_complete(folder: Path) -> None:
    data = dataset(folder, KEYS, CVAConfig(), batch=3)
    batch = data[5]
    assert batch["views"].shape == (6, 1, *SIZE) and batch["views"].dtype == torch.float32
    assert batch["views"].is_contiguous()
    assert batch["inside"].shape == (6, 1, *SIZE) and batch["inside"].dtype == torch.bool
    assert batch["rois"].shape == (6, 2, 3) and batch["rois"].dtype == torch.float32
    assert batch["overlap"].shape == (3,) and len(batch["keys"]) == 3 and batch["step"] == 5
    assert data.batch_bytes == batch["views"].nbytes + batch["inside"].nbytes
    for b in range(3):
        pair = drawn(data, 5, b)
        torch.testing.assert_close(batch["rois"][[b, 3 + b]], torch.from_numpy(pair.rois))
        assert batch["overlap"][b] == pytest.approx(pair.overlap)


def test_without_a_comparing_loss_there_is_one_view_per_case(folder: Path, tmp_path: Path) -> None:
    alone = CVAConfig(consistency_weight=0.0, contrastive_weight=0.0)
    batch = dataset(folder, KEYS, alone, batch=3)[0]
    assert batch["views"].shape == (3, 1, *SIZE) and batch["rois"].shape == (3, 2, 3)
    assert (batch["overlap"] == 1).all()
    write_case(tmp_path, "exact", texture((SIZE[0] + 1, SIZE[1], SIZE[2] + 2)))
    for step in range(10):  # what fits by itself is not moved out of the case
        assert dataset(tmp_path, ["exact"], replace(PLAIN, consistency_weight=0.0, contrastive_weight=0.0))[step]["inside"].all()


def test_the_cases_of_a_step_are_different_and_all_are_drawn_alike(folder: Path) -> None:
    tiny = PairDataset(Cases(folder, KEYS), KEYS, (2, 3, 2), PLAIN, 4, (0, 4), seed=0)
    counts = dict.fromkeys(KEYS, 0)
    for step in range(150):
        keys = tiny[step]["keys"]
        assert len(set(keys)) == 4
        for key in keys:
            counts[key] += 1
    assert stats.chisquare(list(counts.values())).pvalue > 0.01


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k] for k, v in a.items())


def test_a_step_is_the_same_with_any_number_of_workers_and_after_resuming(folder: Path) -> None:
    data = dataset(folder, KEYS, CVAConfig(rotation_p=0.4, scale_p=0.4), batch=2)
    expected = [data[s] for s in range(5)]
    state = torch.get_rng_state()
    for workers in (0, 1, 3):
        for first in (0, 3):
            loader, note = make_loader(data, first, 5, workers, prefetch=2)
            batches = Batches(loader)
            assert note is None and all(same(expected[step], next(batches)) for step in range(first, 5))
            assert next(batches, None) is None
    assert torch.equal(state, torch.get_rng_state())  # a loader leaves the training's own randomness alone
    assert not same(expected[0], expected[1])
    assert not same(expected[0], dataset(folder, KEYS, CVAConfig(), batch=2, seed=1)[0])


def test_memory_that_is_kept_is_written_in_turn(folder: Path) -> None:
    data = dataset(folder, KEYS, CVAConfig(), batch=2)
    expected = [data[step] for step in range(4)]
    data.keep_memory(3)
    found = [data[step] for step in range(4)]
    assert all(same(expected[step], found[step]) for step in (1, 2, 3))
    for name in ("views", "inside"):
        assert found[3][name].data_ptr() == found[0][name].data_ptr() and found[0][name].is_shared()
        assert len({found[step][name].data_ptr() for step in (0, 1, 2)}) == 3


@pytest.mark.parametrize(("workers", "prefetch"), [(1, 1), (1, 3), (2, 1), (3, 2)])
def test_a_batch_in_use_is_not_written_over(folder: Path, workers: int, prefetch: int) -> None:
    data = dataset(folder, KEYS, CVAConfig(), batch=2)
    batches = Batches(make_loader(data, 0, 12, workers, prefetch)[0])
    for step in range(12):
        batch = next(batches)
        if step % 4 == 0:
            time.sleep(0.3)  # workers go on as far as they may
        assert same(data[step], batch)
    batches.close()


def test_the_parts_of_all_processes_are_the_whole_batch(folder: Path) -> None:
    whole = dataset(folder, KEYS, CVAConfig(), batch=5)[7]
    by_case = {n: whole[n].unflatten(0, (2, 5)) for n in ("views", "rois", "inside")}
    for part in ((0, 2), (2, 4), (4, 5)):
        mine = dataset(folder, KEYS, CVAConfig(), batch=5, rank_slice=part)[7]
        assert mine["keys"] == whole["keys"][slice(*part)]
        assert torch.equal(mine["overlap"], whole["overlap"][slice(*part)])
        for name, values in by_case.items():
            assert torch.equal(mine[name], values[:, slice(*part)].flatten(0, 1))


def test_spawned_workers_load_the_same(folder: Path) -> None:
    data = dataset(folder, KEYS, CVAConfig(), batch=2)
    loader, _ = make_loader(data, 0, 2, 1, 1, context="spawn")
    assert all(same(data[s], b) for s, b in enumerate(Batches(loader)))


def test_a_dataset_is_small_to_send_to_workers(folder: Path) -> None:
    keys = [f"case_{n}" for n in range(6)] + [f"case_{n:06d}" for n in range(10_000)]
    data = PairDataset(Cases(folder, keys), keys, SIZE, CVAConfig(), 2, (0, 2), 0)
    copied = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data)) < 100 * len(keys)
    assert same(dataset(folder, KEYS, CVAConfig(), batch=2)[0], copied_small(copied)[0])


def copied_small(data: PairDataset) -> PairDataset:
    data.keys = data.keys[:6]
    return data


def test_waiting_is_measured(folder: Path) -> None:
    batches = Batches(make_loader(dataset(folder, KEYS, PLAIN), 0, 3, 0, 1)[0])
    next(batches)
    assert batches.waited > 0
    batches.waited = 0.0
    assert len(list(batches)) == 2 and batches.waited > 0
    batches.close()
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)


# ---------------------------------------------------------------- air


def half_air(background: float, noise: float) -> np.ndarray:
    """From 40 on along the last axis is background."""
    image = texture((40, 45, 90))
    image[..., 40:] = background + noise * image[..., 40:]
    return image


@pytest.mark.parametrize(("background", "noise"), [(-3.0, 0.03), (0.0, 0.0)], ids=["dark", "masked normalisation"])
def test_pairs_of_mostly_air_are_drawn_again(background: float, noise: float, tmp_path: Path) -> None:
    write_case(tmp_path, "case", half_air(background, noise))

    def airy(config: CVAConfig) -> float:
        data = dataset(tmp_path, ["case"], config)
        found = []
        for step in range(60):
            view, roi = data[step]["views"][0, 0].numpy(), data[step]["rois"][0].numpy()
            low, high = np.rint(np.sort(roi, axis=0) * SIZE).astype(int)
            shared = view[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
            found.append(np.mean(np.abs(shared - background) < 0.15) > 0.85)
        return float(np.mean(found))

    without, avoided = airy(PLAIN), airy(replace(PLAIN, max_air=0.8))
    assert without > 0.3
    assert avoided < 0.1  # four draws


@pytest.mark.parametrize("setting", ["crop", "mirror", "scale"])
def test_looking_for_air_axis_by_axis_is_looking_point_by_point(setting: str) -> None:
    """The path of rotated pairs, for a rotation by nothing."""
    rng, voxels = np.random.default_rng(0), texture((30, 35, 40), channels=2)
    for _ in range(20):
        pair = draw_pair((30, 35, 40), SIZE, SETTINGS[setting], rng)
        whole = np.array([[0, 30], [0, 35], [0, 40]])
        fast, slow = (resample._samples(voxels, whole, p) for p in (pair, replace(pair, rotation=np.eye(3))))
        np.testing.assert_array_equal(fast, slow)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_fraction_of_air_is_that_of_the_shared_region(setting: str, tmp_path: Path) -> None:
    image = half_air(-3.0, 0.03)
    case = cases_module.Case(str(write_case(tmp_path, "case", image)))
    rng = np.random.default_rng(0)
    for _ in range(30):
        pair = draw_pair(case.shape, SIZE, SETTINGS[setting], rng)
        box = window(pair, 0)
        k, inside = pair.coordinates(0)[2], pair.inside(0)
        low, high = np.sort(pair.rois[0] * SIZE, axis=0).round().astype(int)
        shared = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        expected = np.mean(k[shared][inside[shared]] > 40)
        found = air_fraction(case.read(box), box, pair)
        if 0.05 < expected:  # else the darkest percent is not air
            assert found == pytest.approx(expected, abs=0.12)


def test_tissue_is_not_air_and_a_case_that_has_turned_constant_is_named(tmp_path: Path) -> None:
    case = cases_module.Case(str(write_case(tmp_path, "tissue", texture((45, 50, 40)))))
    flat = cases_module.Case(str(write_case(tmp_path, "flat", np.full((1, 45, 50, 40), 2.5, np.float32))))
    pair = draw_pair((45, 50, 40), SIZE, PLAIN, np.random.default_rng(0))
    box = window(pair, 0)
    assert air_fraction(case.read(box), box, pair) < 0.1
    assert air_fraction(flat.read(box), box, pair) == 1.0
    with pytest.raises(ValueError, match="flat.b2nd: every voxel is 2.5. Remove it"):
        dataset(tmp_path, ["flat"], CVAConfig(rotation_p=0, scale_p=0))[0]
    nearly = np.full((1, 45, 50, 40), 2.5, np.float32)
    nearly[0, -1, -1, -1] = 9.0
    write_case(tmp_path, "nearly", nearly)
    assert (dataset(tmp_path, ["nearly"], CVAConfig(rotation_p=0, scale_p=0, padding=0))[0]["views"] == 2.5).any()


def test_air_means_air_in_every_channel(tmp_path: Path) -> None:
    image = np.concatenate([half_air(-3.0, 0.03), texture((40, 45, 90), seed=9)])
    case = cases_module.Case(str(write_case(tmp_path, "case", image)))
    rng = np.random.default_rng(0)
    for _ in range(10):
        pair = draw_pair(case.shape, SIZE, PLAIN, rng)
        box = window(pair, 0)
        assert air_fraction(case.read(box), box, pair) < 0.2


# ---------------------------------------------------------------- faults


def damage(path: Path, how: str) -> None:
    """Make a good case a bad one."""
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "overwritten":  # the header survives
        content = path.read_bytes()
        middle = len(content) // 2
        path.write_bytes(content[: middle - 40_000] + os.urandom(80_000) + content[middle + 40_000 :])
    elif how == "two axes":
        write_case(path.parent, path.stem, np.zeros((30, 40), np.float32), chunks=None, blocks=None)
    elif how == "no voxels":
        write_case(path.parent, path.stem, np.zeros((1, 0, 40, 30), np.float32), chunks=None, blocks=None)
    elif how == "NaN":
        write_case(path.parent, path.stem, np.full((1, 45, 50, 40), np.nan, np.float32))
    elif how == "Inf":
        image = texture((45, 50, 40))
        image[..., 20, 20, 20] = np.inf
        write_case(path.parent, path.stem, image)
    elif how == "channels":
        write_case(path.parent, path.stem, texture((45, 50, 40), channels=2))


FAULTS = {
    "missing": "there is no such file",
    "empty": "the file is empty",
    "truncated": "cannot be read, is it complete",
    "overwritten": "cannot be read, is it complete",
    "two axes": r"expected four axes .* found shape \(30, 40\)",
    "no voxels": r"expected four axes .* found shape \(1, 0, 40, 30\)",
    "NaN": "holds NaN or Inf",
    "channels": "has 2 channels",
}


@pytest.fixture
def bad_folder(folder: Path, request: pytest.FixtureRequest) -> Path:
    damage(folder / "case_3.b2nd", request.param)
    return folder


@pytest.mark.parametrize(("bad_folder", "reason"), FAULTS.items(), ids=FAULTS, indirect=["bad_folder"])
def test_a_bad_case_is_named_when_it_is_read(bad_folder: Path, reason: str) -> None:
    data = dataset(bad_folder, KEYS, replace(PLAIN, padding=0.0), batch=6)
    with pytest.raises(ValueError, match=rf"case_3\.b2nd: {reason}"):
        for step in range(40):  # a window may miss what is overwritten
            data[step]


@pytest.mark.parametrize(
    ("bad_folder", "reason"), {**FAULTS, "Inf": FAULTS["NaN"]}.items(), ids=[*FAULTS, "Inf"], indirect=["bad_folder"]
)
def test_a_bad_case_is_found_before_training(bad_folder: Path, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)1 of 6 checked cases.*case_3\.b2nd: {reason}"):
        check_cases(Cases(bad_folder, KEYS), 1, 30.0)


def test_the_original_error_is_the_cause(folder: Path) -> None:
    damage(folder / "case_3.b2nd", "truncated")
    with pytest.raises(ValueError) as caught:
        Cases(folder, KEYS).open("case_3")
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert "nnUNetv2_preprocess" in str(caught.value)


def test_a_good_folder_passes_and_says_what_was_checked(folder: Path) -> None:
    progress: list[tuple[int, int]] = []
    checked = check_cases(Cases(folder, KEYS), 1, 30.0, progress=lambda done, total: progress.append((done, total)))
    assert (checked.cases, checked.headers, checked.voxels) == (6, 6, 6)
    assert checked.shapes == [(40 + n, 45, 50 - n) for n in range(6)]
    assert str(checked) == "Checked the headers of 6 of 6 cases and the voxels of 6 for NaN and Inf."
    assert progress == [(n, 6) for n in range(1, 7)]


def test_checking_keeps_to_its_time_and_to_a_spread_subset(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(folder / "case_3.b2nd", "NaN")
    assert check_cases(Cases(folder, KEYS), 1, 0.0).voxels == 0
    monkeypatch.setattr(cases_module, "HEADERS", 3)
    checked = check_cases(Cases(folder, KEYS), 1, 0.0)
    assert checked.shapes == [(40, 45, 50), (42, 45, 48), (45, 45, 45)]
    assert "3 of 6 cases (evenly spread)" in str(checked) and "the others are checked when they are read" in str(checked)


def test_constant_cases_and_many_bad_cases_are_listed(folder: Path) -> None:
    write_case(folder, "case_2", np.full((1, 45, 50, 40), 7, np.float32))
    with pytest.raises(ValueError, match=r"case_2\.b2nd: every voxel is 7"):
        check_cases(Cases(folder, KEYS), 1, 30.0)
    keys = KEYS + [f"gone_{n}" for n in range(13)]
    with pytest.raises(ValueError, match=r"(?s)13 of 19 checked cases.*gone_0.*gone_9.*and 3 more$"):
        check_cases(Cases(folder, keys), 1, 30.0)


def test_more_cases_per_step_than_there_are_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="A step needs 7 cases .* found 6.*different cases"):
        dataset(folder, KEYS, PLAIN, batch=7)


# ---------------------------------------------------------------- workers


@pytest.fixture
def endless(folder: Path) -> Iterator[Batches]:
    """Batches of two workers that go on for ever."""
    handler = signal.getsignal(signal.SIGCHLD)
    batches = Batches(make_loader(dataset(folder, KEYS, PLAIN, batch=2), 0, 10**9, 2, 1)[0])
    yield batches
    batches.close()
    assert signal.getsignal(signal.SIGCHLD) == handler or handler == signal.SIG_DFL


@pytest.mark.timeout(60)
def test_a_case_a_worker_cannot_read_arrives_with_name_and_traceback(folder: Path) -> None:
    loader, _ = make_loader(dataset(folder, KEYS, PLAIN, batch=6), 0, 100, 1, 1)
    damage(folder / "case_3.b2nd", "truncated")
    batches = Batches(loader)
    with pytest.raises(ValueError, match=r"(?s)Original Traceback.*views/cases\.py.*case_3\.b2nd: cannot be read"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("pause", [0.0, 1.0], ids=["while waiting", "between steps"])
def test_a_killed_worker_is_named_with_the_likely_reason(endless: Batches, pause: float) -> None:
    next(endless)
    victim = endless._iterator._workers[0]
    os.kill(victim.pid, signal.SIGKILL)
    time.sleep(pause)  # nothing is raised here, in the middle of a training step
    with pytest.raises(RuntimeError, match=rf"(?s)process died .*{victim.pid}.*memory.*nnUNet_n_proc_DA.*--shm-size"):
        for _ in range(1000):
            next(endless)
    assert not victim.is_alive()


def test_closing_ends_the_workers(endless: Batches) -> None:
    workers = endless._iterator._workers
    next(endless)
    endless.close()
    assert not any(w.is_alive() for w in workers)


def test_full_shared_memory_is_explained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    data = dataset(folder, KEYS, PLAIN)
    monkeypatch.setattr(data, "_load", full)
    with pytest.raises(RuntimeError, match=r"(?s)likely ended for want of memory.*GB memory are free.*--shm-size"):
        next(Batches(make_loader(data, 0, 1, 0, 1)[0]))


def test_the_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(32)), raising=False)
    assert worker_count(None, "cuda", {}) == 12
    assert worker_count(None, "cpu", {}) == 2
    assert worker_count(None, "cuda", {}, processes=8) == 3
    assert worker_count(5, "cuda", {}) == 5
    assert worker_count(0, "cuda", {}) == 0
    assert worker_count(5, "cuda", {"nnUNet_n_proc_DA": "3"}) == 3
    assert worker_count(None, "cuda", {"nnUNet_n_proc_DA": "0"}) == 0
    for text in ("-1", "two", "1.5"):
        with pytest.raises(ValueError, match=f"nnUNet_n_proc_DA: expected a whole number >= 0, found '{text}'"):
            worker_count(None, "cuda", {"nnUNet_n_proc_DA": text})


def test_usable_cores_are_the_least_of_all_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert usable_cores({}, tmp_path) == 16
    assert usable_cores({"SLURM_CPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "6"}, tmp_path) == 6
    assert usable_cores({"SLURM_CPUS_ON_NODE": "8"}, tmp_path, processes=4) == 2
    assert usable_cores({"SLURM_CPUS_PER_TASK": "?"}, tmp_path) == 16
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("350000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert usable_cores({}, tmp_path) == 3
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert usable_cores({}, tmp_path) == 16
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert usable_cores({}, tmp_path) == 16
    (tmp_path / "cpu.max").write_text("50000 100000\n")
    assert usable_cores({}, tmp_path) == 1


def test_limits_of_every_group_around_the_process_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job's limits are deep in the tree where there is no namespace for it."""
    monkeypatch.setattr(resources, "CGROUPS", tmp_path)
    monkeypatch.setattr(resources, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    (tmp_path / "own").write_text("1:cpu:/elsewhere\n0::/slurm/job_7/step_0\n")
    step = tmp_path / "slurm" / "job_7" / "step_0"
    step.mkdir(parents=True)
    (step.parent / "cpu.max").write_text("600000 100000\n")
    (tmp_path / "slurm" / "cpu.max").write_text("max 100000\n")
    assert usable_cores({}, tmp_path) == 6
    (step / "memory.max").write_text("max\n")
    (step.parent / "memory.max").write_text(str(2 * 2**30))
    (step.parent / "memory.current").write_text(str(2 * 2**30))
    if not Path("/proc/meminfo").exists():
        return
    assert resources._memory() == (0, 2 * 2**30)
    # What files hold of it is given back when it is needed.
    (step.parent / "memory.stat").write_text(f"anon {2**20}\nfile {2**30}\ninactive_file {2**29}\nactive_file {2**28}\n")
    assert resources._memory() == (2**29 + 2**28, 2 * 2**30)
    (tmp_path / "own").write_text("0::/\n")
    assert usable_cores({}, tmp_path) == 16


def test_waiting_batches_keep_to_their_share_of_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = 100 * 2**20

    def free(megabytes: int) -> None:
        monkeypatch.setattr(resources, "_shared_memory", lambda: (megabytes * 2**20, megabytes * 2**20))
        monkeypatch.setattr(resources, "_memory", lambda: (2**40, 2**40))

    free(9_600)
    assert fit_into_memory(batch, 8, 2) == (8, 2, None)
    free(9_500)
    workers, prefetch, note = fit_into_memory(batch, 8, 2)
    assert (workers, prefetch) == (8, 1) and note is not None and "1 instead of 2 steps" in note
    free(6_400)
    assert fit_into_memory(batch, 8, 2)[:2] == (8, 1)
    free(3_200)
    assert fit_into_memory(batch, 8, 2)[:2] == (4, 1)
    free(64)
    workers, prefetch, note = fit_into_memory(batch, 8, 2)
    assert workers == 0 and note is not None and "0 instead of 8 workers" in note and "--shm-size" in note
    assert fit_into_memory(batch, 0, 2) == (0, 2, None)
    free(0)
    loader, note = make_loader(dataset(folder, KEYS, PLAIN), 0, 1, 2, 2)
    assert loader.num_workers == 0 and note is not None
    assert len(list(Batches(loader))) == 1


def test_memory_is_reported_in_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "CGROUPS", tmp_path)
    (tmp_path / "memory.max").write_text(str(2 * 2**30))
    (tmp_path / "memory.current").write_text(str(2**30))
    if Path("/proc/meminfo").exists():
        assert "1.0 of 2.0 GB memory are free" in resources.memory_report()
    monkeypatch.setattr(resources, "_memory", lambda: (None, None))
    monkeypatch.setattr(resources, "SHARED_MEMORY", tmp_path / "none")
    assert resources.memory_report() == "the free memory is not known"
    assert fit_into_memory(1, 2, 2) == (2, 2, None)
