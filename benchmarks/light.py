"""A light pretraining and a light fine-tuning of a small ResEnc U-Net, for comparisons that need hundreds of runs on a CPU.

``CVA_BENCH_DEVICE=cuda`` trains on a GPU; what a batch holds is the same.

Pretraining is the package's own: its loader, views, losses, step and learning rate, without a trainer around them. Fine-tuning
follows nnU-Net's: Dice and cross-entropy, SGD 1e-2 with Nesterov momentum 0.99 and polynomial decay, clipping at 12, every second
patch forced onto the foreground; but it decays per iteration, augments by mirroring and intensities alone, and predicts with as
few windows as cover a case. What a batch holds follows from (split, labels, iteration): the same for all arms.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from small_project import resenc
from torch import Tensor, nn
from torch.nn.functional import pad

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.model.branches import Student, Teacher, make_backbone
from nnunetv2_cva.seeding import stream, torch_seed
from nnunetv2_cva.training.checkpoint import Run
from nnunetv2_cva.training.objective import prepare
from nnunetv2_cva.training.schedule import POLY_EXPONENT, learning_rate, make_optimizer
from nnunetv2_cva.training.step import TrainingStep
from nnunetv2_cva.views.augment import augment
from nnunetv2_cva.views.loader import Cases, PairDataset

CPU = torch.device("cpu")
DEVICE = torch.device(os.environ.get("CVA_BENCH_DEVICE", "cpu"))
AUGMENTATION = CVAConfig()  # its intensities are nnU-Net's
HEADS = {"head_width": 256, "predictor_width": 64}
POINTS = (0.2, 0.4, 0.6, 0.8, 1.0)  # of a fine-tuning, at which the test cases are segmented


@dataclass(frozen=True)
class Recipe:
    """One way to pretrain. ``settings``: of CVAConfig. ``misaligned``: the roi's axes swapped, as in the published code."""

    settings: dict[str, Any] = field(default_factory=dict)
    iterations: int = 800
    cases: int = 4
    images: int | None = None  # None: all but the test cases
    view: tuple[int, int, int] = (24, 32, 24)
    widths: tuple[int, ...] = (8, 16, 32, 64)
    misaligned: bool = False
    epochs: int = 20  # in whose steps the learning rate changes

    def config(self, seed: int) -> CVAConfig:
        its = self.iterations // self.epochs
        return CVAConfig(**{**HEADS, "epochs": self.epochs, "iterations_per_epoch": its, "seed": seed, **self.settings})


@dataclass(frozen=True)
class Protocol:
    """One way to fine-tune. ``part``: what is taken from the pretraining, the network or its encoder; from the "teacher" the
    encoder is the average's. ``trainer``: nnU-Net's, which has a rate and an optimiser of its own (stock.py); None: this file's
    loop."""

    iterations: int = 250
    rate: float = 1e-2
    part: str = "whole"
    deep_supervision: bool = False
    batch: int = 2
    optimizer: str = "sgd"  # nnU-Net's; "adamw": an instrument that leaves the empty segmentation sooner and scatters less
    trainer: str | None = None


def network(widths: tuple[int, ...], outputs: int, seed: int, deep_supervision: bool = False) -> nn.Module:
    """A ResEnc U-Net with one block per stage, initialised as nnU-Net does."""
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    torch.manual_seed(seed)
    return get_network_from_plans(*resenc(widths).values(), 1, outputs, deep_supervision=deep_supervision)


def autocast() -> AbstractContextManager:
    return torch.autocast(DEVICE.type, torch.bfloat16)


def as_fast(module: nn.Module) -> nn.Module:
    """Convolutions of few channels are faster in this memory format."""
    return module.to(DEVICE).to(memory_format=torch.channels_last_3d)


@dataclass
class Pretrained:
    student: Student
    teacher: Teacher | None
    config: CVAConfig
    curve: list[dict[str, float]]  # mean losses, five times
    seconds: float

    def states(self) -> dict[str, dict[str, Tensor]]:
        """Everything that has been trained. Fine-tuning reads "network" and, for the teacher's encoder, "teacher"."""
        teacher = {} if self.teacher is None else self.teacher.state_dict()
        network = self.student.backbone.network.state_dict()
        states = {"network": network, "student": self.student.state_dict(), "teacher": teacher}
        return {part: {name: tensor.cpu() for name, tensor in state.items()} for part, state in states.items()}


def swapped(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with every roi's axes in reverse order: bins of both views are then different anatomy."""
    return {**batch, "rois": batch["rois"].flip(-1)}


def pretrain(recipe: Recipe, seed: int, cases: Cases, keys: list[str]) -> Pretrained:
    """``keys``: the cases to pretrain on, of which ``recipe.images`` are taken, others for every seed."""
    config = recipe.config(seed)
    if recipe.images is not None:
        keys = stream("images", seed).choice(keys, recipe.images, replace=False).tolist()
    student = Student(make_backbone(network(recipe.widths, 1, seed), config), config).train()
    as_fast(student)
    teacher = Teacher(student).eval() if config.needs_heads else None
    optimizer = make_optimizer(student.parameters(), config, DEVICE)
    step = TrainingStep(Run(student, teacher, optimizer, None), student, config, autocast=autocast)
    data = PairDataset(cases, keys, recipe.view, config, recipe.cases, (0, recipe.cases), seed)
    began, rows, curve, every = perf_counter(), [], [], max(1, recipe.iterations // 5)
    for i in range(recipe.iterations):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(i // config.iterations_per_epoch, config)
        batch = swapped(data[i]) if recipe.misaligned else data[i]
        losses = step(prepare(batch, config, student.backbone.block, DEVICE, seed, i, 0))
        rows.append({name: value.item() for name, value in losses.items()})
        if len(rows) == every:
            curve.append({name: round(float(np.mean([r[name] for r in rows])), 4) for name in rows[0]})
            rows = []
    return Pretrained(student, teacher, config, curve, perf_counter() - began)


# ---- fine-tuning


@dataclass(frozen=True)
class Labelled:
    """Preprocessed cases in memory."""

    structures: int
    images: dict[str, np.ndarray]  # (I, J, K) float32
    labels: dict[str, np.ndarray]  # (I, J, K) int64, 0 to ``structures``


def load(folder: Path, keys: list[str], structures: int) -> Labelled:
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    dataset = nnUNetDatasetBlosc2(str(folder), keys)
    images, labels = {}, {}
    for key in keys:
        data, truth, _, _ = dataset.load_case(key)
        images[key], labels[key] = np.asarray(data[0], np.float32), np.clip(np.asarray(truth[0], np.int64), 0, structures)
    return Labelled(structures, images, labels)


def patches(data: Labelled, keys: list[str], view: tuple[int, ...], count: int, *numbers: int) -> tuple[Tensor, Tensor]:
    """``count`` augmented patches and their labels, all from ``numbers``."""
    rng = stream("patches", *numbers)
    images, labels = np.zeros((count, 1, *view), np.float32), np.zeros((count, 1, *view), np.int64)
    for n in range(count):
        key = keys[rng.integers(len(keys))]
        shape = data.images[key].shape
        if n % 2:  # around a voxel of a random structure, as nnU-Net oversamples the foreground
            found = np.argwhere(data.labels[key] == rng.integers(1, data.structures + 1))
            begin = [int(p) - v // 2 for p, v in zip(found[rng.integers(len(found))], view)]
        else:
            begin = [int(rng.integers(min(0, s - v), max(0, s - v) + 1)) for s, v in zip(shape, view)]
        begin = [int(np.clip(b, min(0, s - v), max(0, s - v))) for b, s, v in zip(begin, shape, view)]
        inner = tuple(slice(max(0, b), min(s, b + v)) for b, s, v in zip(begin, shape, view))
        outer = tuple(slice(i.start - b, i.stop - b) for i, b in zip(inner, begin))
        flips = tuple(axis for axis in range(3) if rng.random() < 0.5)
        images[n, 0][outer], labels[n, 0][outer] = data.images[key][inner], data.labels[key][inner]
        images[n, 0], labels[n, 0] = np.flip(images[n, 0], flips), np.flip(labels[n, 0], flips)
    noise = torch.Generator().manual_seed(torch_seed("noise", *numbers))
    return augment(torch.from_numpy(images), AUGMENTATION, rng, noise), torch.from_numpy(labels)


def start(
    protocol: Protocol, recipe: Recipe, states: dict[str, dict[str, Tensor]] | None, structures: int, seed: int
) -> nn.Module:
    """The network that fine-tuning starts from; what is not taken is as ``seed`` initialises it."""
    built: Any = network(recipe.widths, structures + 1, seed, deep_supervision=protocol.deep_supervision)
    if states is not None:
        if protocol.part == "whole":
            own = built.state_dict()
            taken = {k: v for k, v in states["network"].items() if ".seg_layers." not in k and k in own}
            missing = built.load_state_dict(taken, strict=False)
            assert all(".seg_layers." in k for k in missing.missing_keys), missing
        else:
            source, prefix = ("teacher", "encoder.encoder.") if protocol.part == "teacher" else ("network", "encoder.")
            taken = {k[len(prefix) :]: v for k, v in states[source].items() if k.startswith(prefix)}
            built.encoder.load_state_dict(taken)
    return as_fast(built)


def loss_function(deep_supervision: bool) -> Callable[[Any, Tensor], Tensor]:
    """nnU-Net's, with its weights of the resolutions: halved at each, the lowest left out."""
    from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

    soft = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    single = DC_and_CE_loss(soft, {}, weight_ce=1, weight_dice=1, dice_class=MemoryEfficientSoftDiceLoss)
    if not deep_supervision:
        return lambda out, target: single(out.float(), target)

    def several(out: list[Tensor], target: Tensor) -> Tensor:
        weights = [0.5**n for n in range(len(out) - 1)]
        parts = [single(o.float(), target[(..., *(slice(None, None, 2**n),) * 3)]) for n, o in enumerate(out[:-1])]
        return sum(w * p for w, p in zip(weights, parts)) / sum(weights)

    return several


def fine_tune(
    protocol: Protocol,
    recipe: Recipe,
    states: dict[str, dict[str, Tensor]] | None,
    data: Labelled,
    keys: list[str],
    test: list[str],
    split: int,
) -> dict[str, Any]:
    """The learning curve on the test cases: its points in iterations, mean Dice over structures, Dice of the foreground."""
    began = perf_counter()
    model: Any = start(protocol, recipe, states, data.structures, torch_seed("start", split) % 2**31)
    optimizer: torch.optim.Optimizer
    if protocol.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), protocol.rate, momentum=0.99, weight_decay=3e-5, nesterov=True)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), protocol.rate, weight_decay=0.01)
    loss_of = loss_function(protocol.deep_supervision)
    points = [max(1, round(p * protocol.iterations)) for p in POINTS]
    found: dict[str, Any] = {"points": points, "dice": [], "foreground": []}
    for i in range(protocol.iterations):
        optimizer.param_groups[0]["lr"] = protocol.rate * (1 - i / protocol.iterations) ** POLY_EXPONENT
        views, target = patches(data, keys, recipe.view, protocol.batch, split, len(keys), i)
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            out = model(views.to(DEVICE, memory_format=torch.channels_last_3d))
        loss_of(out, target.to(DEVICE)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 12)
        optimizer.step()
        if i + 1 in points:
            scores = evaluate(model, data, test, recipe.view)
            found["dice"].append(round(float(scores[:, :-1].mean()), 4))
            found["foreground"].append(round(float(scores[:, -1].mean()), 4))
    found["per_case"] = [round(float(s), 3) for s in scores[:, :-1].mean(1)]
    found["seconds"] = round(perf_counter() - began, 1)
    return found


@torch.no_grad()
def evaluate(model: Any, data: Labelled, test: list[str], view: tuple[int, int, int]) -> np.ndarray:
    """(cases, structures + 1): Dice of every structure, then of all together.

    By windows as large as in training, weighted as nnU-Net weights them: in one piece instance norm sees another case, and the
    foreground's Dice falls from 0.74 to 0.46.
    """
    model.eval()
    deep, model.decoder.deep_supervision = model.decoder.deep_supervision, False
    rows = []
    for key in test:
        image, truth = torch.from_numpy(data.images[key]), data.labels[key]
        size = [max(s, v) for s, v in zip(image.shape, view)]
        image = pad(image, [n for s, z in reversed([*zip(image.shape, size)]) for n in (0, z - s)])
        starts = [np.linspace(0, s - v, -(-s // v)).round().astype(int) for s, v in zip(size, view)]
        places = [tuple(slice(b, b + v) for b, v in zip(begin, view)) for begin in itertools.product(*starts)]
        with autocast():
            windows = torch.stack([image[place] for place in places])[:, None]
            out = model(windows.to(DEVICE, memory_format=torch.channels_last_3d)).float().cpu()
        total = torch.zeros(out.shape[1], *size)
        for part, place in zip(out, places):
            total[(slice(None), *place)] += part * gaussian(view)
        guess = total.argmax(0).numpy()[tuple(slice(s) for s in truth.shape)]
        pairs = [(guess == c, truth == c) for c in range(1, data.structures + 1)] + [(guess > 0, truth > 0)]
        rows.append([2 * (a & b).sum() / max(1, a.sum() + b.sum()) for a, b in pairs])
    model.decoder.deep_supervision = deep
    model.train()
    return np.array(rows)


@cache
def gaussian(view: tuple[int, int, int]) -> Tensor:
    from nnunetv2.inference.sliding_window_prediction import compute_gaussian

    return compute_gaussian(view, sigma_scale=1.0 / 8, value_scaling_factor=10, dtype=torch.float32, device=CPU)


def area(points: list[int], values: list[float]) -> float:
    """Under the learning curve from (0, 0), divided by its length: the mean Dice while training."""
    return float(np.trapezoid([0.0, *values], [0, *points]) / points[-1])
