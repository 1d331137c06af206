"""``nnUNetv2_cva compare`` as a user runs it: stopped and gone on with, in parts, refused where test cases were seen."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.projects import NAME, add_labels, make_project

from nnunetv2_cva.commands.main import main
from nnunetv2_cva.comparing import unseen
from nnunetv2_cva.comparing.arms import named
from nnunetv2_cva.comparing.design import CompareRequest
from nnunetv2_cva.comparing.run import run
from nnunetv2_cva.datasets.leakage import HeldOut
from nnunetv2_cva.datasets.targets import FineTuned
from nnunetv2_cva.transfer.card import from_training, inheritance
from nnunetv2_cva.transfer.target import find_target

LENGTH = {"iterations": 10, "points": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A labelled dataset, and weights that say that they were trained on fold 0, on all cases, on something unknown."""
    folder = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as monkeypatch:
        data = make_project(folder, monkeypatch, cases=10)
        add_labels(data)
        target = find_target(NAME, "3d_fullres", "nnUNetPlans", "nnUNetTrainer")
        for name, fold, plans in (("fold_0", 0, target.plans), ("all", "all", target.plans), ("unknown", None, None)):
            torch.manual_seed(1)
            content = {"network_weights": target.build().state_dict(), "trainer_name": "nnUNetTrainer"}
            content["init_args"] = {
                "plans": plans,
                "configuration": "3d_fullres",
                "fold": fold,
                "dataset_json": target.dataset_json,
            }
            torch.save(content if plans else content["network_weights"], folder / f"{name}.pth")
    return folder


@pytest.fixture
def here(project, monkeypatch):
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(project / name))
    return project


def request(here, out, **changes):
    usual = {"dataset": NAME, "configuration": "3d_fullres", "weights": (str(here / "fold_0.pth"),), "labels": (1, 2)}
    return CompareRequest(**usual | {"seeds": 2, "folder": str(out), **LENGTH, **changes})


def start(asked, stop_after=None):
    """Run; returns the outcome, what was said, and which trainings were done now."""
    said, done = [], []

    def trained(result, pace):
        done.append(result.task.job.name)
        if len(done) == stop_after:
            raise KeyboardInterrupt

    return run(asked, said.append, lambda *_: None, trained), said, done


def without_times(folder):
    return {p.name: {k: v for k, v in json.loads(p.read_text()).items() if k != "seconds"} for p in (folder / "jobs").iterdir()}


def test_a_stopped_comparison_goes_on_and_finds_the_same(here, tmp_path):
    asked = request(here, tmp_path / "stopped", labels=(2,), seeds=1)
    with pytest.raises(KeyboardInterrupt):
        start(asked, stop_after=1)
    (tmp_path / "stopped" / "jobs" / "torn.json.host.1.partial").write_text("{")
    outcome, said, done = start(asked)
    assert len(done) == 1 and outcome.unfinished == 0
    assert "voxel" not in said[1] and "No test case was pretrained on, by the split of its own training" in said[1]
    (tmp_path / "stopped" / "jobs" / "torn.json.host.1.partial").unlink()
    _, _, again = start(request(here, tmp_path / "whole", labels=(2,), seeds=1))
    assert len(again) == 2
    assert without_times(tmp_path / "stopped") == without_times(tmp_path / "whole"), "the same numbers, stopped or not"
    content = json.loads((tmp_path / "whole" / "compare.json").read_text())
    assert content["unfinished"] == 0 and content["sentences"] == list(outcome.sentences)
    assert len(content["sentences"]) == (2 if any(s["curve"] for s in content["scores"]) else 1)
    assert content["arms"][1]["test_cases"].startswith("No test case was pretrained on")
    one, other = (without_times(tmp_path / "whole")[f"{arm}__2_labels__seed_0.json"] for arm in ("scratch", "fold_0"))
    assert one["training"] == other["training"] and one["points"] != other["points"]
    assert [p["iteration"] for p in one["points"]] == [5, 10]
    assert not set(one["training"]) & set(content["design"]["test"])


def test_parts_together_are_the_whole_and_the_command_says_so(here, tmp_path, capsys):
    words = ["compare", "-d", "100", "-c", "3d_fullres", "--weights", str(here / "fold_0.pth"), "--labels", "1", "--seeds", "1"]
    words += ["--iterations", "10", "--points", "1", "-o", str(tmp_path / "out"), "-device", "cpu", "-parts", "2", "-part"]
    assert main([*words, "0"]) == 0
    first = capsys.readouterr().out
    assert "1 of 1: " in first and "1 training is not finished" in first
    assert main([*words, "1"]) == 0
    second = capsys.readouterr().out
    assert "not finished" not in second and re.search(r"fold_0 differs from scratch|Neither fold_0", second)
    assert (tmp_path / "out" / "curves.png").is_file()


def test_a_pretraining_that_has_seen_test_cases_is_refused(here, tmp_path):
    with pytest.raises(
        ValueError, match=r"all.pth was pretrained on 2 of 2 test cases \(case_\d+, case_\d+; by the split.*Pretrain wi"
    ):
        start(request(here, tmp_path, weights=(str(here / "all.pth"),)))
    with pytest.raises(ValueError, match=r"fold_0.pth was pretrained on 2 of 2 test cases"):
        start(request(here, tmp_path / "other", fold=1))


@pytest.mark.parametrize(("hit", "missing"), [((), 0), (("case_00",), 0), ((), 1)])
def test_a_pretraining_that_was_planned_is_compared_by_voxels(here, tmp_path, monkeypatch, hit, missing):
    """As ``plan`` lists its cases; which images are the same is tests/test_plan.py's."""
    (tmp_path / "Dataset500_Images").mkdir()
    (tmp_path / "Dataset500_Images" / "cases.csv").touch()
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    monkeypatch.setattr(unseen, "read_accepted", lambda folder: [folder.name])
    found = HeldOut("Dataset100_Tiny", 0, 2, hit, frozenset(), missing)
    monkeypatch.setattr(unseen, "by_voxels", lambda target, accepted, *_: [found] if accepted == ["Dataset500_Images"] else [])
    source = SimpleNamespace(card={"dataset": {"name": "Dataset500_Images"}}, path=Path("weights.pth"))
    design = SimpleNamespace(dataset="Dataset100_Tiny", fold=0, test=("case_00", "case_01"))

    def checked():
        return unseen.check(source, None, design, [], 1, lambda *_: None)

    if hit:
        with pytest.raises(
            ValueError, match=r"pretrained on 1 of 2 test cases \(case_00; voxel by voxel with the cases of Dataset500_I"
        ):
            checked()
    elif missing:
        assert "WARNING: could not check" in checked() and "1 of 2 of their images were not found" in checked()
    else:
        assert checked() == "No test case was pretrained on, voxel by voxel with the cases of Dataset500_Images."


def test_images_of_other_folds_or_not_tested_are_no_test_cases(tmp_path, monkeypatch):
    """Of nnU-Net's folds of all images, which are more where some of them are not preprocessed."""
    (tmp_path / "Dataset500_Images").mkdir()
    (tmp_path / "Dataset500_Images" / "cases.csv").touch()
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    monkeypatch.setattr(unseen, "read_accepted", lambda folder: [])
    folds = [HeldOut(NAME, n, 2, hit, frozenset(), 0) for n, hit in enumerate((("case_00",), ("case_02", "case_03")))]
    monkeypatch.setattr(unseen, "by_voxels", lambda *_: folds)
    source = SimpleNamespace(card={"dataset": {"name": "Dataset500_Images"}}, path=Path("weights.pth"))

    def checked(*test):
        return unseen.check(source, None, SimpleNamespace(dataset=NAME, fold=0, test=test), [], 1, lambda *_: None)

    assert checked("case_01").startswith("No test case")
    with pytest.raises(ValueError, match=r"pretrained on 1 of 2 test cases \(case_03; voxel by voxel"):
        checked("case_01", "case_03")


CASES = [f"case_{n:03d}" for n in range(260)]


def stage(fold, started=None, dataset=NAME, **ours):
    """The card of a pretraining on ``fold``, started from a file with the card ``started``."""
    start = {} if started is None else {"started_from": inheritance(started, "first.pth")}
    arguments = {} if fold is None else {"fold": fold}
    content = {"trainer_name": "nnUNetTrainerCVA", "init_args": arguments, "cva": {**start, **ours}}
    return from_training(content, {"dataset_name": dataset}, "3d_fullres", None)


def without_fold(card):
    """As files of 0.2.0 recorded a start."""
    return {**card, "started_from": {k: v for k, v in card["started_from"].items() if k != "fold"}}


def checked(tmp_path, card, tested=None):
    """What is said of a card about fold 0 of 260 cases, ``tested`` of its validation cases."""
    target = FineTuned(NAME, tmp_path / NAME, {}, {})
    training, test = unseen.split(0, target, CASES)
    design = SimpleNamespace(dataset=NAME, fold=0, training=tuple(training), test=tuple(test[:tested]))
    return unseen.check(SimpleNamespace(card=card, path=Path("w.pth")), target, design, CASES, 1, lambda *_: None)


@pytest.fixture
def nothing_planned(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))


@pytest.mark.parametrize("between", [0, 2])
def test_the_start_of_a_pretraining_is_checked_and_its_start(nothing_planned, tmp_path, between):
    card = stage("all")
    for _ in range(between + 1):
        card = stage(0, card)
    with pytest.raises(
        ValueError, match=r"first.pth of nnUNetTrainerCVA, a start of w.pth, was pretrained on 52 of 52 test cases"
    ):
        checked(tmp_path, card)
    clean = "by the split of its own training"
    said = checked(tmp_path, stage(0, stage(0)))
    assert said == f"No test case was pretrained on, {clean}; nor by first.pth of nnUNetTrainerCVA, a start of w.pth, {clean}."


@pytest.mark.parametrize(
    ("card", "said"),
    [
        (
            without_fold(stage(0, stage(0))),
            "whether first.pth of nnUNetTrainerCVA, a start of w.pth, was .*does not say on which fold",
        ),
        (
            stage(0, stage(0, dataset="Dataset745_OpenMind")),
            "whether first.pth of nnUNetTrainerCVA, a start of w.pth, .*are not listed here",
        ),
        (
            stage(0, stage(0, stage(0, dataset=None))),
            "whether first.pth of nnUNetTrainerCVA, a start of w.pth, .*are not listed here",
        ),
        (stage(0, config={"init_from": "/there/old.pth"}), "whether old.pth, a start of w.pth, .*are not listed here"),
        (stage(0, stage(0, config={"init_from": "old.pth"})), "whether old.pth, a start of w.pth, .*are not listed here"),
        (
            {**stage(0), "started_from": "of another program"},
            "whether a file without a name, a start of w.pth, .*not listed here",
        ),
    ],
)
def test_a_start_whose_cases_are_not_known_is_warned_of(nothing_planned, tmp_path, card, said):
    found = checked(tmp_path, card)
    assert re.match(f"WARNING: could not check {said}", found) and "No test case" not in found


def test_a_start_that_is_not_known_hides_none_that_has_seen_test_cases(nothing_planned, tmp_path):
    with pytest.raises(ValueError, match="w.pth was pretrained on 52 of 52"):
        checked(tmp_path, stage("all", stage(None)))
    with pytest.raises(ValueError, match="first.pth of nnUNetTrainerCVA, a start of w.pth, was pretrained on 52 of 52"):
        checked(tmp_path, stage(None, stage("all")))


@pytest.mark.parametrize("tested", [1, 10, 51, None])
def test_folds_are_those_of_all_cases_however_few_are_tested(nothing_planned, tmp_path, tested):
    assert checked(tmp_path, stage(0), tested).startswith("No test case")
    with pytest.raises(ValueError, match=f"{tested or 52} of {tested or 52} test cases"):
        checked(tmp_path, stage(3), tested)


def test_a_comparison_on_few_test_cases_takes_what_one_on_all_takes(here, tmp_path, monkeypatch):
    monkeypatch.setattr("nnunetv2_cva.comparing.run._train", lambda *_: None)
    for test in (1, None):
        _, said, _ = start(request(here, tmp_path / str(test), test=test))
        assert f"{test or 2} test cases" in said[0] and "No test case was pretrained on" in said[1]


def test_what_cannot_be_checked_is_said(here, tmp_path):
    _, said, _ = start(request(here, tmp_path, weights=(str(here / "unknown.pth"),), labels=(1,), seeds=1))
    assert "WARNING: could not check whether unknown.pth was pretrained on test cases" in said[1]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"labels": (1, 9)}, "`labels`: fold 0 has 8 training cases, found 9"),
        ({"fold": 5}, "`fold=5`: Dataset100_Tiny has the folds 0 to 4"),
        ({"configuration": "3d"}, "no configuration '3d'"),
        ({"weights": ("nowhere.pth",)}, "`weights`: no file .*nowhere.pth"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_trained(here, tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        start(request(here, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def test_results_of_another_file_of_the_same_name_are_not_taken(here, tmp_path):
    asked = request(here, tmp_path / "out", labels=(1,), seeds=1)
    start(asked)
    (tmp_path / "fold_0.pth").write_bytes(b"")
    content = torch.load(here / "fold_0.pth", weights_only=False)
    content["network_weights"]["encoder.stem.convs.0.conv.weight"] += 1
    torch.save(content, tmp_path / "fold_0.pth")
    with pytest.raises(ValueError, match="is of another file with weights that was also called fold_0"):
        start(request(here, tmp_path / "out", labels=(1,), seeds=1, weights=(str(tmp_path / "fold_0.pth"),)))


def test_files_are_called_by_what_tells_them_apart(tmp_path):
    files = [tmp_path / a / b / "checkpoint_final.pth" for a, b in (("CVA", "fold_all"), ("MAE", "fold_all"), ("MAE", "fold_0"))]
    files.append(tmp_path / "open mind.pth")
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert named([str(files[0]), str(files[1])]) == ["CVA", "MAE"]
    assert named([str(f) for f in files[1:3]] + [str(files[3])])[2] == "open_mind"
    assert named([str(files[0])]) == ["checkpoint_final"]
    results = [
        tmp_path / recipe / "fold_0" / "checkpoint_final.pth" for recipe in ("nnUNetTrainerCVA__P__3d", "nnUNetTrainerX__P__3d")
    ]
    for file in results:
        file.parent.mkdir(parents=True)
        file.touch()
    assert named([str(f) for f in results]) == ["nnUNetTrainerCVA", "nnUNetTrainerX"]
    names = named([str(f) for f in files])
    assert len(set(names)) == 4 and all(Path(n).name == n for n in names)
    with pytest.raises(ValueError, match="`weights`: a file is given twice"):
        named([str(files[0]), str(files[0])])
