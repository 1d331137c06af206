"""Starting from foundation weights: a CNN that was never resampled, a ViT of a size that nnU-Net has no trainer for."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus
from helpers.projects import FAST, NAME, add_labels, make_project, make_trainer, train
from helpers.targets import call, planned, pretraining, randomised, target
from nnunetv2.inference import predict_from_raw_data
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2_cva.trainers.nnUNetTrainerCVA_PrimusOfPlans import (
    nnUNetTrainerCVA_PrimusOfPlans,
    nnUNetTrainerCVAFinetune_PrimusOfPlans,
)
from test_nnssl_format import open_mind

from nnunetv2_cva import load_network
from nnunetv2_cva.datasets import destination
from nnunetv2_cva.datasets.nnunet_plans import from_preset
from nnunetv2_cva.training.primus import NETWORK, nnUNetTrainerPrimusOfPlans
from nnunetv2_cva.transfer import target as target_module
from nnunetv2_cva.transfer.architectures import PRIMUS, importable, primus_arguments
from nnunetv2_cva.transfer.read import read
from nnunetv2_cva.transfer.target import Target, find_target

VIEW = (16, 24, 32)


def vit(width=132, depth=3, heads=2, channels=1, classes=1, view=VIEW, **options):
    """A narrow one of the kind: heads of 66 channels."""
    torch.manual_seed(0)
    kept = {"init_values": 0.1, "scale_attn_inner": True, **options}
    return randomised(Primus(channels, width, (8, 8, 8), classes, depth, heads, view, **kept))


@pytest.fixture
def known(monkeypatch):
    found = {c.__name__: c for c in (nnUNetTrainer, nnUNetTrainerPrimusOfPlans, nnUNetTrainerCVA_PrimusOfPlans)}
    monkeypatch.setattr(target_module, "trainer_class", found.get)


def foundation(path, network, heads=None):
    """As nnFoundation's ViT comes: an architecture of a name that is not among nnssl's four, images that were not resampled.
    ``heads``: where they are not of 66 or 72 channels."""
    open_mind(path, target("primus"), network, "PrimusXL", ["up_projection.", "mask_token"], "BaseEvaMAETrainer")
    content = torch.load(path, weights_only=True)
    if heads:
        content["nnssl_adaptation_plan"]["architecture_plans"]["arch_kwargs"] = {"eva_numheads": heads}
    plan = content["nnssl_adaptation_plan"]["pretrain_plan"]
    plan["configurations"] = {"noresample": {**plan["configurations"]["onemmiso"], "spacing": None}}
    torch.save(content, path)
    return path


# ---- arguments from the state dict


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"width": 144, "heads": 2, "depth": 1},  # 72 channels per head, as Primus-M
        {"num_register_tokens": 3},
        {"use_abs_pos_embed": False},
        {"init_values": None},
        {"scale_attn_inner": False},
        {"mlp_ratio": 2.5},
    ],
)
def test_a_primus_is_built_from_its_state_dict(options):
    """The same names, shapes and output; only the number of heads rests on a rule."""
    network = vit(**options).eval()
    found = primus_arguments(network.state_dict())
    again = Primus(1, num_classes=1, input_shape=VIEW, **found)
    again.load_state_dict(network.state_dict(), strict=True)
    x = torch.randn(1, 1, *VIEW)
    with torch.no_grad():
        assert torch.equal(network(x), again.eval()(x))


@pytest.mark.parametrize("size", ["S", "B", "M", "L", "nnFoundationViT"])
def test_the_rule_for_heads_holds_for_all_that_are_published(size):
    known = {"S": (396, 12, 6), "B": (792, 12, 12), "M": (864, 16, 12), "L": (1056, 24, 16), "nnFoundationViT": (1056, 40, 16)}
    width, depth, heads = known[size]
    with torch.device("meta"):
        network = Primus(1, width, (8, 8, 8), 1, depth, heads, VIEW, init_values=0.1, scale_attn_inner=True)
    found = primus_arguments(network.state_dict())
    assert (found["embed_dim"], found["eva_depth"], found["eva_numheads"]) == (width, depth, heads)
    with torch.device("meta"):
        again = Primus(1, num_classes=1, input_shape=VIEW, **found)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}


def test_heads_of_another_width_have_to_be_stated():
    network = vit(width=96, heads=4)
    with pytest.raises(ValueError, match="A Primus of 96 channels: expected a multiple of 66 or 72, or a number of heads"):
        primus_arguments(network.state_dict())
    with pytest.raises(ValueError, match="a number of heads that divides them as eva_numheads"):
        primus_arguments(network.state_dict(), {"eva_numheads": 5})
    assert primus_arguments(network.state_dict(), {"eva_numheads": 4})["eva_numheads"] == 4


# ---- from the file to plans, a pretraining, a fine-tuning


@pytest.mark.parametrize(("width", "heads"), [(132, None), (72, 4)])
def test_plans_with_the_network_of_a_file_pretrain_and_fine_tune(tmp_path, monkeypatch, known, capsys, width, heads):
    """A file like nnFoundation's -> plans of its network -> pretraining from it -> a file for the target -> its fine-tuning ->
    prediction."""
    network = vit(width, heads=heads or 2)
    file = foundation(tmp_path / "vit.pth", network, heads)
    assert call("info", file) == 0
    said = capsys.readouterr().out
    assert "spacing        not resampled" in said and f"Primus V1, 1 input channel, width {width}, depth 3" in said
    assert "decoder        none in the file" in said
    assert load_network(file).taps[0].channels == width

    add_labels(make_project(tmp_path, monkeypatch, view=VIEW))
    assert call("export", file, "--format", "plans", "-d", 100, "-c", "3d_fullres", "-o", "nnUNetPlansViT") == 0
    plans_file = tmp_path / "preprocessed" / NAME / "nnUNetPlansViT.json"
    plans = json.loads(plans_file.read_text())
    settings = plans["configurations"]["3d_fullres"]
    assert settings["architecture"]["network_class_name"] == NETWORK == PRIMUS and settings["patch_size"] == list(VIEW)
    importable(settings["architecture"])

    # Pretraining in these plans, from the file.
    cva = {**FAST, "epochs": 1, "iterations_per_epoch": 1, "init_from": str(file)}
    settings.update(cva=cva, data_identifier="nnUNetPlans_3d_fullres")
    trained = {**plans, "plans_name": "nnUNetPlans"}
    (tmp_path / "preprocessed" / NAME / "nnUNetPlans.json").write_text(json.dumps(trained))
    trainer = train(nnUNetTrainerCVA_PrimusOfPlans)
    log = next(Path(trainer.output_folder).glob("training_log*.txt")).read_text()
    assert "Encoder: 100.0% of" in log and "exchanges the first two axes" in log
    assert f"-tr {nnUNetTrainerPrimusOfPlans.__name__}" in log

    # Fine-tuning of a target with the same plans: by the plain trainer or our recipe, whose checkpoints carry its name.
    there = Target(plans, "3d_fullres", {**target(classes=2).dataset_json}, nnUNetTrainerPrimusOfPlans)
    planned(tmp_path / "other", there, monkeypatch)
    pretrained = Path(trainer.output_folder) / "checkpoint_final.pth"
    to = ("-d", 100, "-c", "3d_fullres", "-p", "nnUNetPlansViT", "-tr", nnUNetTrainerPrimusOfPlans.__name__)
    assert call("export", pretrained, *to, "-o", tmp_path / "w.pth") == 0
    found = find_target(NAME, "3d_fullres", "nnUNetPlansViT", nnUNetTrainerPrimusOfPlans.__name__)
    loaded = found.build()
    load_pretrained_weights(loaded, str(tmp_path / "w.pth"))
    for key, value in trainer.network.eva.state_dict().items():
        assert torch.equal(value, loaded.eva.state_dict()[key])
    assert {b.attn.num_heads for b in loaded.eva.blocks} == {heads or 2}

    # Our recipe, one iteration from that file, and nnU-Net's predictor with what it saved.
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "preprocessed"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_cva_finetune", json.dumps({"epochs": 1, "iterations_per_epoch": 1}))
    tuned = make_trainer(nnUNetTrainerCVAFinetune_PrimusOfPlans, weights=str(tmp_path / "w.pth"))
    tuned.num_val_iterations_per_epoch = 1
    tuned.run_training()
    monkeypatch.setattr(predict_from_raw_data, "recursive_find_trainer_class_by_name", target_module.trainer_class)
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, use_mirroring=False)
    predictor.initialize_from_trained_model_folder(tuned.output_folder_base, use_folds=("all",))
    assert predictor.trainer_name == nnUNetTrainerPrimusOfPlans.__name__
    assert predictor.predict_logits_from_preprocessed_data(torch.randn(1, 20, 30, 40)).shape == (2, 20, 30, 40)


def test_nnunet_finds_the_trainer_by_its_name_in_the_recipes_folder(monkeypatch):
    """What prediction does with a checkpoint of it."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    from nnunetv2_cva.installation.hook import recipes_folder

    monkeypatch.setenv("nnUNet_extTrainer", str(recipes_folder()))
    found = recursive_find_trainer_class_by_name(nnUNetTrainerPrimusOfPlans.__name__)
    assert found.__name__ == nnUNetTrainerPrimusOfPlans.__name__


def test_other_plans_are_refused_by_the_trainer(tmp_path, monkeypatch):
    make_project(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="describe .*ResidualEncoderUNet, this trainer builds .*primus.Primus"):
        make_trainer(nnUNetTrainerCVA_PrimusOfPlans).initialize()


# ---- the CNN: images at their own spacing


def test_the_preset_leaves_images_as_they_are(tmp_path):
    """nnU-Net's own function that does not resample; the size after preprocessing is the size before."""
    plans = from_preset("nnfoundation_resencl")
    settings = plans["configurations"]["3d_fullres"]
    assert settings["patch_size"] == [192] * 3 and settings["normalization_schemes"] == ["ZScoreNormalization"]
    assert plans["configurations"]["3d_fullres_cva"]["cva"]["init_from"] == "hf://MIC-DKFZ/nnFoundationCNN"

    class Found:
        cropped, spacing = (40, 90, 80), (3.0, 0.7, 0.7)

    assert destination.shape_after(Found, plans, settings["spacing"]) == (40, 90, 80)
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(plans).get_configuration("3d_fullres_cva")
    voxels = np.zeros((1, 4, 5, 6))
    assert manager.resampling_fn_data(voxels, (8, 8, 8), (3, 1, 1), (1, 1, 1)) is voxels


def test_what_was_not_resampled_says_so_everywhere(tmp_path, monkeypatch, capsys):
    made = target()
    made.plans["configurations"]["3d_fullres"].update(resampling_fn_data="no_resampling_hack", resampling_fn_data_kwargs={})
    pretraining(tmp_path / "c.pth", made)
    assert read(tmp_path / "c.pth").card["spacing"] is None
    assert call("info", tmp_path / "c.pth") == 0
    assert re.search(r"^spacing +not resampled$", capsys.readouterr().out, re.MULTILINE)
    assert call("export", tmp_path / "c.pth", "--format", "nnssl", "-o", tmp_path / "n.pth") == 0
    plan = torch.load(tmp_path / "n.pth", weights_only=True)["nnssl_adaptation_plan"]["pretrain_plan"]
    ((name, settings),) = plan["configurations"].items()
    assert name == settings["spacing_style"] == "noresample" and settings["spacing"] is None
    planned(tmp_path / "preprocessed", target(name="Dataset004_Other"), monkeypatch)
    assert call("check", tmp_path / "n.pth", "-d", 4, "-c", "3d_fullres") == 0
    said = capsys.readouterr().out
    assert "Warning: the images of the pretraining were not resampled; the target's have spacing [1, 1, 1]." in said
