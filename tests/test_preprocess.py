"""Images into nnU-Net's preprocessed layout: by nnU-Net, without segmentations, killed and resumed, in parts."""

import contextlib
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from helpers.images import labelled_dataset, nnunet_folders, voxels, write
from helpers.projects import FAST
from helpers.projects import plans as tiny_plans
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2_cva.trainers.nnUNetTrainerCVA import nnUNetTrainerCVA

from nnunetv2_cva import files
from nnunetv2_cva.commands import main
from nnunetv2_cva.datasets import destination, preprocess_case
from nnunetv2_cva.datasets.formats import Unusable
from nnunetv2_cva.datasets.inventory import read_rejected
from nnunetv2_cva.datasets.preprocess_case import _stored
from nnunetv2_cva.views.index import read_index

NAME = "Dataset500_Images"
SHARED = Path(os.environ.get("NNUNETV2_CVA_DATA", Path(__file__).parents[2] / "shared" / "data"))
# Of the images here: isotropic, anisotropic (nnU-Net resamples these slice by slice), finer than the plans.
SPACINGS = [(1.0, 1.0, 1.0), (5.0, 0.8, 0.8), (1.0, 0.7, 0.9)]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """``(raw, preprocessed)``: seven images of several spacings, planned for a target with small views at 1 mm."""
    raw, preprocessed = nnunet_folders(tmp_path, monkeypatch)
    for i in range(7):
        write(raw / NAME / "imagesTr" / f"case_{i}_0000.nii.gz", voxels(i, (24 + i, 38, 33)), SPACINGS[i % 3])
    plan = tiny_plans(view=(16, 24, 16))
    plan["configurations"]["3d_fullres"]["use_mask_for_norm"] = [True]
    plan["foreground_intensity_properties_per_channel"] = {"0": {"mean": 0.0}}
    labelled_dataset(raw, preprocessed, "Dataset004_Target", plan)
    assert call("plan", "--target", "4", "--view", "16", "24", "16", "--batch-size", "2") == 0
    return raw, preprocessed


def call(command, *arguments, processes=1):
    return main.main([command, "-d", "500", *map(str, arguments), "-np", str(processes)])


def data(preprocessed, plans="nnUNetPlansCVA"):
    return preprocessed / NAME / f"{plans}_3d_fullres_images_only"


def result(preprocessed):
    """Everything that preprocessing leaves behind, by file."""
    outside = [preprocessed / NAME / n for n in ("splits_final.json", "rejected.csv", "dataset.json", "nnUNetPlansCVA.json")]
    return {p.name: p.read_bytes() for p in [*sorted(data(preprocessed).iterdir()), *outside]}


def read(path):
    return blosc2.open(str(path), mode="r")[:]


# ---- what comes out


def test_voxels_and_properties_are_nnunets_own(folders):
    """Reference: nnU-Net's preprocessor reading the file itself, as for a test case."""
    raw, preprocessed = folders
    assert call("preprocess") == 0
    manager = PlansManager(json.loads((preprocessed / NAME / "nnUNetPlansCVA.json").read_text()))
    configuration = manager.get_configuration("3d_fullres_cva")
    for i in range(7):
        file = str(raw / NAME / "imagesTr" / f"case_{i}_0000.nii.gz")
        expected, _, properties = DefaultPreprocessor(verbose=False).run_case([file], None, manager, configuration, {})
        found = read(data(preprocessed) / f"case_{i}.b2nd")
        assert found.dtype == np.float32 and np.array_equal(found, expected)
        kept = pickle.loads((data(preprocessed) / f"case_{i}.pkl").read_bytes())
        assert kept.keys() == properties.keys() and kept["spacing"] == properties["spacing"]
        assert kept["shape_before_cropping"] == properties["shape_before_cropping"]


def test_ct_and_transposed_axes_are_nnunets_own(folders, monkeypatch):
    raw, preprocessed = folders
    path = preprocessed / NAME / "nnUNetPlansCVA.json"
    plans = json.loads(path.read_text())
    plans.update(transpose_forward=[2, 0, 1], transpose_backward=[1, 2, 0])
    plans["foreground_intensity_properties_per_channel"] = {
        "0": {"mean": 180.0, "std": 30.0, "percentile_00_5": 150.0, "percentile_99_5": 260.0}
    }
    plans["configurations"]["3d_fullres"].update(normalization_schemes=["CTNormalization"], spacing=[1.5, 1.0, 1.2])
    path.write_text(json.dumps(plans))
    assert call("preprocess") == 0
    manager = PlansManager(plans)
    configuration = manager.get_configuration("3d_fullres_cva")
    shapes = {str(k): tuple(s) for k, s in zip(read_index(data(preprocessed)).keys, read_index(data(preprocessed)).shapes)}
    for i in range(3):
        file = str(raw / NAME / "imagesTr" / f"case_{i}_0000.nii.gz")
        expected, _, _ = DefaultPreprocessor(verbose=False).run_case([file], None, manager, configuration, {})
        assert np.array_equal(read(data(preprocessed) / f"case_{i}.b2nd"), expected) and shapes[f"case_{i}"] == expected.shape


def test_there_are_no_segmentations_and_the_lists_are_complete(folders):
    _, preprocessed = folders
    call("preprocess")
    names = {p.name for p in data(preprocessed).iterdir()}
    assert names == {f"case_{i}.{e}" for i in range(7) for e in ("b2nd", "pkl")} | {"index.tsv", "settings.json"}
    index = read_index(data(preprocessed))
    assert list(index.keys) == [f"case_{i}" for i in range(7)] and index.datasets == (NAME,)
    assert index.root == str(data(preprocessed))
    assert all(tuple(s) == read(data(preprocessed) / f"{k}.b2nd").shape for k, s in zip(index.keys, index.shapes))


def test_blocks_suit_the_view_of_the_pretraining(folders):
    _, preprocessed = folders
    call("preprocess")
    array = blosc2.open(str(data(preprocessed) / "case_1.b2nd"), mode="r")
    blocks, chunks = comp_blosc2_params(array.shape, (16, 24, 16), 4)
    assert (array.blocks, array.chunks) == (blocks, chunks)


def test_half_precision_takes_half_the_space_and_holds_the_same(folders):
    _, preprocessed = folders
    call("preprocess")
    whole = {p.name: read(p) for p in data(preprocessed).glob("*.b2nd")}
    shutil.rmtree(data(preprocessed))
    assert call("preprocess", "--storage", "float16") == 0
    for name, expected in whole.items():
        found = read(data(preprocessed) / name)
        assert found.dtype == np.float16 and np.allclose(found, expected, rtol=1e-3, atol=1e-3)


# ---- again, killed, in parts


def test_again_does_nothing(folders, monkeypatch):
    _, preprocessed = folders
    call("preprocess")
    before = result(preprocessed)
    times = {p: p.stat().st_mtime_ns for p in data(preprocessed).glob("case*")}
    assert call("preprocess") == 0
    assert result(preprocessed) == before and times == {p: p.stat().st_mtime_ns for p in data(preprocessed).glob("case*")}


def test_interrupted_while_writing_and_resumed_it_is_the_same(folders, monkeypatch):
    _, preprocessed = folders
    call("preprocess")
    expected = result(preprocessed)
    shutil.rmtree(data(preprocessed))
    replaced, real = [], os.replace

    def killed(source, target):
        if str(target).endswith("case_3.b2nd"):
            raise KeyboardInterrupt
        replaced.append(target)
        real(source, target)

    monkeypatch.setattr(files.os, "replace", killed)
    assert call("preprocess") == 130
    monkeypatch.undo()
    monkeypatch.setenv("nnUNet_preprocessed", str(preprocessed))
    left = sorted(p.name for p in data(preprocessed).iterdir())
    assert "case_2.b2nd" in left and "case_3.b2nd" not in left and "index.tsv" not in left
    assert not [n for n in left if n.endswith(".partial")]
    assert call("preprocess") == 0 and result(preprocessed) == expected


COMMAND = (
    "import sys\nfrom nnunetv2_cva.commands.main import main\nif __name__ == '__main__': raise SystemExit(main(sys.argv[1:]))"
)


def children(pid):
    """Living processes that ``pid`` has started, and theirs."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = entry.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid and fields[0] != "Z":
                found += [int(entry.parent.name), *children(int(entry.parent.name))]
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks for processes in /proc")
@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_run_again_it_is_the_same(folders, processes):
    raw, preprocessed = folders
    for i in range(7, 40):  # long enough to be killed on the way
        write(raw / NAME / "imagesTr" / f"case_{i}_0000.nii.gz", voxels(i, (60, 40, 30)), (1.9, 1.3, 1.3))
    assert call("plan", "--target", "4", "--view", "16", "24", "16") == 0
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, "preprocess", "-d", "500", "-np", str(processes)], stderr=subprocess.DEVNULL
    )
    while not list(data(preprocessed).glob("*.b2nd")):
        assert process.poll() is None
        time.sleep(0.02)
    workers = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = list(data(preprocessed).glob("*.b2nd"))
    assert 0 < len(done) < 40 and read_index(data(preprocessed)) is None
    until = time.monotonic() + 20
    while any(map(alive, workers)):
        assert time.monotonic() < until, "workers outlive the killed process"
        time.sleep(0.1)
    assert call("preprocess") == 0
    resumed = result(preprocessed)
    shutil.rmtree(data(preprocessed))
    call("preprocess")
    assert resumed == result(preprocessed) and len(read_index(data(preprocessed)).keys) == 40


def test_parts_together_are_the_whole(folders, capsys):
    _, preprocessed = folders
    call("preprocess")
    expected = result(preprocessed)
    shutil.rmtree(data(preprocessed))
    for part, missing in ((2, 5), (0, 2)):
        assert call("preprocess", "-part", part, "-parts", 3) == 0
        assert f"{missing} of 7 cases are still missing" in capsys.readouterr().out
        assert read_index(data(preprocessed)) is None
    assert call("preprocess", "-part", 1, "-parts", 3) == 0
    assert result(preprocessed) == expected


@pytest.mark.slow
def test_several_processes_write_the_same(folders):
    _, preprocessed = folders
    call("preprocess")
    expected = result(preprocessed)
    shutil.rmtree(data(preprocessed))
    assert call("preprocess", processes=2) == 0
    assert result(preprocessed) == expected


def test_a_case_whose_process_is_killed_is_listed_and_the_others_go_on(folders, monkeypatch, capsys):
    """As when memory runs out for one case: here its process is killed, whenever it is tried."""
    _, preprocessed = folders

    def without_case_2(function, items, processes, done, died, *_):
        for item in items:
            done(died(item) if item.case.key == "case_2" else function(item))

    with monkeypatch.context() as patch:
        patch.setattr(preprocess_case, "for_each", without_case_2)
        assert call("preprocess") == 1
    assert "1 cases could not be preprocessed" in capsys.readouterr().out
    ((key, reason, _),) = read_rejected(preprocessed / NAME)
    assert key == "case_2" and "its process was killed, most often because memory ran out" in reason
    assert call("preprocess") == 0 and read_rejected(preprocessed / NAME) == []


def test_a_changed_image_is_preprocessed_again(folders, capsys):
    raw, preprocessed = folders
    call("preprocess")
    times = {p.name: p.stat().st_mtime_ns for p in data(preprocessed).glob("*.b2nd")}
    before = read(data(preprocessed) / "case_3.b2nd")
    write(raw / NAME / "imagesTr" / "case_3_0000.nii.gz", voxels(33, (31, 40, 36)), SPACINGS[0])
    assert call("preprocess") == 0  # planned cases are what they were when they were looked at
    assert np.array_equal(read(data(preprocessed) / "case_3.b2nd"), before)
    assert call("plan", "--target", "4", "--view", "16", "24", "16") == 0
    assert call("preprocess") == 0
    assert "Preprocessing 1 of 7 cases" in capsys.readouterr().err
    index = read_index(data(preprocessed))
    shape = read(data(preprocessed) / "case_3.b2nd").shape
    assert shape != before.shape and tuple(index.shapes[list(index.keys).index("case_3")]) == shape
    changed = {p.name for p in data(preprocessed).glob("*.b2nd") if p.stat().st_mtime_ns != times[p.name]}
    assert changed == {"case_3.b2nd"}


def test_an_image_that_nobody_has_looked_at_is_not_preprocessed(folders):
    raw, preprocessed = folders
    write(raw / NAME / "imagesTr" / "case_3_0000.nii.gz", voxels(33, (31, 40, 36)), SPACINGS[0])
    assert call("preprocess") == 1
    assert "have changed since plan looked at them: run plan again" in read_rejected(preprocessed / NAME)[0][1]


def test_a_damaged_result_is_made_again(folders):
    _, preprocessed = folders
    call("preprocess")
    expected = result(preprocessed)
    (data(preprocessed) / "case_1.b2nd").write_bytes(b"")
    assert call("preprocess") == 0 and result(preprocessed) == expected


def test_a_part_that_ends_does_not_disturb_one_that_tries_a_failed_case_again(folders, monkeypatch):
    """Another machine's part ends while case_4, which has failed before, is being written."""
    _, preprocessed = folders
    call("preprocess")
    expected = result(preprocessed)
    (data(preprocessed) / "case_4.b2nd").unlink()
    (data(preprocessed) / "case_4.failed").write_text("an earlier run's reason")
    plans = json.loads((preprocessed / NAME / "nnUNetPlansCVA.json").read_text())
    target, real, ended = destination.Destination(preprocessed / NAME, plans, "3d_fullres_cva"), blosc2.asarray, []

    def meanwhile(*args, **options):
        array = real(*args, **options)
        if "urlpath" in options:
            ended.append(destination.finish(target))
        return array

    monkeypatch.setattr(preprocess_case.blosc2, "asarray", meanwhile)
    assert call("preprocess") == 0
    assert ended == [None] and result(preprocessed) == expected


@pytest.mark.parametrize(
    ("name", "abandoned"),
    [
        (f"{files.HOST}.{os.getpid()}", False),
        (f"{files.HOST}.{2**22 + 1}", True),
        (f"{files.HOST}.1", False),
        ("elsewhere.1", False),
    ],
    ids=["own", "ended", "running", "another host's"],
)
def test_only_files_of_processes_that_have_ended_are_removed(tmp_path, name, abandoned):
    """No process has a number above 2**22 (Linux); process 1 always lives; of another machine only age can tell."""
    partial = tmp_path / f"case.b2nd.{name}.partial"
    partial.write_bytes(b"")
    files.remove_abandoned(tmp_path)
    assert partial.exists() != abandoned
    partial.write_bytes(b"")
    os.utime(partial, (1, 1))
    files.remove_abandoned(tmp_path)
    assert partial.exists() != (abandoned or name == "elsewhere.1")


@pytest.mark.parametrize("where", ["blosc2", "list"])
def test_a_full_disk_stops_with_one_sentence(folders, monkeypatch, capsys, where):
    _, preprocessed = folders

    real = blosc2.asarray

    def full(*args, **options):
        if where == "blosc2" and "urlpath" not in options:
            return real(*args, **options)
        raise RuntimeError("Error while creating the NDArray") if where == "blosc2" else OSError(28, "No space left on device")

    module, name = (preprocess_case.blosc2, "asarray") if where == "blosc2" else (destination, "write_index")
    with monkeypatch.context() as patch:
        patch.setattr(module, name, full)
        assert call("preprocess") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot be written to" in error and "GB are free there. Make room" in error and str(data(preprocessed)) in error
    assert not list(data(preprocessed).glob("*.failed")) and not list(data(preprocessed).glob("*.partial"))
    assert call("preprocess") == 0


def test_whatever_happens_to_one_case_the_others_go_on(folders, monkeypatch, capsys):
    _, preprocessed = folders
    real = DefaultPreprocessor.run_case_npy

    def odd(self, images, *args):
        if images.shape[1] == 24 + 5:
            raise ZeroDivisionError("nobody thought of this")
        return real(self, images, *args)

    monkeypatch.setattr(DefaultPreprocessor, "run_case_npy", odd)
    assert call("preprocess") == 1
    assert [row[:2] for row in read_rejected(preprocessed / NAME)] == [
        ("case_5", "preprocessing: ZeroDivisionError: nobody thought of this")
    ]
    assert len(read_index(data(preprocessed)).keys) == 6


# ---- what goes wrong


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: x * np.float32(np.nan), "NaN or Inf"),
        (lambda x: np.where(x > 0, np.inf, x).astype(np.float32), "NaN or Inf"),  # clipped in half precision
        (lambda x: x[:, :4], "4x20x22 voxels after resampling"),
        (lambda x: x + 1e9, "all voxels of a channel are the same"),  # nothing is left of their differences
        (lambda x: np.concatenate([x, np.zeros_like(x)]), "all voxels of a channel are the same"),
    ],
    ids=["NaN", "Inf", "thin", "far from 0", "one of two channels"],
)
def test_what_a_training_would_refuse_is_not_stored(change, match):
    image = np.random.default_rng(0).normal(size=(1, 18, 20, 22)).astype(np.float32)
    assert _stored(image, "float16").shape == image.shape
    with pytest.raises(Unusable, match=match):
        _stored(change(image).astype(np.float32), "float32")


def test_a_case_that_fails_is_listed_the_others_go_on_and_it_can_be_mended(folders, capsys):
    raw, preprocessed = folders
    file = raw / NAME / "imagesTr" / "case_4_0000.nii.gz"
    good = file.read_bytes()
    file.write_bytes(good[: len(good) // 2])
    assert call("preprocess") == 1
    assert "1 cases could not be preprocessed" in capsys.readouterr().out
    assert read_rejected(preprocessed / NAME) == [
        ("case_4", "preprocessing: truncated: the compressed data ends early", str(file))
    ]
    assert "case_4" not in read_index(data(preprocessed)).keys
    splits = json.loads((preprocessed / NAME / "splits_final.json").read_text())
    assert "case_4" not in {k for fold in splits for side in fold.values() for k in side}
    file.write_bytes(good)
    assert call("preprocess") == 0
    assert read_rejected(preprocessed / NAME) == [] and "case_4" in read_index(data(preprocessed)).keys
    assert not list(data(preprocessed).glob("*.failed"))


def test_cases_made_with_other_settings_are_not_mixed(folders, capsys):
    _, preprocessed = folders
    call("preprocess")
    before = result(preprocessed)
    assert call("preprocess", "--storage", "float16") == 2
    assert "made with other settings (storage: float32, now float16)" in capsys.readouterr().err
    assert call("plan", "--preset", "tiny") == 0 and call("preprocess") == 2
    assert "spacing: [1.0, 1.0, 1.0], now [2.0, 2.0, 2.0]" in capsys.readouterr().err
    assert {k: v for k, v in result(preprocessed).items() if k.startswith("case")} == {
        k: v for k, v in before.items() if k.startswith("case")
    }


def test_too_little_space_is_noticed_before_writing(folders, monkeypatch, capsys):
    _, preprocessed = folders
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(destination.shutil, "disk_usage", lambda _: usage(1000))
    assert call("preprocess") == 2
    assert "7 cases need about" in capsys.readouterr().err and not list(data(preprocessed).iterdir())


def test_the_size_is_estimated_from_the_shapes_after_preprocessing(folders):
    _, preprocessed = folders
    plans = json.loads((preprocessed / NAME / "nnUNetPlansCVA.json").read_text())
    target = destination.Destination(preprocessed / NAME, plans, "3d_fullres_cva")
    estimated = destination.needed_bytes(target, destination.read_accepted(preprocessed / NAME))
    call("preprocess")
    raw = sum(read(p).nbytes for p in data(preprocessed).glob("*.b2nd"))
    assert estimated == int(raw * destination.TYPICAL_RATIO)
    assert destination.needed_bytes(target, []) == 0


def test_the_users_own_splits_stay(folders):
    _, preprocessed = folders
    path = preprocessed / NAME / "splits_final.json"
    mine = [{"train": [f"case_{i}" for i in range(6)], "val": ["case_6"]}]
    path.write_text(json.dumps(mine))
    call("preprocess")
    assert json.loads(path.read_text()) == mine


def test_the_users_own_splits_are_kept_beside_new_ones_when_the_cases_change(folders, capsys):
    raw, preprocessed = folders
    path = preprocessed / NAME / "splits_final.json"
    ours = json.loads(path.read_text())
    again = ("plan", "--target", "4", "--view", "16", "24", "16")
    extra = write(raw / NAME / "imagesTr" / "case_7_0000.nii.gz", voxels(7, (24, 38, 33)))
    assert call(*again) == 0 and "yours: " not in capsys.readouterr().out
    assert json.loads(path.read_text()) != ours and not list(path.parent.glob("*.bak*"))
    mine = json.dumps([{"train": [f"case_{i}" for i in range(7)], "val": ["case_7"]}])
    extra.unlink()
    for moved in ("splits_final.json.bak", "splits_final.json.bak2"):
        path.write_text(mine)
        assert call(*again) == 0
        assert f"yours: {path.parent / moved}" in capsys.readouterr().out
        assert (path.parent / moved).read_text() == mine and json.loads(path.read_text()) == ours
    call("preprocess")
    assert "yours: " not in capsys.readouterr().out


def test_unplanned_datasets_are_not_preprocessed(folders, capsys):
    raw, preprocessed = folders
    assert main.main(["preprocess", "-d", "Dataset999_None"]) == 2 and "Plan it first" in capsys.readouterr().err
    assert call("preprocess", "-part", 2, "-parts", 2) == 2 and "from 0 to 1" in capsys.readouterr().err
    assert call("preprocess", "-parts", 0) == 2 and "expected -parts 1 or more" in capsys.readouterr().err
    assert call("preprocess", "-c", "nope") == 2 and "Found: 3d_fullres, 3d_fullres_cva" in capsys.readouterr().err


# ---- training on it


def trainer(preprocessed, recipe, name=NAME):
    plans = json.loads((preprocessed / name / "nnUNetPlansCVA.json").read_text())
    plans["configurations"]["3d_fullres_cva"]["cva"].update(FAST)
    dataset = json.loads((preprocessed / name / "dataset.json").read_text())
    return recipe({**plans, "continue_training": False}, "3d_fullres_cva", "all", dataset, torch.device("cpu"))


def test_the_pretraining_trainer_trains_on_it(folders, monkeypatch):
    _, preprocessed = folders
    monkeypatch.setenv("nnUNet_compile", "f")
    call("preprocess")
    with contextlib.redirect_stdout(io.StringIO()):
        run = trainer(preprocessed, nnUNetTrainerCVA)
        run.run_training()
    assert len(run.history.epochs) == FAST["epochs"] and np.isfinite(run.history.epochs[-1]["total_loss"])


def test_a_training_does_not_take_what_other_plans_have_made(folders):
    """Plans can be made again under the same name, and what was preprocessed stays."""
    _, preprocessed = folders
    call("preprocess")
    file = preprocessed / NAME / "nnUNetPlansCVA.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"]["spacing"] = [1.0, 1.0, 2.0]
    file.write_text(json.dumps(plans))
    with pytest.raises(ValueError, match=r"made with other settings \(spacing: \[1.*\], now \[1.0, 1.0, 2.0\]\)"):
        trainer(preprocessed, nnUNetTrainerCVA).initialize()


def test_stock_training_stops_at_a_folder_whose_name_says_why(folders):
    _, preprocessed = folders
    call("preprocess")
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(AssertionError, match="images_only"):
        trainer(preprocessed, nnUNetTrainer).initialize()


# ---- real volumes


@pytest.mark.skipif(not (SHARED / "Dataset101_BodyCT").is_dir(), reason="needs the shared volumes")
def test_real_ct(tmp_path, monkeypatch):
    _, preprocessed = nnunet_folders(tmp_path, monkeypatch)
    monkeypatch.setenv("nnUNet_raw", str(SHARED))
    for command in (["plan", "--modality", "CT", "--preset", "tiny"], ["preprocess"]):
        assert main.main([command[0], "-d", "101", *command[1:], "-np", "1"]) == 0
    index = read_index(preprocessed / "Dataset101_BodyCT" / "nnUNetPlansCVA_3d_fullres_images_only")
    assert index.shapes.tolist() == [[1, 123, 94, 90], [1, 84, 76, 92]]
    for key in index.keys:
        case = read(Path(index.root) / f"{key}.b2nd")
        assert np.isfinite(case).all() and 0.3 < case.std() < 2 and abs(case.mean()) < 1.5


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "Dataset100_HeadMR").is_dir(), reason="needs the shared volumes")
def test_real_mr_with_spacings_from_below_one_to_seven_mm(tmp_path, monkeypatch):
    _, preprocessed = nnunet_folders(tmp_path, monkeypatch)
    monkeypatch.setenv("nnUNet_raw", str(SHARED))
    for command in (["plan", "--preset", "tiny"], ["preprocess"]):
        assert main.main([command[0], "-d", "100", *command[1:], "-np", "1"]) == 0
    index = read_index(preprocessed / "Dataset100_HeadMR" / "nnUNetPlansCVA_3d_fullres_images_only")
    assert len(index.keys) == 21 and read_rejected(preprocessed / "Dataset100_HeadMR") == []
    millimetres = index.shapes[:, 1:] * 2.0
    assert (millimetres > 90).all() and (millimetres < 280).all()
