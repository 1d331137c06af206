"""Targets of every family, small enough for seconds, and checkpoints of networks built for them."""

import copy
import json

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from helpers.networks import primus
from helpers.projects import DATASET_JSON, architecture
from helpers.projects import plans as tiny_plans
from nnunetv2_cva.commands.main import main
from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.model.branches import Student, Teacher, make_backbone
from nnunetv2_cva.transfer.target import Target

CONFIGURATION = "3d_fullres"
STRIDES = ((1, 1, 1), (2, 2, 2), (2, 2, 2))


class TinyPrimus(nnUNetTrainer):
    """A narrow Primus, built as nnU-Net's trainers build theirs."""

    version = 1
    options: dict = {}

    @classmethod
    def build_network_architecture(cls, plans_manager, configuration_manager, num_input_channels, num_output_channels, _=True):
        view = tuple(configuration_manager.patch_size)
        return primus(cls.version, num_input_channels, num_output_channels, view, **cls.options)


class TinyPrimusV3(TinyPrimus):
    version = 3
    options = {"ch_per_level": (6, 8, 12, 16)}


TRAINERS = {"residual": nnUNetTrainer, "plain": nnUNetTrainer, "primus": TinyPrimus, "primus V3": TinyPrimusV3}


def target(
    family="residual",
    channels=1,
    classes=2,
    view=(16, 24, 32),
    features=(4, 6, 8),
    strides=STRIDES,
    kernels=None,
    blocks=None,
    trainer=None,
    name="Dataset100_Tiny",
    spacing=(1.0, 1.0, 1.0),
):
    plans = tiny_plans(view=view, kind="plain" if family == "plain" else "residual")
    plans["dataset_name"] = name
    settings = plans["configurations"][CONFIGURATION]
    settings["architecture"] = architecture("plain" if family == "plain" else "residual", features, strides)
    arguments = settings["architecture"]["arch_kwargs"]
    count = "n_conv_per_stage" if family == "plain" else "n_blocks_per_stage"
    arguments[count] = list(blocks or (1, 2, 2, 2)[: len(features)])
    if kernels is not None:
        arguments["kernel_sizes"] = [list(k) for k in kernels]
    settings["spacing"] = list(spacing)
    dataset_json = copy.deepcopy(DATASET_JSON)
    dataset_json["channel_names"] = {str(i): f"MR{i}" for i in range(channels)}
    settings["normalization_schemes"] = ["ZScoreNormalization"] * channels
    settings["use_mask_for_norm"] = [False] * channels
    dataset_json["labels"] = {"background": 0, **{f"label {i}": i for i in range(1, classes)}}
    return Target(plans, CONFIGURATION, dataset_json, trainer or TRAINERS[family])


def randomised(network, seed=1):
    """The network with every tensor drawn anew, so that nothing is equal by initialisation."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape) * (0.2 if tensor.ndim > 1 else 1.0) + (tensor.ndim == 1))
    return network


def stock_checkpoint(path, made, network, **more):
    """What nnUNetTrainer.save_checkpoint writes, NumPy scalars and all."""
    import numpy as np

    content = {
        "network_weights": network.state_dict(),
        "optimizer_state": {"state": {}, "param_groups": [{"lr": 1e-2}]},
        "grad_scaler_state": None,
        "logging": {"mean_fg_dice": [np.float64(0.5), np.float32(0.75)], "dice_per_class_or_region": [[np.float64(0.75)]]},
        "_best_ema": np.float64(0.7),
        "current_epoch": 2,
        "init_args": {
            "plans": made.plans,
            "configuration": made.configuration,
            "fold": 0,
            "dataset_json": made.dataset_json,
            "device": torch.device("cuda", 0),
        },
        "trainer_name": made.trainer.__name__,
        "inference_allowed_mirroring_axes": (0, 1, 2),
        **more,
    }
    torch.save(content, path)
    return path


def planned(folder, made, monkeypatch):
    """A preprocessed dataset folder for ``made``, as nnU-Net's planning leaves it."""
    monkeypatch.setenv("nnUNet_preprocessed", str(folder))
    dataset = folder / made.plans["dataset_name"]
    dataset.mkdir(parents=True, exist_ok=True)
    (dataset / f"{made.plans['plans_name']}.json").write_text(json.dumps(made.plans))
    (dataset / "dataset.json").write_text(json.dumps(made.dataset_json))
    return dataset


SMALL = {"head_width": 16, "predictor_width": 8, "mask_block": 8}


def pretraining(path, made, seed=1, **settings):
    """A checkpoint as CVATrainer writes it, with a teacher that differs from the student."""
    config = CVAConfig(**SMALL, **settings)
    network = randomised(made.build(), seed)
    student = Student(make_backbone(network, config), config)
    teacher = Teacher(student) if config.needs_heads else None
    if teacher is not None:
        randomised(teacher.encoder, seed + 1)
    content = {
        "network_weights": network.state_dict(),
        "init_args": {"plans": made.plans, "configuration": made.configuration, "fold": "all", "dataset_json": made.dataset_json},
        "trainer_name": "nnUNetTrainerCVA",
        "current_epoch": 3,
        "cva": {
            "version": "0.1.0",
            "config": config.as_dict(),
            "history": [{"epoch": 0, "alignment": 0.5}],
            "backbone_trainer": made.trainer.__name__,
            "heads": {n: m.state_dict() for n, m in student.heads().items()},
            "teacher": teacher.state_dict() if teacher is not None else None,
        },
    }
    torch.save(content, path)
    return network, teacher


def call(*arguments):
    return main([str(a) for a in arguments])
