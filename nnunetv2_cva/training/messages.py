"""What a training says in its log: what it is about to do, how an epoch went, what to do with the weights."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from time import monotonic
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_cva.config import CVAConfig, FinetuneConfig
from nnunetv2_cva.datasets.next_steps import fine_tuning_steps
from nnunetv2_cva.datasets.user_changes import recipe_of
from nnunetv2_cva.model.branches import Student
from nnunetv2_cva.nnunet import PREPROCESSED, fine_tuned
from nnunetv2_cva.nnunet import folder as nnunet_folder
from nnunetv2_cva.sizes import by
from nnunetv2_cva.training.metrics import METRICS, is_loss
from nnunetv2_cva.training.watching import criterion

PROGRESS_SECONDS = 60.0
# Iterations. Measured were pretrainings up to 1000, meant for 62,500, and fine-tunings at 1e-3 of 1500, meant for 250,000.
LONG_ENOUGH_FOR_SGD = 20_000
LOW_RATE = 1e-3  # of SGD in fine-tuning


class Pace:
    """Says after the first minute when the run will end, and once a minute how far an epoch of ``total`` steps has come.

    ``left``: steps of the whole run. ``begin()`` before every epoch, ``tick()`` after every step. The first step, in which things
    are compiled and measured, does not count for the end of the run; what lies between epochs does.
    """

    def __init__(self, total: int, left: int, say: Callable[[str], None]) -> None:
        self.total, self.left, self.say = total, left, say
        self.counted, self.first, self.told = 0, 0.0, False
        self.begin(0)

    def begin(self, done: int) -> None:
        """An epoch of which so many steps are done already."""
        self.done, self.steps, self.began = done, 0, monotonic()
        self.said = self.began

    def tick(self) -> None:
        now = monotonic()
        self.steps, self.left, self.counted = self.steps + 1, self.left - 1, self.counted + 1
        if self.counted == 1:
            self.first = now
        elif not self.told and now - self.first > PROGRESS_SECONDS and self.left:
            self.told, self.said = True, now
            each = (now - self.first) / (self.counted - 1)
            end = datetime.now() + timedelta(seconds=each * self.left)
            togo = f"{self.left} iterations to go, {each:.2f} s each: {lasting(each * self.left)}"
            self.say(f"  The run: {togo}, until {end:%Y-%m-%d %H:%M}")
        elif now - self.said > PROGRESS_SECONDS and self.done + self.steps < self.total:
            self.said = now
            self.say(f"  {self.done + self.steps} of {self.total} iterations, {(now - self.began) / self.steps:.2f} s each")


def lasting(seconds: float) -> str:
    """A length of time in its two largest units."""
    minutes = round(seconds / 60)
    days, hours = minutes // 1440, minutes % 1440 // 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"


def opening(
    config: CVAConfig, cases: int, view: Sequence[int], student: Student, teacher: bool, dtype: torch.dtype | None
) -> list[str]:
    """What a step of ``cases`` costs, what chooses the best checkpoint, all settings."""
    views = 2 * cases if config.needs_second_view else cases
    encoder = " and as many through the teacher's encoder"
    best = criterion(config)
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    steps = config.epochs * config.iterations_per_epoch
    lines = [
        f"Length: {config.epochs} epochs x {config.iterations_per_epoch} iterations = {steps} steps.",
        f"Each step: {cases} cases, {views} views of {by(view)} voxels through the student"
        f"{encoder if teacher else ''} (patch_size and batch_size of the "
        f"plans). {trained / 1e6:.1f} M parameters are trained, precision {str(dtype or torch.float32).removeprefix('torch.')}.",
        f"The best checkpoint is the one with the {'highest' if best.sign > 0 else 'lowest'} {best.name}: {best.meaning}.",
        f"Settings of the method: {config.as_dict()}",
    ]
    if config.warmup >= config.epochs:
        lines.append(
            f"WARNING: warmup_epochs {config.warmup}, epochs {config.epochs}: the whole training is warm-up, with at most "
            f"{config.epochs / config.warmup:.0%} of learning_rate. Set warmup_epochs to less than epochs."
        )
    if config.optimizer == "sgd" and config.epochs * config.iterations_per_epoch < LONG_ENOUGH_FOR_SGD:
        lines.append(short_for_sgd(config))
    return lines


def short_for_sgd(config: CVAConfig) -> str:
    """What is known about SGD, which the paper trains U-Nets with, in runs that are much shorter than the paper's."""
    return (
        f"WARNING: {config.epochs * config.iterations_per_epoch} iterations of SGD at learning_rate {config.learning_rate:g}; "
        "the paper's recipe is meant for 62500. Measured on the hippocampus after 800 iterations, fine-tuned with AdamW on 4 "
        "labelled cases: Dice was 0.117 +- 0.178 below training from scratch (three pretrainings, ahead in 1 of 5 splits); with "
        "optimizer adamw, learning_rate 0.001, weight_decay 0.01 it was 0.023 +- 0.126 above. It was the decoder: from the "
        "encoder alone, with a fresh decoder, it was 0.054 +- 0.153 above. Between 1000 iterations and the "
        "paper's 62500 nothing was measured."
    )


def short_fine_tuning(config: FinetuneConfig, stock: str) -> list[str]:
    """The same for fine-tuning at the rate that is meant for nnU-Net's 1000 epochs. ``stock``: nnU-Net's trainer for the network.
    No line where there is nothing to say."""
    steps = config.epochs * config.iterations_per_epoch
    if config.optimizer != "sgd" or config.learning_rate > LOW_RATE or steps >= LONG_ENOUGH_FOR_SGD:
        return []
    return [
        f"WARNING: {steps} iterations of SGD at learning_rate {config.learning_rate:g}, a rate for 1000 epochs of 250: "
        "after 1500 iterations on the hippocampus (8 labelled cases, three repeats) mean Dice was 0.368 from scratch and 0.212 "
        "pretrained, against 0.700 and 0.716 with nnU-Net's own 0.01. Train so few with nnU-Net's own "
        f'{stock}, or set "optimizer": "adamw", "learning_rate": 0.001, "warmup_epochs": 0 in "{config.BLOCK}".'
    ]


def out_of_memory(error: BaseException, config: CVAConfig) -> str:
    """What to change when a step does not fit into the device, with what it needed."""
    gigabytes = 2**30
    needed = ""
    if torch.cuda.is_available():
        used, there = (
            torch.cuda.max_memory_allocated(),
            torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory,
        )
        needed = f" It held {used / gigabytes:.1f} GB when more was asked for; the device has {there / gigabytes:.1f} GB."
    return f"A step does not fit into the memory of the device.{needed} Set {less_memory(config)}. ({str(error).splitlines()[0]})"


def less_memory(config: CVAConfig) -> str:
    """What to set next for a step that takes less."""
    sizes = "a smaller batch_size or patch_size of the configuration"
    more = {False: '"selective", then true', "selective": "true"}.get(config.gradient_checkpointing)
    return sizes if more is None else f'gradient_checkpointing {more} in "cva", or {sizes}'


def metrics(record: dict[str, Any]) -> list[str]:
    """Names of an epoch's metrics, losses first."""
    losses = [k for k in record if is_loss(k)]
    return losses + [k for k in METRICS if k in record and k not in losses]


def epoch(record: dict[str, Any], note: str) -> list[str]:
    """A line of losses, a line of everything else, and the time."""
    names = metrics(record)
    return [
        "  " + ", ".join(f"{k} {record[k]:.4f}" for k in names if is_loss(k)),
        "  " + ", ".join(f"{k} {record[k]:.4g}" for k in names if not is_loss(k)),
        f"  {record['seconds']:.1f} s" + (f", {note}" if note else ""),
    ]


def of_plan(plans: dict[str, Any], configuration: str, backbone: str | None, weights: str) -> list[str]:
    """The lines that ``plan`` printed for every target, with this file of weights; none where no target is noted, or the plan was
    made for another network than that of the trainer of nnU-Net's ``backbone``."""
    try:
        folder, name = nnunet_folder(PREPROCESSED) / str(plans["dataset_name"]), str(plans["plans_name"])
        if recipe_of(folder, name).trainer != backbone:
            return []  # planned for another network
        steps = fine_tuning_steps(folder, name, configuration, weights)
    except (KeyError, ValueError):  # plans of another program have no such names
        return []
    return [line for step in steps for line in (step.title, *step.commands)]


def closing(plans: dict[str, Any], configuration: str, student: Student, backbone: type[nnUNetTrainer], weights: str) -> str:
    """The exact commands for fine-tuning from the file ``weights``, in the configuration that this one was made from: the
    datasets to fine-tune have that one.

    nnU-Net's loader takes a U-Net's checkpoint as it is for any dataset with these plans. A Primus has tensors whose shape
    follows from the view and from the number of classes: its weights are made for the target first. Where the plan was made for
    targets, these are the lines that it printed for each.
    """
    targets = of_plan(plans, configuration, backbone.__name__, weights)
    if targets:
        return "\n".join(["Fine-tune with nnU-Net itself.", *targets])
    name = fine_tuned(plans, configuration)
    trainer = "" if backbone is nnUNetTrainer else f" -tr {backbone.__name__}"
    how, weights = f"{name} FOLD -p {plans['plans_name']}{trainer}", shlex.quote(weights)
    export = f"nnUNetv2_cva export {weights} -d DATASET -c {name} -p {plans['plans_name']}{trainer} -o weights.pth"
    if student.backbone.fits_any_target:
        return (
            f"Fine-tune with nnU-Net itself, on a dataset that has these plans:\n"
            f"nnUNetv2_train DATASET {how} -pretrained_weights {weights}\n"
            f"For a dataset with other plans, make a file that fits: nnUNetv2_cva export."
        )
    return (
        "Fine-tune with nnU-Net itself. Weights of this network are made for a dataset first (number of classes, patch size):\n"
        f"{export}\nnnUNetv2_train DATASET {how} -pretrained_weights weights.pth"
    )
