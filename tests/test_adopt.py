"""Preprocessed data used where it lies: trees of nnssl, datasets of nnU-Net; the index, and drawing from several datasets."""

import contextlib
import io
import json
import tracemalloc

import blosc2
import numpy as np
import pytest
import torch
from helpers.images import nnunet_folders, write_several
from helpers.projects import FAST
from helpers.projects import plans as tiny_plans
from nnunetv2_cva.trainers.nnUNetTrainerCVA import nnUNetTrainerCVA

from nnunetv2_cva.commands import main
from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.datasets import adopt as adopting
from nnunetv2_cva.datasets.inventory import read_rejected
from nnunetv2_cva.views.index import Entry, read_index, sampling_weights, write_index
from nnunetv2_cva.views.loader import Cases, PairDataset

NAME = "Dataset746_Adopted"


def case(path, seed=0, shape=(1, 30, 34, 28)):
    """A z-scored blosc2 case as nnssl and nnU-Net write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    blosc2.asarray(np.cumsum(voxels, axis=1) / 5, urlpath=str(path))
    path.with_suffix(".pkl").write_bytes(b"properties")
    return path


def make_tree(root):
    """Nine images of six subjects, as an OpenMind user has them (FORMATS.md, section 3), with masks and a damaged file."""
    base = root / "Dataset745_OpenMind"
    for s in range(6):
        for n, image in enumerate(("T1w", "T2w")[: 1 + (s < 3)]):
            folder = base / "nnsslPlans_onemmiso" / "OpenNeuro" / f"ds00{s // 3}" / f"sub-{s:02d}" / "ses-1"
            case(folder / f"{image}.b2nd", 10 * s + n, (1, 30 + s, 34, 28))
            for mask in ("anon", "anat"):
                case(folder / f"{image}__{mask}.b2nd", s)
    (folder / "damaged.b2nd").write_bytes(b"no blosc2")
    (folder / "empty.b2nd").write_bytes(b"")
    case(folder / "a\ttab.b2nd")
    plans = {"configurations": {"onemmiso": {"spacing": [1, 1, 1]}, "noresample": {"spacing": None}}}
    (base / "nnsslPlans.json").write_text(json.dumps(plans))
    (base / "splits_final.json").write_text(json.dumps({"train": [], "val": []}))
    (base / "dataset_fingerprint.json").write_text("{}")
    return base


def broken(path, value=np.nan, where=(0, 3, 4, 5)):
    """A case with a value that it must not have."""
    path.unlink(missing_ok=True)
    array = blosc2.open(str(case(path, seed=77)), mode="a")
    array[tuple(slice(n, n + 1) for n in where) if where else ...] = value
    return path


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """``(dataset folder of nnssl, nnU-Net's preprocessed folder)``."""
    _, preprocessed = nnunet_folders(tmp_path, monkeypatch)
    return make_tree(tmp_path / "nnssl_preprocessed"), preprocessed


def everything(folder):
    return {str(p): p.stat().st_mtime_ns for p in sorted(folder.rglob("*"))}


def adopt(*arguments, name=NAME):
    return main.main(["plan", "-d", name, "--adopt", *map(str, arguments), "-np", "1"])


def index_of(preprocessed, configuration="3d_fullres", name=NAME):
    return read_index(preprocessed / name / f"nnUNetPlansCVA_{configuration}_images_only")


# ---- nnssl


def test_a_tree_is_adopted_without_touching_it(tree, capsys):
    base, preprocessed = tree
    before = everything(base)
    assert adopt(base) == 0
    assert everything(base) == before
    out = capsys.readouterr().out
    assert "9 cases to pretrain on where they lie" in out and "3 rejected" in out and "preset ssl3d_resencl" in out
    assert "nnUNetv2_cva preprocess" not in out and "nnUNetv2_train 746 3d_fullres_cva all" in out
    index = index_of(preprocessed)
    assert index.root == str(base / "nnsslPlans_onemmiso") and len(index.keys) == 9
    assert index.keys[0] == "OpenNeuro/ds000/sub-00/ses-1/T1w" and not [k for k in index.keys if "__an" in k]
    assert index.datasets == ("OpenNeuro__ds000", "OpenNeuro__ds001") and np.bincount(index.dataset_of).tolist() == [6, 3]
    assert [tuple(s) for s in index.shapes] == [Cases(index.root, index.keys).open(k).array.shape for k in index.keys]
    rejected = {key.rpartition("/")[2]: reason for key, reason, _ in read_rejected(preprocessed / NAME)}
    assert rejected["damaged"].startswith("unreadable: ") and rejected["empty"] == "empty file"
    assert "cannot be printed" in rejected["a\ttab"] and len(rejected) == 3
    # No copy: only lists and plans are in nnU-Net's folder.
    assert sum(p.stat().st_size for p in preprocessed.rglob("*") if p.is_file()) < 20_000


def test_voxels_are_looked_at_once(tree, monkeypatch, capsys):
    """NaN, constant cases and duplicates, however they are chunked, are found; what was looked at is remembered."""
    base, preprocessed = tree
    folder = base / "nnsslPlans_onemmiso" / "OpenNeuro" / "ds000" / "sub-00" / "ses-1"
    broken(folder / "nan.b2nd")
    broken(folder / "inf.b2nd", np.inf)
    broken(folder / "zero.b2nd", 0, where=None)
    original = blosc2.open(str(folder / "T1w.b2nd"), mode="r")
    blosc2.asarray(original[:], urlpath=str(folder / "twin.b2nd"), chunks=(1, 7, 11, 13), blocks=(1, 5, 5, 5))
    assert adopt(base, "--preset", "tiny") == 0
    rejected = {key.rpartition("/")[2]: reason for key, reason, _ in read_rejected(preprocessed / NAME)}
    assert rejected["nan"] == rejected["inf"] == "NaN or Inf in 1 voxels" and rejected["zero"] == "all voxels are 0"
    assert rejected["twin"] == "duplicate of OpenNeuro/ds000/sub-00/ses-1/T1w"
    assert len(index_of(preprocessed).keys) == 9
    looked, real = [], adopting.voxels_of_case
    monkeypatch.setattr(adopting, "voxels_of_case", lambda c: looked.append(c.key) or real(c))
    assert adopt(base, "--preset", "tiny") == 0 and looked == []
    broken(folder / "T2w.b2nd", np.nan)
    assert adopt(base, "--preset", "tiny") == 0 and [k.rpartition("/")[2] for k in looked] == ["T2w"]
    assert len(index_of(preprocessed).keys) == 8
    assert adopt(base, "--preset", "tiny", "--headers-only") == 0 and len(index_of(preprocessed).keys) == 13


def test_adopted_data_need_not_be_named_again(tree, capsys):
    base, preprocessed = tree
    assert adopt(base, "--preset", "tiny") == 0
    assert main.main(["plan", "-d", NAME, "--preset", "tiny", "-np", "1"]) == 0
    assert "9 cases to pretrain on where they lie" in capsys.readouterr().out


def test_a_dataset_is_of_images_or_of_preprocessed_data(tree, tmp_path, capsys):
    """Else the index of one would stay for the plans of the other."""
    base, preprocessed = tree
    write_several(tmp_path / "images", 3)
    assert adopt(base, "--preset", "tiny") == 0
    assert main.main(["plan", "-d", NAME, "--images", str(tmp_path / "images"), "-np", "1"]) == 2
    assert f"{NAME} uses preprocessed data where it lies. Give this another dataset (-d)" in capsys.readouterr().err
    images = ("--images", str(tmp_path / "images"), "--preset", "tiny", "-np", "1")
    assert main.main(["plan", "-d", "Dataset747_Images", *images]) == 0
    assert adopt(base, name="Dataset747_Images") == 2 and "uses images" in capsys.readouterr().err


def test_images_of_a_subject_are_on_one_side_of_the_split(tree):
    base, preprocessed = tree
    adopt(base)
    splits = json.loads((preprocessed / NAME / "splits_final.json").read_text())
    for fold in splits:
        train, val = ({k.split("/")[2] for k in fold[side]} for side in ("train", "val"))
        assert not train & val and len(train | val) == 6


def test_nothing_is_left_to_preprocess_and_it_can_be_looked_at(tree, capsys):
    base, preprocessed = tree
    assert adopt(base, "--preset", "tiny", "--view", "16", "24", "16") == 0
    capsys.readouterr()
    assert main.main(["preprocess", "-d", NAME]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main.main(["peek", "-d", NAME]) == 0
    out = capsys.readouterr().out
    assert "9 preprocessed cases" in out and "6 pairs of views" in out and "OpenNeuro__ds001" in out
    assert (preprocessed / NAME / "views.png").is_file()


def test_pairs_of_views_are_read_from_the_tree(tree):
    base, preprocessed = tree
    adopt(base)
    index = index_of(preprocessed)
    keys = [str(k) for k in index.keys]
    batch = PairDataset(Cases(index.root, keys), keys, (16, 24, 16), CVAConfig(), 4, (0, 4), 0)[0]
    assert batch["views"].shape == (8, 1, 16, 24, 16) and batch["views"].isfinite().all()
    assert set(batch["keys"]) <= set(keys)


def test_the_trainer_trains_on_a_tree(tree, monkeypatch):
    base, preprocessed = tree
    monkeypatch.setenv("nnUNet_compile", "f")
    assert adopt(base, "--preset", "tiny", "--view", "16", "24", "16") == 0
    folder = preprocessed / NAME
    plans = json.loads((folder / "nnUNetPlansCVA.json").read_text())
    plans["configurations"]["3d_fullres_cva"]["cva"].update(FAST)
    dataset = json.loads((folder / "dataset.json").read_text())
    for fold in ("all", 0):
        with contextlib.redirect_stdout(io.StringIO()):
            run = nnUNetTrainerCVA({**plans, "continue_training": False}, "3d_fullres_cva", fold, dataset, torch.device("cpu"))
            run.run_training()
        assert np.isfinite(run.history.epochs[-1]["total_loss"])


def test_the_folder_of_one_configuration_can_be_given(tree):
    base, preprocessed = tree
    case(base / "nnsslPlans_noresample" / "OpenNeuro" / "ds000" / "sub-00" / "ses-1" / "T1w.b2nd")
    for given, spacing, count in (
        ("nnsslPlans_noresample", None, 1),
        ("nnsslPlans_onemmiso", (1.0, 1.0, 1.0), 12),
        ("", (1.0, 1.0, 1.0), 12),
    ):
        found = adopting.open_nnssl(base / given if given else base)
        assert (found.spacing, len(found.names)) == (spacing, count)


def test_a_folder_that_is_no_tree_is_an_error(tmp_path, monkeypatch, capsys):
    nnunet_folders(tmp_path, monkeypatch)
    assert adopt(tmp_path) == 2
    assert "expected a folder nnsslPlans_onemmiso in it, found none of the kind" in capsys.readouterr().err


def test_a_tree_cannot_be_adopted_into_its_own_folder(tmp_path, monkeypatch, capsys):
    """nnssl's splits and fingerprint would be replaced."""
    _, preprocessed = nnunet_folders(tmp_path, monkeypatch)
    base = make_tree(preprocessed)
    before = everything(base)
    assert adopt(base, name="Dataset745_OpenMind") == 2
    assert "dataset of its own" in capsys.readouterr().err and everything(base) == before


# ---- nnU-Net


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """Two preprocessed datasets of nnU-Net with segmentations: 6 cases and 2."""
    _, preprocessed = nnunet_folders(tmp_path, monkeypatch)
    for number, (name, count) in enumerate((("Dataset004_A", 6), ("Dataset005_B", 2))):
        plans = tiny_plans(view=(16, 24, 16))
        plans["foreground_intensity_properties_per_channel"] = {"0": {"mean": 0.0}}
        for i in range(count):
            case(preprocessed / name / "nnUNetPlans_3d_fullres" / f"c_{i}.b2nd", 100 * number + i)
            case(preprocessed / name / "nnUNetPlans_3d_fullres" / f"c_{i}_seg.b2nd", i)
        (preprocessed / name / "nnUNetPlans.json").write_text(json.dumps({**plans, "dataset_name": name}))
        (preprocessed / name / "dataset.json").write_text(json.dumps({"channel_names": {"0": "MR"}, "labels": {"background": 0}}))
    return preprocessed


def test_preprocessed_datasets_are_used_in_place(datasets, capsys):
    before = everything(datasets / "Dataset004_A"), everything(datasets / "Dataset005_B")
    assert adopt(4, 5) == 0
    assert before == (everything(datasets / "Dataset004_A"), everything(datasets / "Dataset005_B"))
    index = index_of(datasets)
    assert index.root == str(datasets) and len(index.keys) == 8
    assert index.keys[0] == "Dataset004_A/nnUNetPlans_3d_fullres/c_0" and index.datasets == ("Dataset004_A", "Dataset005_B")
    plans = json.loads((datasets / NAME / "nnUNetPlansCVA.json").read_text())
    assert plans["configurations"]["3d_fullres"]["architecture"] == tiny_plans()["configurations"]["3d_fullres"]["architecture"]
    assert "nnUNetPlans of Dataset004_A, which the cases were preprocessed with" in capsys.readouterr().out


def test_validation_cases_of_a_target_are_recognised_by_their_names(datasets, tmp_path, capsys):
    folds = [{"train": [f"c_{i}" for i in range(4)], "val": ["c_4", "c_5"]}]
    (datasets / "Dataset004_A" / "splits_final.json").write_text(json.dumps(folds))
    assert adopt(4, 5, "--target", 4) == 0
    warning = "WARNING: 2 of 2 validation cases of fold 0 of Dataset004_A are in the pretraining set (c_4, c_5)"
    assert warning in capsys.readouterr().out
    assert main.main(["plan", "-d", NAME, "--keep-plans", "--target", "4", "-p", "nnUNetPlansCVA"]) == 0
    assert warning in capsys.readouterr().out
    (datasets / "Dataset004_A" / "nnUNetPlansCVA.json").unlink()
    assert adopt(4, 5, "--target", 4, "--hold-out", 1) == 2
    assert "Dataset004_A has the folds 0 to 0" in capsys.readouterr().err
    for _ in range(2):  # the second time because it is remembered
        assert main.main(["plan", "-d", NAME, "--target", "4", "--hold-out", "0", "-np", "1"]) == 0
        index = index_of(datasets)
        assert len(index.keys) == 6 and not [k for k in index.keys if k.endswith(("A/nnUNetPlans_3d_fullres/c_4", "s/c_5"))]
    assert {row[1] for row in read_rejected(datasets / NAME)} == {"held out: a target validates on it"}


def test_what_cannot_be_recognised_is_said(tree, datasets, capsys):
    base, _ = tree
    assert adopt(base, "--target", 4, "--preset", "tiny") == 0
    assert "could not check whether Dataset004_A validates on images that are pretrained on" in capsys.readouterr().out
    assert adopt(base, "--target", 4, "--preset", "tiny", "--hold-out", 0, "-p", "nnUNetOther") == 2
    assert "Dataset004_A cannot be compared with the pretraining set" in capsys.readouterr().err


def test_other_spacings_are_pointed_out(datasets, capsys):
    path = datasets / "Dataset005_B" / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    plans["configurations"]["3d_fullres"]["spacing"] = [3.0, 1.0, 1.0]
    path.write_text(json.dumps(plans))
    assert adopt(4, 5) == 0 and "WARNING: the network will see them at different scales" in capsys.readouterr().out
    assert adopt(5, "--preset", "tiny", name="Dataset747_Other") == 0
    assert "preprocessed to 3x1x1 mm, these plans are for 2x2x2 mm" in capsys.readouterr().out


def test_a_dataset_without_preprocessed_cases_is_an_error(datasets, capsys):
    assert adopt(4, "--target-plans", "Other") == 2 and "Name its plans with --target-plans" in capsys.readouterr().err
    for path in (datasets / "Dataset005_B" / "nnUNetPlans_3d_fullres").iterdir():
        path.unlink()
    assert adopt(5) == 2 and "no preprocessed cases in" in capsys.readouterr().err


def test_cases_of_another_number_of_channels_are_rejected(datasets):
    case(datasets / "Dataset004_A" / "nnUNetPlans_3d_fullres" / "two.b2nd", 0, (2, 30, 34, 28))
    assert adopt(4) == 0
    assert [row[:2] for row in read_rejected(datasets / NAME)] == [("two", "channels 0, 1, most cases have channels 0")]
    assert len(index_of(datasets).keys) == 6


# ---- the index


def entries(n):
    return [Entry(f"study/ds{i % 7}/sub-{i:06d}/T1", (1, 100 + i % 50, 200, 180), f"ds{i % 7}") for i in range(n)]


def test_what_is_written_is_read_whatever_the_order(tmp_path):
    wanted = entries(50)
    write_index(tmp_path, wanted[::-1], "/r")
    index = read_index(tmp_path)
    ordered = sorted(wanted, key=lambda e: e.key)
    assert index.root == "/r" and list(index.keys) == [e.key for e in ordered]
    assert [tuple(s) for s in index.shapes] == [e.shape for e in ordered]
    assert [index.datasets[d] for d in index.dataset_of] == [e.dataset for e in ordered]
    chosen = [wanted[3], wanted[40], wanted[9]]
    assert [index.datasets[d] for d in index.dataset_of_keys([e.key for e in chosen])] == [e.dataset for e in chosen]


def test_names_that_sort_differently_as_lines_and_as_names(tmp_path):
    names = ["a", "a b", "a-b", "a/b", "a_b", "ab", "é", "Z"]
    write_index(tmp_path, [Entry(n, (1, 2, 3, 4), n) for n in names])
    index = read_index(tmp_path)
    assert [index.datasets[d] for d in index.dataset_of_keys(names)] == names


def test_no_index_is_none_and_a_damaged_one_an_error(tmp_path):
    assert read_index(tmp_path) is None
    write_index(tmp_path, entries(3))
    assert read_index(tmp_path).root == str(tmp_path)
    path = tmp_path / "index.tsv"
    path.write_text(path.read_text()[:-12])
    with pytest.raises(ValueError, match="index.tsv is damaged. Delete it"):
        read_index(tmp_path)


def test_a_large_index_takes_little_memory(tmp_path):
    write_index(tmp_path, entries(20_000))
    tracemalloc.start()
    index = read_index(tmp_path)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 20_000 * (4 * 24 + 4 * 4 + 8 + 40) and len(index.keys) == 20_000


# ---- sampling


@pytest.mark.parametrize(("sampling", "shares"), [("datasets", (1 / 3, 1 / 3, 1 / 3)), ("sqrt", (30 / 42, 10 / 42, 2 / 42))])
def test_datasets_are_drawn_as_often_as_the_sampling_says(sampling, shares):
    datasets = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [900, 100, 4]))
    weights = sampling_weights(datasets, sampling)
    assert np.allclose([weights[datasets == d].sum() for d in range(3)], shares)
    assert all(len(np.unique(weights[datasets == d])) == 1 for d in range(3))


def test_cases_alike_need_no_weights():
    assert sampling_weights(np.repeat([0, 1], [9, 1]), "cases") is None
    assert sampling_weights(np.zeros(7, int), "sqrt") is None


def test_datasets_that_are_kept_back_do_not_count():
    """Numbers are those of the whole index; a fold may hold no case of some."""
    weights = sampling_weights(np.array([0, 0, 3]), "datasets")
    assert np.allclose(weights, (0.25, 0.25, 0.5))


def test_steps_are_drawn_with_the_weights(tree):
    """Six cases of one dataset, three of the other: alike when datasets are drawn alike."""
    base, preprocessed = tree
    adopt(base)
    index = index_of(preprocessed)
    weights = sampling_weights(index.dataset_of, "datasets")
    dataset = PairDataset(Cases(index.root, index.keys), index.keys, (4, 4, 4), CVAConfig(), 1, (0, 1), 0, weights=weights)
    drawn = np.array([index.dataset_of_keys(dataset[step]["keys"])[0] for step in range(300)])
    assert 0.42 < drawn.mean() < 0.58
