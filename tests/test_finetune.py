"""Fine-tuning recipes: nnU-Net's trainers with another learning rate, whose checkpoints need nothing of ours."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from helpers.networks import primus
from helpers.projects import DATASET_JSON, NAME, add_labels, make_project, make_trainer
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import AbstractPrimus

from nnunetv2_cva.config import FinetuneConfig, resolve
from nnunetv2_cva.installation.hook import recipes_folder
from nnunetv2_cva.training import messages
from nnunetv2_cva.training.finetune import Finetuning

KEY, VARIABLE = "cva_finetune", "nnUNet_cva_finetune"
ENTRIES = {
    "network_weights",
    "optimizer_state",
    "grad_scaler_state",
    "logging",
    "_best_ema",
    "current_epoch",
    "init_args",
    "trainer_name",
    "inference_allowed_mirroring_axes",
}
FAST = {"epochs": 3, "iterations_per_epoch": 1, "warmup_epochs": 2}


class FinetuneUNet(Finetuning, nnUNetTrainer):
    config = FinetuneConfig(learning_rate=1e-3, epochs=1000)


class TinyPrimusTrainer(AbstractPrimus):
    @staticmethod
    def build_network_architecture(plans_manager, configuration_manager, num_input_channels, num_output_channels, _=True):
        return primus(1, num_input_channels, num_output_channels, tuple(configuration_manager.patch_size))


class FinetunePrimus(Finetuning, TinyPrimusTrainer):
    config = FinetuneConfig(optimizer="adamw", learning_rate=1e-4, weight_decay=5e-2, epochs=1000)


@pytest.fixture
def labelled(tmp_path, monkeypatch):
    """A preprocessed dataset with labels, for one process."""
    data = make_project(tmp_path, monkeypatch, cases=6)
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    add_labels(data)
    return data


def settings(trainer_plans, **values):
    file = trainer_plans / "nnUNetPlans.json"
    content = json.loads(file.read_text())
    content["configurations"]["3d_fullres"][KEY] = values
    file.write_text(json.dumps(content))


def finetune(recipe, **options):
    trainer = make_trainer(recipe, **options)
    trainer.num_val_iterations_per_epoch = 1
    trainer.save_every = 1
    rates = []
    start = trainer.on_train_epoch_start
    trainer.on_train_epoch_start = lambda: (start(), rates.append(trainer.optimizer.param_groups[0]["lr"]))
    trainer.run_training()
    return trainer, rates


@pytest.mark.parametrize(
    ("recipe", "stock", "rate"), [(FinetuneUNet, "nnUNetTrainer", 1e-3), (FinetunePrimus, "TinyPrimusTrainer", 1e-4)]
)
def test_two_epochs_of_warm_up_then_poly_under_the_stock_name(labelled, recipe, stock, rate):
    settings(labelled.parent, **FAST)
    trainer, rates = finetune(recipe)
    assert rates == pytest.approx([rate / 2, rate, rate])
    assert type(trainer.optimizer) is (torch.optim.SGD if recipe is FinetuneUNet else torch.optim.AdamW)
    content = torch.load(Path(trainer.output_folder) / "checkpoint_final.pth", weights_only=False)
    assert content["trainer_name"] == stock
    nnUNetTrainer.save_checkpoint(trainer, stocks := str(labelled / "stock.pth"))
    assert set(content) == set(torch.load(stocks, weights_only=False)) == ENTRIES
    assert not list(Path(trainer.output_folder).glob("*.partial"))
    log = next(Path(trainer.output_folder).glob("training_log*.txt")).read_text()
    assert log.count("WARNING: 3 iterations of SGD") == (recipe is FinetuneUNet)


def test_a_short_fine_tuning_at_the_low_rate_of_sgd_is_warned_of_with_numbers():
    def warned(**settings):
        return messages.short_fine_tuning(FinetuneConfig(**settings), "nnUNetTrainer")

    (warning,) = warned(epochs=20, iterations_per_epoch=75)
    assert "1500 iterations of SGD at learning_rate 0.001" in warning and "0.368 from scratch and 0.212 pretrained" in warning
    assert "0.700 and 0.716 with nnU-Net's own 0.01" in warning and "-tr" not in warning
    assert "nnUNetTrainer" in warning and '"optimizer": "adamw", "learning_rate": 0.001' in warning
    assert warned(epochs=79) and not warned(epochs=80)
    assert warned(epochs=20, learning_rate=1e-4) and not warned(epochs=20, learning_rate=1e-2)
    assert not warned(epochs=20, optimizer="adamw")


@pytest.mark.parametrize("recipe", [FinetuneUNet, pytest.param(FinetunePrimus, marks=pytest.mark.slow)])
def test_resuming_continues_the_schedule(labelled, recipe):
    settings(labelled.parent, **{**FAST, "epochs": 4})
    trainer = make_trainer(recipe)
    trainer.num_val_iterations_per_epoch = trainer.save_every = 1
    trainer.num_epochs = 3
    trainer.run_training()
    saved = Path(trainer.output_folder) / "checkpoint_final.pth"
    saved.rename(saved.with_name("checkpoint_latest.pth"))
    _, rates = finetune(recipe, resume=True)
    full = recipe.config.learning_rate
    assert rates == pytest.approx([full * 0.5**0.9])


def test_prediction_needs_nothing_of_ours(labelled, monkeypatch):
    """nnU-Net's own predictor finds the trainer by the name in the checkpoint, with no external trainers set."""
    settings(labelled.parent, **{**FAST, "epochs": 1})
    trainer, _ = finetune(FinetuneUNet)
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, use_mirroring=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, use_folds=("all",))
    assert predictor.trainer_name == "nnUNetTrainer"
    image = torch.from_numpy(blosc2.open(str(labelled / "case_00.b2nd"), mode="r")[:])
    assert predictor.predict_logits_from_preprocessed_data(image).shape == (2, *image.shape[1:])


WITHOUT_PLUGIN = """
import sys

class Uninstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("nnunetv2_cva", "trainers"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Uninstalled())
"""  # runs at the start of every Python that has its folder in PYTHONPATH
PREDICT = """
import sys
from nnunetv2.inference.predict_from_raw_data import predict_entry_point

predict_entry_point()
assert not any(name.startswith("nnunetv2_cva") for name in sys.modules)
try:
    import nnunetv2_cva
except ModuleNotFoundError:
    print("predicted without the plugin")
"""


def test_nnunets_command_predicts_where_the_plugin_is_not_installed(labelled, tmp_path):
    """In a process of its own, in which nothing of ours can be imported."""
    settings(labelled.parent, **{**FAST, "epochs": 1})
    plans = json.loads((labelled.parent / "nnUNetPlans.json").read_text())
    plans["foreground_intensity_properties_per_channel"] = {"0": {"mean": 0.0}}  # read from raw images on
    (labelled.parent / "nnUNetPlans.json").write_text(json.dumps(plans))
    finetune(FinetuneUNet)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(WITHOUT_PLUGIN)
    (tmp_path / "predict.py").write_text(PREDICT)
    (tmp_path / "images").mkdir()
    image = blosc2.open(str(labelled / "case_00.b2nd"), mode="r")[:][0]
    sitk.WriteImage(sitk.GetImageFromArray(image), str(tmp_path / "images" / "case_0000.nii.gz"))
    trained = ["-d", NAME, "-c", "3d_fullres", "-tr", "FinetuneUNet", "-f", "all", "-device", "cpu"]
    options = ["-i", tmp_path / "images", "-o", tmp_path / "out", "-npp", 0, "-nps", 0, "--disable_tta"]
    command = [sys.executable, tmp_path / "predict.py", *trained, *options]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert "predicted without the plugin" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    found = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "case.nii.gz")))
    assert found.shape == image.shape and set(np.unique(found)) <= {0, 1}


def test_the_recipes_are_data_on_nnunets_trainers(monkeypatch):
    """Every stock architecture has its recipe, with the published fine-tuning rates."""
    found = {}
    exec(compile((Path(recipes_folder()) / "nnUNetTrainerCVAFinetune.py").read_text(), "recipes", "exec"), found)
    recipes = {k: v for k, v in found.items() if k.startswith("nnUNetTrainerCVAFinetune")}
    sizes = [f"_Primus{v}{s}" for v in ("", "V2", "V3") for s in "SBML"]
    assert set(recipes) == {f"nnUNetTrainerCVAFinetune{s}" for s in ("", *sizes)}
    for name, recipe in recipes.items():
        size = name.removeprefix("nnUNetTrainerCVAFinetune")
        expected = f"nnUNet{size if 'V' in size else size.replace('Primus', 'Primus_')}_Trainer" if size else "nnUNetTrainer"
        assert recipe.stock_trainer().__name__ == expected
        c = recipe.config
        assert (c.epochs, c.warmup) == (1000, 50)
        if size:
            assert (c.optimizer, c.learning_rate, c.weight_decay, c.betas) == ("adamw", 1e-4, 5e-2, (0.9, 0.98))
        else:
            assert (c.optimizer, c.learning_rate, c.weight_decay, c.momentum) == ("sgd", 1e-3, 3e-5, 0.99)
        parameters = list(inspect.signature(recipe.__init__).parameters)[1:]
        assert parameters == ["plans", "configuration", "fold", "dataset_json", "device"]


# ---- settings


def settled(block, environment):
    """As the trainer does it, with the block in the configuration that another one inherits from."""
    parent = {} if block is None else {KEY: block}
    configurations = {"3d_fullres": parent, "small": {"inherits_from": "3d_fullres", KEY: {"iterations_per_epoch": 7}}}
    return resolve(FinetuneConfig(), {"configurations": configurations}, "small", environment)


def test_plans_and_environment_override_and_the_warm_up_follows():
    c = settled({"epochs": 150}, {})
    assert (c.epochs, c.warmup, c.learning_rate, c.iterations_per_epoch) == (150, 15, 1e-3, 7)
    c = settled({"epochs": 150, "warmup_epochs": 3}, {VARIABLE: '{"epochs": 20}'})
    assert (c.epochs, c.warmup) == (20, 3)
    assert settled({"epochs": 4000}, {}).warmup == 50


@pytest.mark.parametrize(
    ("block", "environment", "match"),
    [
        ({"mask_ratio": 0.5}, {}, r"\[\"cva_finetune\"\]: unknown setting 'mask_ratio'. Valid settings: betas, epochs"),
        ({"epochs": 0}, {}, r"\[\"cva_finetune\"\]: epochs: expected a positive integer, found 0"),
        (None, {VARIABLE: "{epochs: 3}"}, "nnUNet_cva_finetune: expected JSON"),
        (None, {VARIABLE: "[1]"}, "nnUNet_cva_finetune: expected an object"),
    ],
)
def test_bad_settings_name_their_origin(block, environment, match):
    with pytest.raises(ValueError, match=match):
        settled(block, environment)


def test_a_block_for_pretraining_does_not_reach_fine_tuning(labelled):
    """Plans copied from the pretraining dataset hold its "cva" settings."""
    trainer = make_trainer(FinetuneUNet)
    assert trainer.configuration_manager.configuration["cva"]["epochs"] == 2
    assert (trainer.num_epochs, trainer.initial_lr) == (1000, 1e-3)
    assert trainer.output_folder.endswith("FinetuneUNet__nnUNetPlans__3d_fullres/fold_all") and NAME in trainer.output_folder
    assert trainer.dataset_json["labels"] == DATASET_JSON["labels"]
