"""Where plans differ: running what ``export`` and ``check`` advise gives the target the file's network, beside its own plans."""

import copy
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from helpers.images import labelled_dataset, nnunet_folders, write_several
from helpers.targets import STRIDES, call, pretraining, stock_checkpoint, target

from nnunetv2_cva.nnunet import PRETRAINING
from nnunetv2_cva.transfer.adapt import match
from nnunetv2_cva.transfer.plans import same_plans
from nnunetv2_cva.transfer.read import read
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
    pretraining(tmp_path / "c.pth", Target(plans, "3d_fullres" + PRETRAINING, dataset_json, target().trainer))
    return tmp_path / "c.pth"


def everything(folder):
    return {p: p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def advised(said):
    """The commands in what was printed, as lists of words, and the options to go on with."""
    commands, then = re.search(r"beside its own: (.*); then use (-p \S+ -c \S+?)\.?\s", said).groups()
    return [shlex.split(c) for c in commands.split(" && ")], then.split()


def follow(said, capsys):
    """Run what was advised; the target with the plans that it has made."""
    (export, preprocess), then = advised(said)
    assert export[:2] == ["nnUNetv2_cva", "export"] and call(*export[1:]) == 0
    assert f"nnUNetv2_preprocess -d 4 -plans_name {then[1]} -c {then[3]}" in capsys.readouterr().out
    assert preprocess == ["nnUNetv2_preprocess", "-d", "4", "-plans_name", then[1], "-c", then[3]]
    return find_target(NAME, then[3], then[1], "nnUNetTrainer")


def check_fits(file, there):
    """The weights fit all of the encoder, in the target's own normalisation, and nothing more is advised."""
    transfer = match(read(file), there.build(), there.view)
    assert transfer.refusal() is None and same_plans(transfer.source, transfer.target, there) is None
    for name in ("normalization_schemes", "use_mask_for_norm"):
        assert there.settings[name] == own().settings[name]
    assert there.settings["data_identifier"] != own().settings["data_identifier"]


@pytest.mark.parametrize("made_by", ["our command", "nnU-Net", "nnssl"])
def test_plans_are_written_from_what_lies_in_the_file(folders, tmp_path, capsys, made_by):
    """Nothing else is left of the source: no raw images, no preprocessed folder."""
    raw, preprocessed = folders
    if made_by == "our command":
        file = pretrained(raw, preprocessed, tmp_path)
        shutil.rmtree(raw / SOURCE)
        shutil.rmtree(preprocessed / SOURCE)
    elif made_by == "nnU-Net":
        file = stock_checkpoint(tmp_path / "c.pth", target(), target().build())
    else:
        pretraining(tmp_path / "first.pth", target())
        file = tmp_path / "c.pth"
        assert call("export", tmp_path / "first.pth", "--format", "nnssl", "-o", file) == 0
    before = everything(preprocessed / NAME)
    capsys.readouterr()
    assert call("check", file, "-d", 4, "-c", "3d_fullres") == 0
    there = follow(capsys.readouterr().out, capsys)
    assert before.items() <= everything(preprocessed / NAME).items()
    check_fits(file, there)
    assert there.view == (16, 24, 32) and there.configuration == "3d_fullres"
    again = [w for w in (preprocessed / NAME).glob("*From*.json")]
    assert len(again) == 1
    changed = {**json.loads(again[0].read_text()), "image_reader_writer": "other"}
    again[0].write_text(json.dumps(changed))
    options = ("-d", 4, "-c", "3d_fullres", "-o", again[0].stem)
    assert call("export", file, "--format", "plans", *options) == 2
    assert "exists and differs" in capsys.readouterr().err


def test_the_plans_are_nnunets_own(folders, tmp_path, monkeypatch):
    """nnU-Net's planner reads them, whatever the number of channels."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    raw, preprocessed = folders
    file = stock_checkpoint(tmp_path / "c.pth", target(channels=3), target(channels=3).build())
    assert call("export", file, "--format", "plans", "-d", 4, "-c", "3d_fullres", "-o", "Theirs") == 0
    found = PlansManager(str(preprocessed / NAME / "Theirs.json")).get_configuration("3d_fullres")
    assert found.network_arch_init_kwargs["strides"] == [list(s) for s in STRIDES]
    assert found.normalization_schemes == ["ZScoreNormalization"] and found.preprocessor_class


@pytest.mark.parametrize("name", ["a/b", "../x", "", "x y", "x.json"])
def test_what_is_no_name_for_plans_is_refused(folders, tmp_path, capsys, name):
    file = stock_checkpoint(tmp_path / "c.pth", target(), target().build())
    assert call("export", file, "--format", "plans", "-d", 4, "-c", "3d_fullres", "-o", name) == 2
    assert "expected a name for the new plans" in capsys.readouterr().err


def test_a_file_without_architecture_has_no_plans(folders, tmp_path, capsys):
    torch.save({"network_weights": target().build().state_dict()}, tmp_path / "bare.pth")
    assert call("export", tmp_path / "bare.pth", "--format", "plans", "-d", 4, "-c", "3d_fullres", "-o", "Theirs") == 2
    assert "does not state a U-Net or a Primus V1" in capsys.readouterr().err


def test_a_refusal_says_it_too(folders, tmp_path, capsys):
    raw, preprocessed = folders
    made = target(features=(4, 6, 12))
    stock_checkpoint(tmp_path / "c.pth", made, made.build())
    assert call("export", tmp_path / "c.pth", "-d", 4, "-c", "3d_fullres", "-o", tmp_path / "w.pth") == 2
    said = capsys.readouterr().err
    assert advised(said)[1] == ["-p", f"nnUNetPlansFrom{SOURCE}", "-c", "3d_fullres"] and said.count("\n") == 1


def test_for_an_unet_of_another_kind_it_is_said_too_and_fits_then(folders, tmp_path, capsys):
    """A residual encoder for a target with the plain one of nnU-Net's default planner."""
    _, preprocessed = folders
    (preprocessed / NAME / "nnUNetPlans.json").write_text(json.dumps(with_intensities(target("plain", name=NAME))))
    file = stock_checkpoint(tmp_path / "c.pth", target(), target().build())
    assert call("check", file, "-d", 4, "-c", "3d_fullres") == 2
    said = capsys.readouterr().err
    assert "residual U-Net, the target is a plain U-Net: nothing of one fits into the other. The plans differ." in said
    there = follow(said, capsys)
    assert match(read(file), there.build(), there.view).refusal() is None
    primus = stock_checkpoint(tmp_path / "p.pth", target("primus"), target("primus").build())
    assert call("check", primus, "-d", 4, "-c", "3d_fullres") == 2 and "--format plans" not in capsys.readouterr().err


def hint(file, there):
    transfer = match(read(file), there.build(), there.view)
    return same_plans(transfer.source, transfer.target, there)


def test_without_plans_in_the_file_there_is_nothing_to_advise(tmp_path):
    torch.save({"network_weights": target().build().state_dict()}, tmp_path / "bare.pth")
    assert hint(tmp_path / "bare.pth", own()) is None
    fitting = stock_checkpoint(tmp_path / "a.pth", target(), target().build())
    assert hint(fitting, target(name=NAME)) is None


def test_plans_of_the_same_dataset_as_they_were_then_are_written_anew(tmp_path):
    file = stock_checkpoint(tmp_path / "a.pth", target(), target().build())
    there = copy.deepcopy(own())
    there.plans.update(dataset_name=SOURCE)
    assert f"--format plans -d 100 -c 3d_fullres -p nnUNetPlans -o nnUNetPlansFrom{SOURCE}" in hint(file, there)
