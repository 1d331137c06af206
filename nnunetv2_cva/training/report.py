"""What a training says in its log: what it is about to do, how an epoch went, what to do with the weights."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_cva.training.checkpoint import FINAL
from nnunetv2_cva.training.probe import criterion

if TYPE_CHECKING:
    from nnunetv2_cva.training.trainer import CVATrainer


def opening(trainer: CVATrainer) -> list[str]:
    """What a step costs, what chooses the best checkpoint, all settings."""
    config, cases = trainer.config, trainer.configuration_manager.batch_size
    views = 2 * cases if config.needs_second_view else cases
    teacher = " and as many through the teacher's encoder" if trainer.teacher is not None else ""
    trained = sum(p.numel() for p in trainer.student.parameters() if p.requires_grad)
    precision = str(trainer.autocast_dtype or torch.float32).removeprefix("torch.")
    return [
        f"Each step: {cases} cases, {views} views of {'x'.join(map(str, trainer.view_size))} voxels through the student"
        f"{teacher} (patch_size and batch_size of the plans). {trained / 1e6:.1f} M parameters are trained, "
        f"precision {precision}.",
        f"The best checkpoint is the one with the {criterion(config)[2]}.",
        f"Settings of the method: {config.as_dict()}",
    ]


def metrics(record: dict[str, Any]) -> list[str]:
    """Names of an epoch's metrics, losses first."""
    losses = [k for k in record if k.endswith("_loss")]
    return losses + [k for k in record if k not in losses and k not in ("epoch", "seconds")]


def epoch(record: dict[str, Any], note: str) -> list[str]:
    """A line of losses, a line of everything else, and the time."""
    names = metrics(record)
    return [
        "  " + ", ".join(f"{k} {record[k]:.4f}" for k in names if k.endswith("_loss")),
        "  " + ", ".join(f"{k} {record[k]:.4g}" for k in names if not k.endswith("_loss")),
        f"  {record['seconds']:.1f} s" + (f", {note}" if note else ""),
    ]


def closing(trainer: CVATrainer) -> list[str]:
    """The metrics of the last epoch and the exact command for fine-tuning."""
    epochs, lines = trainer.history.epochs, []
    if epochs:
        last = {k: round(v, 4) for k, v in epochs[-1].items()}
        lines.append(f"Metrics of the last epoch: {last}")
    backbone = trainer.backbone_trainer
    plans = trainer.plans_manager.plans_name
    configuration, note = _for_fine_tuning(trainer)
    return [
        *lines,
        f"Fine-tune with nnU-Net itself, on a dataset that has these plans:\n"
        f"nnUNetv2_train DATASET {configuration} FOLD -p {plans}"
        f"{'' if backbone is nnUNetTrainer else f' -tr {backbone.__name__}'} "
        f"-pretrained_weights {os.path.join(trainer.output_folder, FINAL)}\n"
        f"{note}For a dataset with other plans, make a file that fits with nnUNetv2_cva export.",
    ]


def _for_fine_tuning(trainer: CVATrainer) -> tuple[str, str]:
    """The configuration to fine-tune: what this one inherits from, if it does; and a warning where the weights do not fit it."""
    configurations = trainer.plans_manager.plans["configurations"]
    name = trainer.configuration_name
    while "inherits_from" in configurations[name]:
        name = configurations[name]["inherits_from"]
    size = configurations[name]["patch_size"]
    if trainer.student.backbone.fits_any_view or tuple(size) == trainer.view_size:
        return name, ""
    size, view = ("x".join(map(str, s)) for s in (size, trainer.view_size))
    return name, (
        f"{name} has patch_size {size} and this network a position for every token of {view}: give it this patch_size, or "
        "adapt the weights with nnUNetv2_cva export.\n"
    )
