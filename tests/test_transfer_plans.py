"""Where plans differ: running what ``export`` and ``check`` advise gives the target the file's network, beside its own plans."""

import copy
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from helpers.images import labelled_dataset, nnunet_folders, write_several
from helpers.targets import call, pretraining, stock_checkpoint, target
from nnunetv2.experiment_planning.plans_for_pretraining.move_plans_between_datasets import move_plans_between_datasets

from nnunetv2_cva.config import SUFFIX
from nnunetv2_cva.transfer.adapt import match
from nnunetv2_cva.transfer.read import read
from nnunetv2_cva.transfer.table import same_plans
from nnunetv2_cva.transfer.target import Target, find_target

SOURCE, NAME = "Dataset100_Tiny", "Dataset004_Other"
THIN = ((1, 1, 1), (1, 2, 2), (2, 2, 2))  # the strides of the target's own plans


def with_intensities(made):
    return {**made.plans, "foreground_intensity_properties_per_channel": {"0": {"mean": 200.0}}}


def own(channels=1):
    """The target as it is planned by itself."""
    return target(strides=THIN, channels=channels, name=NAME)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """``(raw, preprocessed)`` with the target, labels and all."""
    raw, preprocessed = nnunet_folders(tmp_path, monkeypatch)
    labelled_dataset(raw, preprocessed, NAME, with_intensities(own()))
    stated = {**json.loads((raw / NAME / "dataset.json").read_text()), "overwrite_image_reader_writer": "SimpleITKIO"}
    (raw / NAME / "dataset.json").write_text(json.dumps(stated))  # else nnU-Net tries readers that leave files open
    return raw, preprocessed


def pretrained(raw, preprocessed, tmp_path, *options):
    """A checkpoint of a pretraining that was planned by our command, for a dataset with the plans of ``target()``."""
    write_several(raw / SOURCE / "imagesTr", 6, shape=(20, 34, 30))
    labelled_dataset(raw, preprocessed, "Dataset005_First", with_intensities(target()))
    assert call("plan", "-d", SOURCE, "--target", 5, "-np", 1, *options) == 0
    (file,) = (preprocessed / SOURCE).glob("nnUNetPlans*.json")
    plans, dataset_json = (json.loads(f.read_text()) for f in (file, preprocessed / SOURCE / "dataset.json"))
    pretraining(tmp_path / "c.pth", Target(plans, "3d_fullres" + SUFFIX, dataset_json, target().trainer))
    return tmp_path / "c.pth"


def everything(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def advised(said):
    """The commands in what was printed, as lists of words, and the options to go on with."""
    commands, then = re.search(r"beside its own: (.*); then use (-p \S+ -c \S+?)\.?\s", said).groups()
    return [shlex.split(c) for c in commands.split(" && ")], then.split()


def options_of(words):
    return dict(zip(words[::2], words[1::2]))


def check_fits(file, preprocess, then):
    """The plans that the advice has made are found, and the weights fit all of the encoder."""
    assert preprocess == ["nnUNetv2_preprocess", "-d", "4", "-plans_name", then[1], "-c", then[3]]
    there = find_target(NAME, then[3], then[1], "nnUNetTrainer")
    transfer = match(read(file), there.build(), there.view)
    assert transfer.refusal() is None and same_plans(transfer, there) is None
    return there


def test_plans_of_a_pretraining_are_written_by_our_own_command(folders, tmp_path, capsys):
    raw, preprocessed = folders
    file = pretrained(raw, preprocessed, tmp_path)
    capsys.readouterr()
    before = everything(preprocessed / NAME)
    assert call("check", file, "-d", 4, "-c", "3d_fullres") == 0
    (plan, preprocess), then = advised(capsys.readouterr().out)
    assert plan[:2] == ["nnUNetv2_cva", "plan"] and call(*plan[1:], "-np", 1) == 0
    assert before.items() <= everything(preprocessed / NAME).items()
    there = check_fits(file, preprocess, then)
    assert there.settings["normalization_schemes"] == own().settings["normalization_schemes"]


@pytest.mark.parametrize("made_by", ["stock", "the same plans' name"])
def test_other_plans_are_moved_under_a_name_of_their_own(folders, tmp_path, capsys, made_by):
    """nnU-Net's plans, or ours where the target has others under their name."""
    raw, preprocessed = folders
    if made_by == "stock":
        labelled_dataset(raw, preprocessed, SOURCE, target().plans, n=1)
        file = stock_checkpoint(tmp_path / "c.pth", target(), target().build())
    else:
        file = pretrained(raw, preprocessed, tmp_path, "-p", "nnUNetPlans")
        capsys.readouterr()
    before = everything(preprocessed / NAME)
    assert call("check", file, "-d", NAME, "-c", "3d_fullres") == 0
    (move, preprocess), then = advised(capsys.readouterr().out)
    assert move[0] == "nnUNetv2_move_plans_between_datasets"
    options = options_of(move[1:])
    assert options.keys() == {"-s", "-sp", "-t", "-tp"} and options["-tp"] == f"nnUNetPlansFrom{SOURCE}"
    move_plans_between_datasets(options["-s"], options["-t"], options["-sp"], options["-tp"])
    assert before.items() <= everything(preprocessed / NAME).items()
    there = check_fits(file, preprocess, then)
    assert there.settings["data_identifier"] != own().settings["data_identifier"]


def test_a_refusal_says_it_too(folders, tmp_path, capsys):
    raw, preprocessed = folders
    made = target(features=(4, 6, 12))
    stock_checkpoint(tmp_path / "c.pth", made, made.build())
    assert call("export", tmp_path / "c.pth", "-d", 4, "-c", "3d_fullres", "-o", tmp_path / "w.pth") == 2
    said = capsys.readouterr().err
    assert advised(said)[1] == ["-p", f"nnUNetPlansFrom{SOURCE}", "-c", "3d_fullres"] and said.count("\n") == 1


def hint(file, there):
    return same_plans(match(read(file), there.build(), there.view), there)


def test_plans_for_another_number_of_channels_are_not_moved(tmp_path):
    """nnU-Net looks for the normalisation of every channel."""
    file = stock_checkpoint(tmp_path / "a.pth", target(), target().build())
    said = hint(file, own(channels=4))
    assert "they normalise 1 channel, Dataset004_Other has 4" in said and "nnUNetv2" not in said


def test_without_plans_in_the_file_there_is_nothing_to_advise(tmp_path):
    torch.save({"network_weights": target().build().state_dict()}, tmp_path / "bare.pth")
    assert hint(tmp_path / "bare.pth", own()) is None
    fitting = stock_checkpoint(tmp_path / "a.pth", target(), target().build())
    assert hint(fitting, target(name=NAME)) is None


def test_other_plans_of_the_same_dataset_are_named(tmp_path):
    file = stock_checkpoint(tmp_path / "a.pth", target(), target().build())
    there = copy.deepcopy(own())
    there.plans.update(dataset_name=SOURCE, plans_name="Others")
    said = hint(file, there)
    assert "with plans nnUNetPlans, configuration 3d_fullres, of the same dataset" in said and "nnUNetv2" not in said
