"""``export``, ``check`` and ``info``, our own checkpoints as source, and ``init_from``."""

import inspect
import json
import os
import re
from pathlib import Path

import pytest
import torch
from helpers.projects import make_project, train
from helpers.targets import call, planned, pretraining, randomised, stock_checkpoint, target
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.training.trainer import CVATrainer
from nnunetv2_cva.transfer import target as target_module
from nnunetv2_cva.transfer.adapt import fill, match
from nnunetv2_cva.transfer.read import read
from nnunetv2_cva.transfer.start import start_from


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A planned target with other classes and channels, and the arguments that name it."""
    made = target(channels=2, classes=4, name="Dataset004_Other")
    planned(tmp_path / "preprocessed", made, monkeypatch)
    return made


# ---- our checkpoints


@pytest.mark.parametrize("family", ["residual", "plain", "primus", "primus V3"])
def test_both_branches_of_a_pretraining(tmp_path, family):
    network, teacher = pretraining(tmp_path / "c.pth", target(family))
    averaged = teacher.encoder["encoder"] if "primus" not in family else teacher.encoder["eva"]
    for branch, wanted in (("student", network.encoder if "primus" not in family else network.eva), ("teacher", averaged)):
        filled = target(family).build()
        transfer = match(read(tmp_path / "c.pth", branch), filled, target(family).view)
        assert transfer.share("carried") == 1
        fill(filled, transfer)
        found = filled.encoder if "primus" not in family else filled.eva
        for key, value in wanted.state_dict().items():
            assert torch.equal(value, found.state_dict()[key])
        if "primus" not in family:
            assert torch.equal(filled.decoder.transpconvs[0].weight, network.decoder.transpconvs[0].weight)
            assert filled.encoder is filled.decoder.encoder


@pytest.mark.parametrize(
    ("family", "settings", "decoder", "reason"),
    [
        ("residual", {}, "keep", "trained to reconstruct"),
        ("residual", {"reconstruction_weight": 0.0}, "fresh", "reconstructs nothing"),
        ("primus", {}, "fresh", "a decoder of its own beside a Primus"),
    ],
)
def test_the_default_for_the_decoder_and_its_reason(tmp_path, family, settings, decoder, reason):
    pretraining(tmp_path / "c.pth", target(family), **settings)
    source = read(tmp_path / "c.pth")
    assert source.decoder[0] == decoder and reason in source.decoder[1]
    transfer = match(source, target(family).build(), target(family).view)
    actions = {r.action for r in transfer.rows if r.role == "decoder"}
    assert actions == ({"carried"} if decoder == "keep" else {"fresh"})


def test_a_checkpoint_without_teacher_says_so(tmp_path):
    pretraining(tmp_path / "c.pth", target(), consistency_weight=0.0, contrastive_weight=0.0)
    with pytest.raises(ValueError, match="holds no teacher.*take the student"):
        read(tmp_path / "c.pth", "teacher")
    stock = stock_checkpoint(tmp_path / "s.pth", target(), target().build())
    with pytest.raises(ValueError, match="holds no teacher"):
        read(stock, "teacher")


def test_plans_are_found_in_the_folder_of_the_training(tmp_path):
    """Checkpoints that only name their configuration lie in nnU-Net's results folder, beside plans.json."""
    made = target()
    fold = tmp_path / "results" / "fold_all"
    fold.mkdir(parents=True)
    (fold.parent / "plans.json").write_text(json.dumps(made.plans))
    (fold.parent / "dataset.json").write_text(json.dumps(made.dataset_json))
    pretraining(fold / "c.pth", made)
    content = torch.load(fold / "c.pth", weights_only=True)
    content["init_args"] = {"configuration": made.configuration, "fold": "all"}
    torch.save(content, fold / "c.pth")
    found = read(fold / "c.pth")
    assert found.view == (16, 24, 32) and found.card["dataset"]["name"] == "Dataset100_Tiny"


def test_a_real_pretraining_is_exported_to_other_plans(tmp_path, monkeypatch, there):
    """From CVATrainer's own file, through the command, into nnU-Net's loader."""
    results = tmp_path / "project"
    results.mkdir()
    make_project(results, monkeypatch, cva={"epochs": 1, "iterations_per_epoch": 1})
    trainer = train(CVATrainer)
    file = Path(trainer.output_folder) / "checkpoint_final.pth"
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    fitting = target(channels=2, features=(4, 8, 8), blocks=(1, 1, 1), name="Dataset004_Other")
    planned(tmp_path / "preprocessed", fitting, monkeypatch)
    for branch in ("student", "teacher"):
        out = tmp_path / f"{branch}.pth"
        assert call("export", file, "-d", 4, "-c", "3d_fullres", "-o", out, "--branch", branch) == 0
        loaded = fitting.build()
        load_pretrained_weights(loaded, str(out))
        encoder = (trainer.network if branch == "student" else trainer.teacher.encoder["encoder"]).state_dict()
        key = "stages.1.blocks.0.conv1.conv.weight"
        wanted = encoder[f"encoder.{key}" if branch == "student" else key]
        assert torch.equal(loaded.state_dict()[f"encoder.{key}"], wanted)


# ---- export


def test_export_writes_what_nnunet_takes_and_says_how(tmp_path, there, capsys):
    pretraining(tmp_path / "c.pth", target())
    arguments = ("-d", 4, "-c", "3d_fullres", "-o", tmp_path / "weights.pth")
    assert call("export", tmp_path / "c.pth", *arguments, "--licence", "CC-BY-4.0") == 0
    said = capsys.readouterr().out
    assert "1 -> 2 input channels" in said and "Encoder: 100.0% of" in said
    assert "Decoder: keep; it was trained to reconstruct" in said and "Warning: channel names" in said
    assert f"-pretrained_weights {tmp_path / 'weights.pth'}" in said and "#####" not in said
    load_pretrained_weights(there.build(), str(tmp_path / "weights.pth"))
    content = torch.load(tmp_path / "weights.pth", weights_only=True)
    assert content["pretraining"]["licence"] == "CC-BY-4.0" and content["pretraining"]["config"]["mask_block"] == 8
    assert content["pretraining"]["metrics"] == {"epoch": 0, "alignment": 0.5}
    assert content["pretraining"]["citations"][0]["name"] == "Consistent View Alignment"


def test_a_dry_run_writes_nothing(tmp_path, there, capsys):
    pretraining(tmp_path / "c.pth", target())
    before = sorted(tmp_path.iterdir())
    assert (
        call("export", tmp_path / "c.pth", "-d", "Dataset004_Other", "-c", "3d_fullres", "-o", tmp_path / "w.pth", "--dry-run")
        == 0
    )
    assert sorted(tmp_path.iterdir()) == before and "Dry run" in capsys.readouterr().out


def test_too_little_is_refused_unless_allowed(tmp_path, there, capsys):
    pretraining(tmp_path / "c.pth", target(features=(4, 6, 12)))
    arguments = ("export", tmp_path / "c.pth", "-d", 4, "-c", "3d_fullres", "-o", tmp_path / "w.pth")
    assert call(*arguments) == 2
    said = capsys.readouterr()
    assert "features of stage 2: 12 in the file, 8 in the target" in said.err and "--allow-partial" in said.err
    assert said.err.count("\n") == 1 and not (tmp_path / "w.pth").exists()
    assert call(*arguments, "--allow-partial") == 0
    load_pretrained_weights(there.build(), str(tmp_path / "w.pth"))


def test_export_for_a_pretraining_trainer(tmp_path, there, monkeypatch):
    """Its network has as many outputs as inputs; stock -pretrained_weights takes the file for it."""
    monkeypatch.setattr(target_module, "trainer_class", lambda name: CVATrainer)
    stock_checkpoint(tmp_path / "s.pth", target(), network := randomised(target().build()))
    assert (
        call("export", tmp_path / "s.pth", "-d", 4, "-c", "3d_fullres", "-tr", "nnUNetTrainerCVA", "-o", tmp_path / "w.pth") == 0
    )
    loaded = target_module.Target(there.plans, "3d_fullres", there.dataset_json, CVATrainer).build()
    assert loaded.decoder.seg_layers[-1].out_channels == 2
    load_pretrained_weights(loaded, str(tmp_path / "w.pth"))
    assert torch.equal(
        loaded.encoder.stages[2].blocks[0].conv1.conv.weight, network.encoder.stages[2].blocks[0].conv1.conv.weight
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("-d", 9, "-c", "3d_fullres"), r"No dataset 9 in nnUNet_raw or nnUNet_preprocessed \(Dataset004_Other\)"),
        (
            ("-d", 4, "-c", "3d_fullres", "-p", "Other"),
            r"no plans 'Other'.*Found: nnUNetPlans.*nnUNetv2_plan_and_preprocess -d 4",
        ),
        (("-d", "Dataset099_Bar", "-c", "3d_fullres"), r"No dataset Dataset099_Bar in nnUNet_raw or"),
        (("-d", "", "-c", "3d_fullres"), r"Expected the number or the name of a dataset.*found ''"),
        (("-d", "Foo", "-c", "3d_fullres"), r"Expected the number or the name of a dataset.*found 'Foo'"),
        (("-d", "/data/Dataset004_Other", "-c", "3d_fullres"), "expected a name, found '/data/Dataset004_Other'"),
        (("-d", "Dataset004_*", "-c", "3d_fullres"), r"No dataset Dataset004_\* in"),
        (("-d", 4, "-c", "3d_fullres", "-p", "nnUNetResEncUNetLPlans"), r"-d 4 -pl nnUNetPlannerResEncL$"),
        (("-d", 4, "-c", "3d_lowres"), r"no configuration '3d_lowres'\. Found: 3d_fullres, 2d"),
        (("-d", 4), "-d and -c are needed"),
    ],
)
def test_targets_that_do_not_exist(tmp_path, there, capsys, arguments, expected):
    (tmp_path / "preprocessed" / "Foo").mkdir()
    pretraining(tmp_path / "c.pth", target())
    assert call("export", tmp_path / "c.pth", *arguments, "-o", tmp_path / "w.pth") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(expected, said), said
    assert not (tmp_path / "w.pth").exists()


def test_a_dataset_that_is_not_planned_says_how(tmp_path, there, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    (tmp_path / "raw" / "Dataset009_New").mkdir(parents=True)
    pretraining(tmp_path / "c.pth", target())
    assert call("check", tmp_path / "c.pth", "-d", 9, "-c", "3d_fullres") == 2
    assert "Dataset009_New is not planned. nnUNetv2_plan_and_preprocess -d 9 makes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("dataset.json", "{}", r"dataset\.json states no labels"),
        ("dataset.json", '{"labels": {"background": 0}}', r"dataset\.json states no channel_names"),
        ("dataset.json", '{"labels": {"background": []}, "channel_names": {"0": "a"}}', "nnU-Net cannot read dataset.json"),
        ("dataset.json", "{broken", r"dataset\.json, line 1: expected JSON"),
        ("nnUNetPlans.json", "{}", "states no dataset_name: it is not a plans file"),
        ("nnUNetPlans.json", '{"dataset_name": "D", "plans_name": "P", "configurations": [1]}', "Found: none"),
        (
            "nnUNetPlans.json",
            '{"dataset_name": "D", "plans_name": "P", "configurations": {"3d_fullres": {"inherits_from": "lost"}}}',
            "Plans P have no configuration 'lost', from which 3d_fullres inherits",
        ),
    ],
)
def test_targets_whose_files_are_damaged(tmp_path, there, capsys, file, content, expected):
    pretraining(tmp_path / "c.pth", target())
    (tmp_path / "preprocessed" / "Dataset004_Other" / file).write_text(content)
    assert call("check", tmp_path / "c.pth", "-d", 4, "-c", "3d_fullres") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(expected, said), said


@pytest.mark.parametrize("plans", ["nnUNetResEncUNetMPlans", "nnUNetResEncUNetLPlans", "nnUNetResEncUNetXLPlans", "nnUNetPlans"])
def test_the_advised_planner_makes_plans_of_this_name(tmp_path, there, capsys, plans):
    """As nnU-Net itself names them."""
    from nnunetv2.experiment_planning.experiment_planners import default_experiment_planner as default
    from nnunetv2.experiment_planning.experiment_planners.residual_unets import residual_encoder_unet_planners as residual

    pretraining(tmp_path / "c.pth", target())
    (tmp_path / "preprocessed" / "Dataset004_Other" / "nnUNetPlans.json").unlink()
    assert call("check", tmp_path / "c.pth", "-d", 4, "-c", "3d_fullres", "-p", plans) == 2
    words = capsys.readouterr().err.split()
    planner = getattr(residual, words[-1]) if words[-2] == "-pl" else default.ExperimentPlanner
    assert inspect.signature(planner.__init__).parameters["plans_name"].default == plans


def test_more_errors_are_one_sentence_and_write_nothing(tmp_path, there, capsys, monkeypatch):
    (tmp_path / "text.pth").write_text("hello")
    pretraining(tmp_path / "c.pth", target())
    pretraining(tmp_path / "p.pth", target("primus"))
    to = ("-d", 4, "-c", "3d_fullres", "-o")
    cases = {
        ("text.pth", tmp_path / "w.pth"): "is not a checkpoint",
        ("p.pth", tmp_path / "w.pth"): "holds a Primus V1, the target is a residual U-Net",
        ("c.pth", tmp_path / "missing" / "w.pth"): "cannot be written: No such file or directory",
        ("c.pth", tmp_path): "is a folder",
    }
    for (file, out), expected in cases.items():
        assert call("export", tmp_path / file, *to, out) == 2
        said = capsys.readouterr().err
        assert expected in said and said.count("\n") == 1
    monkeypatch.delenv("nnUNet_preprocessed")
    assert call("export", tmp_path / "c.pth", *to, tmp_path / "w.pth") == 2
    assert "nnUNet_preprocessed is not set" in capsys.readouterr().err
    assert not (tmp_path / "w.pth").exists() and not list(tmp_path.glob("*.partial"))


def test_a_network_that_nnunet_cannot_build(tmp_path, monkeypatch):
    made = target("primus", view=(16, 20, 32))
    with pytest.raises(ValueError, match=r"TinyPrimus cannot build its network for patch_size \[16, 20, 32\].*divisible by 8"):
        made.build()


@pytest.mark.slow
def test_an_unknown_trainer_is_named(tmp_path, there, capsys):
    """nnU-Net's look-up imports all of its trainers."""
    pretraining(tmp_path / "c.pth", target())
    assert call("export", tmp_path / "c.pth", "-d", 4, "-c", "3d_fullres", "-tr", "Bogus", "-o", tmp_path / "w.pth") == 2
    assert "Unknown trainer 'Bogus': nnU-Net knows no such class" in capsys.readouterr().err


def test_the_same_export_twice_gives_the_same_weights(tmp_path, there):
    pretraining(tmp_path / "c.pth", target())
    found = []
    for name in ("a.pth", "b.pth"):
        torch.manual_seed(len(found))
        call("export", tmp_path / "c.pth", "-d", 4, "-c", "3d_fullres", "-o", tmp_path / name)
        found.append(torch.load(tmp_path / name, weights_only=True)["network_weights"])
    assert all(torch.equal(v, found[1][k]) for k, v in found[0].items())


# ---- check, info


def test_check_has_an_exit_code(tmp_path, there, capsys):
    pretraining(tmp_path / "c.pth", target())
    to = ("-d", 4, "-c", "3d_fullres")
    assert call("check", tmp_path / "c.pth", *to) == 0
    said = capsys.readouterr().out
    assert "Fits after `nnUNetv2_cva export`" in said and "encoder.stem.convs.0.conv.weight has shape 4x1x3x3x3" in said
    assert "Warning: channel names of the pretraining [mr0], of the target [mr0, mr1]" in said

    stock_checkpoint(tmp_path / "own.pth", there, there.build())
    assert call("check", tmp_path / "own.pth", *to) == 0
    said = capsys.readouterr().out
    assert "takes this file as it is" in said and "Warning" not in said

    pretraining(tmp_path / "other.pth", target(features=(4, 6, 12)))
    assert call("check", tmp_path / "other.pth", *to) == 1
    assert "Does not fit" in capsys.readouterr().out
    assert call("check", tmp_path / "nothing.pth", *to) == 2


def test_info_prints_what_any_file_states(tmp_path, there, capsys):
    pretraining(tmp_path / "c.pth", target())
    stock_checkpoint(tmp_path / "s.pth", target(), target().build())
    torch.save(dict(target("plain").build().state_dict()), tmp_path / "bare.pth")
    assert call("export", tmp_path / "c.pth", "-d", 4, "-c", "3d_fullres", "-o", tmp_path / "w.pth") == 0
    capsys.readouterr()
    for name, expected in {
        "c.pth": ("pretraining checkpoint", "alignment 0.5", "mask_block 8", "spacing        [1, 1, 1]", "nnunetv2_cva 0.1.0"),
        "s.pth": ("nnU-Net checkpoint", "residual U-Net, 1 input channel, 3 stages", "mean_fg_dice 0.75", "[16, 24, 32]"),
        "w.pth": (
            "exported weights",
            "made for       Dataset004_Other",
            "pretrained on  Dataset100_Tiny",
            "cite",
            "2 input channels",
        ),
        "bare.pth": ("without a description", "plain U-Net", "licence        not stated"),
    }.items():
        assert call("info", tmp_path / name) == 0
        said = capsys.readouterr().out
        assert all(e in said for e in expected), (name, said)
    assert call("info", tmp_path / "c.pth", "--plans") == 0
    assert '"plans_name": "nnUNetPlans"' in capsys.readouterr().out


def test_info_holds_nothing_back(tmp_path, capsys):
    """Every entry of the card in the text, and all of it as JSON; a grid that was not resampled says so."""
    pretraining(tmp_path / "c.pth", target())
    assert call("export", tmp_path / "c.pth", "--format", "nnssl", "-o", tmp_path / "n.pth") == 0
    content = torch.load(tmp_path / "n.pth", weights_only=True)
    content["pretraining"]["of_a_later_version"] = {"scanner": "3 T"}
    content["pretraining"]["spacing"] = None
    content["pretraining"]["citations"] = [{"name": "X", "bibtex_citations": ["@article{x}"]}]
    torch.save(content, tmp_path / "n.pth")
    capsys.readouterr()
    assert call("info", tmp_path / "n.pth") == 0
    said = capsys.readouterr().out
    assert (
        "of a later version scanner 3 T" in said
        and "spacing        not resampled" in said
        and "cite           X: @article{x}" in said
    )
    assert call("info", tmp_path / "n.pth", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["card"]["of_a_later_version"] == {"scanner": "3 T"} and found["card"]["config"]["mask_block"] == 8
    network = target().build()
    trained = sum(p.numel() for n, p in network.named_parameters() if "seg_layers" not in n)
    assert found["parameters"] == trained and found["kind"] == "nnssl checkpoint"


# ---- init_from


def test_a_pretraining_starts_from_any_file(tmp_path):
    """The network of the pretraining is filled in place; more channels, other patch; the table comes back."""
    pretraining(tmp_path / "c.pth", target("primus"))
    there = target("primus", channels=2, view=(32, 24, 32))
    network = there.build()
    lines = start_from(str(tmp_path / "c.pth"), network, there).lines
    assert lines[0].endswith("(pretraining checkpoint):") and any("Encoder: 100.0%" in line for line in lines)
    assert torch.equal(network.eva.blocks[1].mlp.fc2.weight, read(tmp_path / "c.pth").weights["eva.blocks.1.mlp.fc2.weight"])


def test_init_from_refuses_what_fills_too_little(tmp_path):
    pretraining(tmp_path / "c.pth", target(features=(4, 6, 12)))
    with pytest.raises(ValueError, match="init_from: .*fills only .*told to write it all the same"):
        start_from(str(tmp_path / "c.pth"), target().build(), target())
    with pytest.raises(ValueError, match="does not exist"):
        start_from(str(tmp_path / "missing.pth"), target().build(), target())


def test_a_pretraining_starts_channels_that_are_no_images_at_zero(tmp_path):
    """As export does for a target: the first features are those of the file, whatever the mask holds."""
    network, _ = pretraining(tmp_path / "c.pth", target())
    there = target(channels=2)
    there.dataset_json["channel_names"]["1"] = "noNorm"
    started = there.build()
    lines = start_from(str(tmp_path / "c.pth"), started, there).lines
    assert any("1 -> 2 input channels (1 of them no image: start at 0)" in line for line in lines)
    entry, before = (n.encoder.stem.convs[0].conv.weight for n in (started, network))
    assert torch.equal(entry[:, :1], before) and not entry[:, 1].any()


def test_the_trainer_starts_student_and_teacher_from_the_file(tmp_path, monkeypatch):
    network, _ = pretraining(tmp_path / "c.pth", target(features=(4, 8, 8), blocks=(1, 1, 1)))
    cva = {"epochs": 1, "iterations_per_epoch": 1, "learning_rate": 1e-12, "init_from": str(tmp_path / "c.pth")}
    make_project(tmp_path, monkeypatch, cva=cva)
    trainer = train(CVATrainer)
    wanted = network.encoder.state_dict()
    for encoder in (trainer.network.encoder, trainer.teacher.encoder["encoder"]):
        for key, value in encoder.state_dict().items():
            torch.testing.assert_close(value, wanted[key])
    log = next(Path(trainer.output_folder).glob("training_log*.txt")).read_text()
    assert "Encoder: 100.0% of" in log and "Starting from pretrained weights" in log


def test_init_from_is_a_setting():
    assert CVAConfig().init_from is None
    assert CVAConfig().updated({"init_from": os.devnull}, "plans").init_from == os.devnull
    with pytest.raises(ValueError, match="init_from: expected null or the path of a checkpoint, found ''"):
        CVAConfig(init_from="")
