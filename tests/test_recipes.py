"""The recipes: what nnU-Net finds in ``trainers/``, and that every objective trains what it should."""

import dataclasses
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.networks import primus, unet
from helpers.projects import make_project, make_trainer, train
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunetv2_cva.commands import main
from nnunetv2_cva.config import UNET, CVAConfig
from nnunetv2_cva.installation.hook import recipes_folder
from nnunetv2_cva.installation.recipes import recipes
from nnunetv2_cva.model.branches import Student, Teacher, make_backbone
from nnunetv2_cva.seeding import stream
from nnunetv2_cva.training.objective import Prepared, objective
from nnunetv2_cva.training.trainer import CVATrainer
from nnunetv2_cva.views.masking import draw_mask, expand_mask, hide

NAMES = list(recipes(Path(recipes_folder())))
PRETRAINING = [name for name in NAMES if "Finetune" not in name]
PREFIX = "nnUNetTrainerCVA"
ROWS = ("", "_AE", "_MAE", "_MAE_CVA", "_MAE_CCVA", "_MAE_Cont", "_MAE_CCVA_Cont", "_Gram", "_Cont")
SIZES = [f"_Primus{version}{size}" for version in ("", "V2", "V3") for size in "SBML"]
OPTIMISATION = {"optimizer", "learning_rate", "betas", "weight_decay", "warmup_epochs", "gradient_clip", "epochs", "spatial"}


@pytest.fixture(scope="module")
def found():
    """Name -> class, by nnU-Net's own look-up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_extTrainer", recipes_folder())
        yield {name: recursive_find_trainer_class_by_name(name) for name in PRETRAINING}


def differences(a, b):
    return {f.name for f in dataclasses.fields(a) if getattr(a, f.name) != getattr(b, f.name)}


# ---- the classes


def test_there_is_a_recipe_for_every_row_and_every_primus():
    rows = [PREFIX + row for row in (*ROWS, "_Paper")] + [f"{PREFIX}{row}_PrimusM" for row in ROWS]
    assert sorted(PRETRAINING) == sorted({*rows, *(PREFIX + size for size in SIZES), PREFIX + "_PrimusOfPlans"})


@pytest.mark.parametrize("name", PRETRAINING)
def test_nnunet_finds_every_recipe_and_it_is_data(found, name):
    recipe = found[name]
    assert recipe.__name__ == name and issubclass(recipe, CVATrainer) and isinstance(recipe.config, CVAConfig)
    assert {name for name in vars(recipe) if not name.startswith("__")} <= {"config", "backbone_trainer"}
    assert recipe.__doc__ and "\n" not in recipe.__doc__ and recipe.__doc__.endswith(".")


def test_recipes_hide_no_trainer_of_nnunet():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_extTrainer", recipes_folder())
        assert recursive_find_trainer_class_by_name("nnUNet_Primus_M_Trainer").__module__.startswith("nnunetv2.")


@pytest.mark.parametrize("size", SIZES)
def test_every_primus_is_built_by_nnunets_trainer_of_its_name(found, size):
    family = size if "V" in size else size.replace("Primus", "Primus_")
    assert found[PREFIX + size].backbone_trainer.__name__ == f"nnUNet{family}_Trainer"
    assert found[PREFIX + size].config == found[PREFIX + "_PrimusM"].config


@pytest.mark.parametrize("row", ROWS)
def test_a_row_on_primus_differs_in_optimisation_and_memory_only(found, row):
    unets, primus_m = found[PREFIX + row], found[f"{PREFIX}{row}_PrimusM"]
    assert primus_m.backbone_trainer.__name__ == "nnUNet_Primus_M_Trainer"
    assert unets.backbone_trainer is CVATrainer.backbone_trainer
    assert differences(unets.config, primus_m.config) <= OPTIMISATION | {"gradient_checkpointing"}
    default = found[PREFIX + "_PrimusM"].config
    assert differences(primus_m.config, default) == differences(unets.config, found[PREFIX].config)


@pytest.mark.parametrize(
    "row, expected",
    [
        ("", {}),
        ("_AE", {"mask_ratio": 0, "consistency_weight": 0.5, "contrastive_weight": 0, "teacher_momentum": 0}),
        ("_MAE", {"consistency_weight": 0, "contrastive_weight": 0, "epochs": 1000}),
        ("_MAE_CVA", {"contrastive_weight": 0}),
        ("_MAE_CCVA", {"consistency": "nt_xent", "consistency_weight": 0.2, "contrastive_weight": 0}),
        ("_MAE_Cont", {"consistency_weight": 0}),
        ("_MAE_CCVA_Cont", {"consistency": "nt_xent", "consistency_weight": 0.2}),
        ("_Gram", {"consistency": "gram", "consistency_weight": 2}),
        ("_Cont", {"reconstruction_weight": 0, "consistency_weight": 0, "contrastive_weight": 1}),
    ],
)
def test_rows_have_the_papers_objectives(found, row, expected):
    assert found[PREFIX + row].config == CVAConfig(**{**UNET, **expected})


def test_the_papers_recipe_is_kept_exactly(found):
    c = found[PREFIX + "_Paper"].config
    assert c == CVAConfig(mask_block=16)
    assert (c.optimizer, c.learning_rate, c.momentum, c.weight_decay, c.warmup) == ("sgd", 1e-2, 0.99, 3e-5, 0)
    assert (c.spatial, c.gradient_clip, c.epochs * c.iterations_per_epoch) == ("shared", 12, 62_500)


def test_the_default_is_what_was_measured(found):
    c = found[PREFIX].config
    assert (c.optimizer, c.learning_rate, c.weight_decay, c.spatial) == ("adamw", 1e-3, 1e-2, "independent")
    assert (c.warmup, dataclasses.replace(c, epochs=20).warmup) == (25, 2)
    assert differences(c, CVAConfig()) == UNET.keys()


def test_primus_is_optimised_as_in_the_paper(found):
    c = found[PREFIX + "_PrimusM"].config
    assert (c.optimizer, c.learning_rate, c.betas, c.weight_decay) == ("adamw", 3e-4, (0.9, 0.98), 5e-2)
    assert (c.warmup_epochs, c.epochs, c.gradient_clip) == (10, 150, 1)


# ---- every objective on both families


def ready(config, backbone, size, seed=0):
    """Two cases, two views each (one without a loss that compares them), as the trainer hands them to the student."""
    torch.manual_seed(seed)
    n = 4 if config.needs_second_view else 2
    views = torch.randn(n, 1, *size)
    inside = torch.ones(n, 1, *size, dtype=torch.bool)
    inside[0, :, :3] = False
    rois = torch.rand(n, 2, 3)
    if config.mask_ratio == 0:
        return Prepared(views, rois, inside, views, None, None)
    mask = draw_mask(n, size, backbone.block, config.mask_ratio, stream("test", seed))
    hidden = expand_mask(mask, backbone.block, size)
    return Prepared(views, rois, inside, hide(views, hidden), mask, hidden)


@pytest.mark.parametrize("family", ["unet", "primus"])
@pytest.mark.parametrize("row", ROWS)
def test_every_objective_trains_every_parameter_on_thin_views_and_bins(found, row, family):
    """Views of 24 x 48 x 32 voxels, bins 2 x 3 x 4; the losses are finite and what they do not read is frozen."""
    recipe = found[PREFIX + row + ("_PrimusM" if family == "primus" else "")]
    changed = {"head_width": 16, "predictor_width": 8, "roi_size": (2, 3, 4), "mask_block": 8}
    config = dataclasses.replace(recipe.config, **changed)
    size = (24, 48, 32)
    network = unet(strides=((1, 1, 1), (1, 2, 2), (2, 2, 2))) if family == "unet" else primus(2, size=size)
    backbone = make_backbone(network, config)
    backbone.check_view(size)
    pupil = Student(backbone, config).train()
    teacher = Teacher(pupil).eval() if config.needs_heads else None
    batch = ready(config, backbone, size)
    said = teacher(batch.views, batch.rois) if teacher else {}
    losses = objective(pupil(batch.visible, batch.mask, batch.rois), said, batch, config)
    weights = {
        "reconstruction": config.reconstruction_weight,
        "consistency": config.consistency_weight,
        "contrastive": config.contrastive_weight,
    }
    assert set(losses) == {name for name, weight in weights.items() if weight > 0} | {"total"}
    torch.testing.assert_close(losses["total"], sum(weights[name] * losses[name] for name in set(losses) - {"total"}))
    losses["total"].backward()
    for name, parameter in pupil.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    if teacher:
        teacher.follow(pupil, config.teacher_momentum)


@pytest.mark.parametrize("size", ["_PrimusS", "_PrimusV2S", "_PrimusV3S"])
def test_the_networks_of_nnunets_trainers_are_taken_as_they_are(found, size):
    recipe = found[PREFIX + size]
    plans = SimpleNamespace(patch_size=(16, 24, 8))
    network = recipe.backbone_trainer.build_network_architecture(None, plans, 1, 1, False)
    backbone = make_backbone(network, dataclasses.replace(recipe.config, reconstruction_weight=0.0)).eval()
    backbone.check_view((16, 24, 8))
    mask = torch.tensor([1, 1, 0, 1, 0, 1]).reshape(1, 2, 3, 1) > 0
    with torch.no_grad():
        maps, image, _ = backbone(torch.randn(1, 1, 16, 24, 8), mask)
    assert maps[0].shape == (1, 396, 2, 3, 1) and image.shape == (1, 396)
    assert backbone.feature_blocks.blocks[0].attn.num_heads == 11


class TinyPrimusTrainer(nnUNetTrainer):
    """A user's own trainer, whose network is to be pretrained."""

    @staticmethod
    def build_network_architecture(plans_manager, configuration, channels, classes, deep_supervision=True):
        return primus(3, channels, classes, tuple(configuration.patch_size))


def test_a_primus_recipe_runs_continues_exactly_and_fits_the_stock_trainer(found, tmp_path, monkeypatch):
    """Warm-up included: the run is stopped within it. Dropped paths included."""
    recipe = type("Recipe", (found[PREFIX + "_PrimusM"],), {"backbone_trainer": TinyPrimusTrainer})
    finished = {}
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        settings = {"epochs": 3, "warmup_epochs": 2, "checkpoint_minutes": 1e-9}
        make_project(tmp_path / name, monkeypatch, cva=settings)
        if name == "stopped":
            trainer = make_trainer(recipe)
            trainer.on_epoch_end = lambda self=trainer: (recipe.on_epoch_end(self), sys.exit())
            with pytest.raises(SystemExit):
                trainer.run_training()
        finished[name] = train(recipe, resume=name == "stopped")
    whole, stopped = finished["whole"], finished["stopped"]
    for part in ("student", "teacher"):
        values = getattr(stopped, part).state_dict()
        assert [k for k, v in getattr(whole, part).state_dict().items() if not torch.equal(v, values[k])] == [], part
    rates = [epoch["learning_rate"] for epoch in stopped.history.epochs]
    assert rates == pytest.approx([1.5e-4, 3e-4, 3e-4])
    assert all(math.isfinite(epoch["total_loss"]) for epoch in stopped.history.epochs)

    stock = make_trainer(TinyPrimusTrainer, fold=0)
    stock.network = TinyPrimusTrainer.build_network_architecture(None, stock.configuration_manager, 1, 1)
    load_pretrained_weights(stock.network, f"{whole.output_folder}/checkpoint_final.pth")
    trained = whole.network.state_dict()
    assert all(torch.equal(v, trained[k]) for k, v in stock.network.state_dict().items())


# ---- the command


def test_recipes_in_the_users_folders_are_listed_too(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text('class nnUNetTrainerCVA_Mine:\n    """Mine."""\n')
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    assert main.main(["trainers"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.split() == ["nnUNetTrainerCVA_Mine", "Mine."]


def test_the_command_lists_every_recipe_in_one_line(capsys):
    assert main.main(["trainers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES and lines[0].startswith(PREFIX + " ")
    assert all(line.endswith(".") for line in lines)
