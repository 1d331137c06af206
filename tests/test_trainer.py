"""The trainer as nnU-Net runs it, on a tiny dataset."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.networks import primus
from helpers.projects import CONFIGURATION, NAME, make_project, make_trainer, plans, train
from helpers.reads import Reads
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2_cva.trainers.nnUNetTrainerCVA import nnUNetTrainerCVA
from nnunetv2_cva.trainers.nnUNetTrainerCVA_objectives import nnUNetTrainerCVA_MAE

from nnunetv2_cva.config import DEFAULT
from nnunetv2_cva.transfer.read import read

ENVIRONMENT = "nnUNet_cva"


@pytest.fixture
def project(tmp_path, monkeypatch):
    return make_project(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of two epochs: its trainer, what it printed, its project."""
    folder = tmp_path_factory.mktemp("trained")
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        make_project(folder, patch)
        trainer = train(nnUNetTrainerCVA)
    return trainer, printed.getvalue(), folder


@pytest.fixture
def finished(trained, tmp_path, monkeypatch):
    """A copy of the finished run's project; returns the folder of its results."""
    trainer, _, folder = trained
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(copy / name))
    return copy / Path(trainer.output_folder).relative_to(folder)


def states(trainer):
    return {
        **{f"network.{k}": v for k, v in trainer.network.state_dict().items()},
        **{f"teacher.{k}": v for k, v in trainer.teacher.state_dict().items()},
        **{f"heads.{n}.{k}": v for n, m in trainer.student.heads().items() for k, v in m.state_dict().items()},
    }


def test_a_run_leaves_what_a_user_expects(trained):
    trainer, out, _ = trained
    folder = Path(trainer.output_folder)
    assert {"checkpoint_best.pth", "checkpoint_final.pth", "metrics.jsonl", "progress.png", "cva_config.json"} <= {
        p.name for p in folder.iterdir()
    }
    assert not (folder / "checkpoint_latest.pth").exists()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    losses = {"reconstruction_loss", "consistency_loss", "contrastive_loss", "total_loss"}
    metrics = {"alignment", "retrieval", "feature_alignment", "feature_retrieval", "effective_rank", "spread"}
    for name in losses | metrics | {"overlap", "data_wait", "learning_rate"}:
        assert all(np.isfinite(line[name]) for line in lines), name
    assert f"-p nnUNetPlans -pretrained_weights {folder / 'checkpoint_final.pth'}" in out
    assert "Watched pairs come from 1 cases that are not trained on: case_00" in out
    assert "pseudo dice" not in out.lower()


def test_weights_load_into_stock_nnunet_with_both_aliases(finished):
    final = finished / "checkpoint_final.pth"
    stock = make_trainer(nnUNetTrainer, fold=0)
    stock.initialize()
    load_pretrained_weights(stock.network, str(final))
    pretrained = torch.load(final, weights_only=True)["network_weights"]
    loaded = stock.network.state_dict()
    encoder = [k for k in loaded if k.startswith("encoder.")]
    assert encoder and all(torch.equal(loaded[k], pretrained[k]) for k in encoder)
    assert all(torch.equal(loaded[f"decoder.{k}"], loaded[k]) for k in encoder)


def test_checkpoints_need_no_trust_and_best_holds_weights_only(finished):
    final = torch.load(finished / "checkpoint_final.pth", weights_only=True)
    best = torch.load(finished / "checkpoint_best.pth", weights_only=True)
    assert {"heads", "teacher"} <= final["cva"].keys() and "optimizer_state" in final
    assert "optimizer_state" not in best and "teacher" not in best["cva"]
    assert final["cva"]["config"] == json.loads((finished / "cva_config.json").read_text())


def test_what_mps_cannot_recompute_is_kept(project, monkeypatch, capsys):
    monkeypatch.setenv(ENVIRONMENT, json.dumps({"gradient_checkpointing": "selective"}))
    assert make_trainer(nnUNetTrainerCVA).config.gradient_checkpointing == "selective"
    assert make_trainer(nnUNetTrainerCVA, device="mps").config.gradient_checkpointing is False
    assert "gradient_checkpointing is off" in capsys.readouterr().out


def test_stopped_and_continued_equals_uninterrupted(tmp_path, monkeypatch):
    finished = {}
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        make_project(tmp_path / name, monkeypatch, cva={"epochs": 4, "checkpoint_minutes": 1e-9})
        if name == "whole":
            finished[name] = train(nnUNetTrainerCVA)
            continue
        trainer = make_trainer(nnUNetTrainerCVA)
        trainer.on_epoch_end = lambda self=trainer: (type(self).on_epoch_end(self), self.current_epoch == 2 and sys.exit())
        with pytest.raises(SystemExit):
            trainer.run_training()
        assert (Path(trainer.output_folder) / "checkpoint_latest.pth").exists()
        finished[name] = train(nnUNetTrainerCVA, resume=True)
        assert len(finished[name].history.epochs) == 4
    first, second = states(finished["whole"]), states(finished["stopped"])
    assert first.keys() == second.keys()
    assert [k for k in first if not torch.equal(first[k], second[k])] == []
    speed = ("seconds", "data_wait")
    for a, b in zip(finished["whole"].history.epochs, finished["stopped"].history.epochs):
        assert {k: v for k, v in a.items() if k not in speed} == {k: v for k, v in b.items() if k not in speed}


def test_a_killed_run_continues(project, tmp_path):
    """The command a user types, killed with SIGKILL in its second epoch, continued to the end."""
    environment = {
        **os.environ,
        "nnUNet_extTrainer": str(Path(sys.modules[nnUNetTrainerCVA.__module__].__file__).parent),
        ENVIRONMENT: json.dumps({"epochs": 3, "iterations_per_epoch": 3, "checkpoint_minutes": 1e-9, "workers": 1}),
    }
    command = [
        sys.executable,
        "-c",
        "from nnunetv2.run.run_training import run_training_entry as r; r()",
        NAME,
        CONFIGURATION,
        "all",
        "-tr",
        "nnUNetTrainerCVA",
        "-device",
        "cpu",
    ]
    latest = tmp_path / "results" / NAME / "nnUNetTrainerCVA__nnUNetPlans__3d_fullres" / "fold_all" / "checkpoint_latest.pth"
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while not latest.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert latest.exists(), process.communicate()[0]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    out = subprocess.run([*command, "--c"], env=environment, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stdout + out.stderr
    assert "Resuming after" in out.stdout
    assert len((latest.parent / "metrics.jsonl").read_text().splitlines()) == 3
    assert (latest.parent / "checkpoint_final.pth").exists()


def test_two_stages_with_nnunets_own_flag(trained, finished, tmp_path, capsys):
    first = trained[0]
    (Path(first.preprocessed_dataset_folder_base) / "splits_final.json").unlink(
        missing_ok=True
    )  # nnU-Net makes it, of NumPy strings
    trainer = make_trainer(nnUNetTrainerCVA, fold=0, weights=str(finished / "checkpoint_final.pth"))
    trainer.on_train_start()
    out = capsys.readouterr().out
    assert "Starting from pretrained weights; the teacher starts as a copy of them." in out
    assert "Heads that start anew: projector, predictor. init_from takes those of a pretraining checkpoint, too." in out
    for name, value in first.network.encoder.state_dict().items():
        assert torch.equal(trainer.teacher.encoder["encoder"].state_dict()[name], value), name
    trainer.save_checkpoint(str(tmp_path / "second.pth"))
    assert read(tmp_path / "second.pth").card["started_from"] == {"file": "weights that nnU-Net's -pretrained_weights loaded"}


class TinyPrimusTrainer(nnUNetTrainer):
    @staticmethod
    def build_network_architecture(plans_manager, configuration, channels, classes, deep_supervision=True):
        return primus(1, channels, classes, tuple(configuration.patch_size))


class MisnamedTrainer(nnUNetTrainer):
    @staticmethod
    def build_network_architecture(plans, configuration, channels, classes, deep_supervision=True):
        raise AssertionError("not called")


def test_a_network_that_fine_tuning_could_not_build_is_refused_before_training(tmp_path, monkeypatch):
    """nnU-Net takes the first of these parameters for the name of a class."""
    make_project(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="MisnamedTrainer.build_network_architecture: expected the parameters plans_manager, "):
        make_trainer(type("Mine", (nnUNetTrainerCVA,), {"backbone_trainer": MisnamedTrainer})).initialize()


@pytest.mark.parametrize(
    "backbone, carried",
    [(nnUNetTrainer, "output layer"), (TinyPrimusTrainer, "mask_token, decoder_blocks, patch_decoder")],
    ids=["U-Net", "Primus"],
)
def test_two_stages_with_init_from_take_the_heads_too(tmp_path, monkeypatch, capsys, backbone, carried):
    """MAE, then MAE+CVA+Cont: what reconstructs goes on reconstructing, the teacher is a copy of the start."""
    make_project(tmp_path, monkeypatch)
    mae = {"config": nnUNetTrainerCVA_MAE.config, "backbone_trainer": backbone}
    first = train(type("Stage1", (nnUNetTrainerCVA,), mae))
    weights = f"{first.output_folder}/checkpoint_final.pth"
    monkeypatch.setenv(ENVIRONMENT, json.dumps({"init_from": weights}))
    capsys.readouterr()
    second = make_trainer(type("Stage2", (nnUNetTrainerCVA,), {"backbone_trainer": backbone}))
    second.on_train_start()
    assert f"Heads from the file: {carried}; new: " in capsys.readouterr().out
    before, after = first.network.state_dict(), second.network.state_dict()
    unread = "up_projection."  # of a Primus, which pretraining neither reads nor trains
    assert [k for k in after if not k.startswith(unread) and not torch.equal(before[k], after[k])] == []
    for name, head in first.student.heads().items():
        for key, value in head.state_dict().items():
            assert torch.equal(second.student.heads()[name].state_dict()[key], value), name
    for name, module in second.student.backbone.averaged().items():
        copied = second.teacher.encoder[name].state_dict()
        assert all(torch.equal(copied[k], v) for k, v in module.state_dict().items())


def test_switches_reach_torch(tmp_path, monkeypatch):
    make_project(tmp_path, monkeypatch, cva={"channels_last": True, "tf32": False})
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    trainer = make_trainer(nnUNetTrainerCVA)
    trainer.on_train_start()
    assert not torch.backends.cudnn.allow_tf32
    kernels = [p for p in trainer.network.parameters() if p.ndim == 5 and p.shape[1] > 1 and p.shape[2] > 1]
    assert kernels and all(p.is_contiguous(memory_format=torch.channels_last_3d) for p in kernels)


def test_folds_use_nnunets_split(project):
    trainer = make_trainer(nnUNetTrainerCVA, fold=1)
    trainer.initialize()
    training, watched = trainer.do_split()
    assert len(training) + len(watched) == 12 and not set(training) & set(watched)
    assert json.loads((project.parent / "splits_final.json").read_text())[1]["val"] == watched


def test_few_cases_watch_training_cases_and_say_so(tmp_path, monkeypatch, capsys):
    make_project(tmp_path, monkeypatch, cases=4, cva={"epochs": 1})
    train(nnUNetTrainerCVA)
    assert "the watched pairs come from 4 training cases" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change", [{"consistency_weight": 0.0, "contrastive_weight": 0.0}, {"consistency_weight": 0.0, "reconstruction_weight": 0.0}]
)
def test_recipes_without_some_losses_run(tmp_path, monkeypatch, change):
    make_project(tmp_path, monkeypatch, cva=change)
    trainer = train(nnUNetTrainerCVA)
    assert np.isfinite(trainer.history.epochs[-1]["total_loss"])
    assert (trainer.teacher is None) == ("reconstruction_weight" not in change)


def test_resuming_with_other_settings_names_them(finished, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, '{"temperature": 0.1}')
    with pytest.raises(ValueError, match="temperature: 0.5 in the checkpoint, 0.1 now"):
        make_trainer(nnUNetTrainerCVA, resume=True)


def test_more_epochs_may_be_asked_for_on_resume(finished, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, '{"epochs": 3}')
    assert len(train(nnUNetTrainerCVA, resume=True).history.epochs) == 3


def test_best_alone_cannot_be_continued(finished):
    (finished / "checkpoint_final.pth").unlink()
    with pytest.raises(ValueError, match="checkpoint_best.pth holds weights only.*-pretrained_weights"):
        make_trainer(nnUNetTrainerCVA, resume=True)


def test_where_nnunet_compiles_both_branches_are_compiled(project, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module, options: compiled.append(type(module).__name__) or module)
    monkeypatch.setattr(nnUNetTrainerCVA, "_do_i_compile", lambda self: True)
    trainer = make_trainer(nnUNetTrainerCVA)
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    trainer.train_step(next(trainer.dataloader_train))
    trainer.dataloader_train.close()
    assert sorted(compiled) == ["Student", "Teacher"]


def test_predicting_with_a_pretraining_fails_with_one_sentence(finished, monkeypatch):
    from nnunetv2.inference import predict_from_raw_data as predict

    monkeypatch.setattr(predict, "recursive_find_trainer_class_by_name", lambda name: nnUNetTrainerCVA)
    predictor = predict.nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, perform_everything_on_device=False)
    with pytest.raises(ValueError, match="cannot predict. Fine-tune from it"):
        predictor.initialize_from_trained_model_folder(str(finished.parent), ("all",))


@pytest.mark.parametrize(
    "options, configuration, message",
    [
        ({}, "2d", r"2d of nnUNetPlans is 2D .*needs a 3D configuration"),
        ({"batch_size": 1}, CONFIGURATION, r"batch_size 1. The contrastive loss"),
        ({"view": (16, 22, 16)}, CONFIGURATION, r"View 16x22x16 .* strides 4x4x4.*20 or 24"),
        ({"batch_size": 12}, CONFIGURATION, r"batch_size 12 .*only 11 training cases"),
        ({"view": (64, 64, 64)}, CONFIGURATION, r"11 of 11 cases|12 of 12 cases are too small"),
        ({"cva": {"watched_cases": 0}}, CONFIGURATION, r"watched_cases: expected a positive integer, found 0"),
        ({"cva": {"epochs": 0}}, CONFIGURATION, r'"cva".: epochs|epochs: expected'),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(tmp_path, monkeypatch, options, configuration, message):
    make_project(tmp_path, monkeypatch, **options)
    with pytest.raises(ValueError, match=message):
        make_trainer(nnUNetTrainerCVA, configuration).on_train_start()


def test_too_few_cases_for_a_numbered_fold_are_refused(tmp_path, monkeypatch):
    make_project(tmp_path, monkeypatch, cases=4)
    with pytest.raises(ValueError, match="Fold 0: expected at least 5 cases .* found 4 in .* Train on fold all"):
        make_trainer(nnUNetTrainerCVA, fold=0).on_train_start()


def test_missing_data_is_named(project):
    for case in project.glob("*.b2nd"):
        case.unlink()
    with pytest.raises(ValueError, match="No preprocessed data: .* holds no .b2nd case. Run nnUNetv2_cva preprocess"):
        make_trainer(nnUNetTrainerCVA).on_train_start()
    project.rmdir()
    with pytest.raises(ValueError, match="does not exist. Run nnUNetv2_"):
        make_trainer(nnUNetTrainerCVA).on_train_start()


@pytest.mark.parametrize(
    "spoil, message",
    [
        ("loss", "The loss became nan in epoch 1. The last checkpoint is untouched"),
        ("weights", "The weights are not finite after epoch 1. The last checkpoint is untouched"),
    ],
)
def test_what_is_not_finite_stops_training_and_reaches_no_checkpoint(tmp_path, monkeypatch, spoil, message):
    make_project(tmp_path, monkeypatch, cva={"epochs": 3, "checkpoint_minutes": 1e-9})
    trainer = make_trainer(nnUNetTrainerCVA)
    ordinary = trainer.train_step

    def step(batch):
        losses = ordinary(batch)
        if batch["step"] == 3 and spoil == "loss":
            return {**losses, "total": losses["total"] * torch.nan}
        if batch["step"] == 3:  # the last one of the second epoch
            with torch.no_grad():
                next(trainer.student.parameters()).view(-1)[0] = torch.nan
        return losses

    trainer.train_step = step
    with pytest.raises(RuntimeError, match=message):
        trainer.run_training()
    folder = Path(trainer.output_folder)
    for file in folder.glob("*.pth"):
        saved = torch.load(file, weights_only=True)["network_weights"]
        assert all(value.isfinite().all() for value in saved.values()), file
    assert "NaN" not in (folder / "metrics.jsonl").read_text()
    assert make_trainer(nnUNetTrainerCVA, resume=True).current_epoch == 1


@pytest.mark.parametrize("file", ["checkpoint_latest.pth", "checkpoint_best.pth"])
def test_killed_while_a_checkpoint_of_the_first_epoch_is_written(project, monkeypatch, file):
    """Whatever exists by then can be continued, or nothing exists and nnU-Net starts anew."""
    trainer = make_trainer(nnUNetTrainerCVA)
    save = trainer.save_checkpoint
    trainer.save_checkpoint = lambda path: sys.exit() if path.endswith(file) else save(path)
    with pytest.raises(SystemExit):
        trainer.run_training()
    again = make_trainer(nnUNetTrainerCVA, resume=True)
    assert again.current_epoch == (1 if file == "checkpoint_best.pth" else 0)


def test_nnunets_switch_for_the_best_checkpoint_names_it_in_the_end(finished, capsys):
    trainer = make_trainer(nnUNetTrainerCVA, resume=True)
    trainer.load_checkpoint(str(finished / "checkpoint_best.pth"))  # as nnUNetv2_train --val_best does
    trainer.perform_actual_validation()
    assert f"-pretrained_weights {finished / 'checkpoint_best.pth'}" in capsys.readouterr().out


def test_without_checkpoints_no_file_is_named(project, capsys):
    trainer = make_trainer(nnUNetTrainerCVA)
    trainer.disable_checkpointing = True
    trainer.run_training()
    trainer.perform_actual_validation()
    out = capsys.readouterr().out
    assert "Nothing was saved (--disable_checkpointing)" in out and "-pretrained_weights" not in out
    assert not list(Path(trainer.output_folder).glob("*.pth"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 4}, "batch_size: 2 in the checkpoint, 4 now"),
        ({"view": (20, 24, 20)}, r"patch_size: \[16, 24, 16\] in the checkpoint, \[20, 24, 20\] now"),
        ({"kind": "plain"}, "architecture: .*ResidualEncoderUNet.* in the checkpoint, .*PlainConvUNet.* now"),
    ],
)
def test_resuming_with_other_plans_names_them(finished, options, message):
    file = Path(os.environ["nnUNet_preprocessed"]) / NAME / "nnUNetPlans.json"
    file.write_text(json.dumps(plans(**options)))
    with pytest.raises(ValueError, match=f"Cannot resume with other plans.*{message}"):
        make_trainer(nnUNetTrainerCVA, resume=True)


def test_the_log_says_which_checkpoint_is_continued(finished, monkeypatch, capsys):
    monkeypatch.setenv(ENVIRONMENT, '{"epochs": 3}')
    make_trainer(nnUNetTrainerCVA, resume=True).on_train_start()
    out = capsys.readouterr().out
    assert f"Resuming after 2 epochs: student, teacher, heads, optimizer as in {finished / 'checkpoint_final.pth'}, 20" in out


def test_metrics_go_to_wandb_under_their_own_names(tmp_path, monkeypatch):
    """nnU-Net's logger with a stand-in for the service."""
    from types import SimpleNamespace

    from nnunetv2.training.logging import nnunet_logger

    logged, settings = [], {}
    run = SimpleNamespace(log=lambda values, **_: logged.append(values), config=settings, summary={}, step=0)
    monkeypatch.setattr(nnunet_logger, "wandb", SimpleNamespace(init=lambda **_: run), raising=False)
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    make_project(tmp_path, monkeypatch)
    trainer = train(nnUNetTrainerCVA)
    names = {name for values in logged for name in values}
    assert {"total_loss", "consistency_loss", "retrieval", "feature_alignment", "effective_rank", "data_wait"} <= names
    assert not any("dice" in name.lower() for name in names)
    assert settings["cva"] == trainer.config.as_dict()


def test_nothing_is_read_back_from_the_device_in_a_step(project):
    trainer = make_trainer(nnUNetTrainerCVA)
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    trainer.train_step(next(trainer.dataloader_train))
    batch = next(trainer.dataloader_train)
    with Reads() as reads:
        trainer.train_step(batch)
    assert reads.found == []


def test_the_default_recipe_has_the_papers_objective():
    c = nnUNetTrainerCVA.config
    assert c == DEFAULT
    assert (c.reconstruction_weight, c.consistency_weight, c.contrastive_weight) == (5.0, 1.0, 0.1)


def test_a_view_that_primus_cannot_take_is_refused_with_the_nearest_sizes(tmp_path, monkeypatch):
    from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import nnUNet_Primus_S_Trainer

    make_project(tmp_path, monkeypatch, view=(16, 20, 16))
    recipe = type("nnUNetTrainerCVA_PrimusS", (nnUNetTrainerCVA,), {"backbone_trainer": nnUNet_Primus_S_Trainer})
    with pytest.raises(ValueError, match="16x20x16.*16 or 24"):
        make_trainer(recipe).on_train_start()


def test_two_sources_of_weights_are_refused(finished, monkeypatch):
    weights = str(finished / "checkpoint_final.pth")
    monkeypatch.setenv(ENVIRONMENT, json.dumps({"init_from": weights}))
    with pytest.raises(ValueError, match="Both -pretrained_weights and init_from"):
        make_trainer(nnUNetTrainerCVA, fold=0, weights=weights).on_train_start()
