"""Memory that one training step of every preset takes, counted without a GPU.

    python benchmarks/preset_memory.py [PRESET ...] [--precision bf16] [--real]

The step (student, teacher, losses, backward, optimizer; view, cases and recipe of the preset) runs on fake tensors:
torch knows their shapes and lifetimes and computes nothing. Counted are the bytes of all tensors alive at the peak. A GPU
needs more than that: cuDNN's workspaces, the allocator's fragments, the CUDA context. Counted with each value of
``gradient_checkpointing``: false, "selective", true. ``--real`` also runs the step on the
CPU and prints by how much the process grew, which checks the count; for what fits into the machine's memory.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
import warnings
import weakref
from contextlib import nullcontext
from dataclasses import replace
from typing import Literal
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from nnunetv2_cva.config import CVAConfig, resolve
from nnunetv2_cva.datasets.nnunet_plans import from_preset, presets
from nnunetv2_cva.model.branches import Student, Teacher, make_backbone
from nnunetv2_cva.training.checkpoint import Run
from nnunetv2_cva.training.objective import Prepared
from nnunetv2_cva.training.schedule import make_optimizer
from nnunetv2_cva.training.step import TrainingStep
from nnunetv2_cva.views.masking import expand_mask, hide

GB = 2**30


class Fake(FakeTensorMode):
    """The teacher is a deep copy of the student; its tensors belong to the same mode."""

    def __deepcopy__(self, memo: dict) -> Fake:
        return self


class Peak(TorchDispatchMode):
    """Bytes of all storages that operations have made and nobody has dropped: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.known, self.now, self.peak = WeakIdKeyDictionary(), 0, 0

    def note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self.known:
            size = self.known[storage] = storage.nbytes()
            weakref.finalize(storage, self._dropped, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _dropped(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.note, out)
        return out


def described(name: str, batch: int | None, checkpointing: bool | Literal["selective"]):
    """The preset's recipe, its plans and configuration as nnU-Net reads them, and the settings of the method."""
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    from nnunetv2_cva.trainers import nnUNetTrainerCVA, nnUNetTrainerCVA_Primus

    plans = from_preset(name)
    recipe = plans["preset"]["recipe"]
    found = getattr(nnUNetTrainerCVA, recipe, None) or getattr(nnUNetTrainerCVA_Primus, recipe)
    if batch is not None:
        plans["configurations"]["3d_fullres_cva"]["batch_size"] = batch
    manager = PlansManager(plans)
    config = replace(resolve(found.config, plans, "3d_fullres_cva", {}), gradient_checkpointing=checkpointing)
    return found, manager, manager.get_configuration("3d_fullres_cva"), config


def build(recipe, manager, configuration, config: CVAConfig):
    """Everything that is trained."""
    network = recipe.backbone_trainer.build_network_architecture(manager, configuration, 1, 1, False)
    student = Student(make_backbone(network, config), config).train()
    teacher = Teacher(student).eval() if config.needs_heads else None
    return Run(student, teacher, make_optimizer(student.parameters(), config, torch.device("cpu")), None)


def training_step(run: Run, config: CVAConfig, precision: str) -> TrainingStep:
    """The trainer's."""
    autocast = {"bf16": lambda: torch.autocast("cpu", torch.bfloat16), "fp32": nullcontext}[precision]
    return TrainingStep(run, run.student, config, autocast=autocast)


def batch_of(configuration, config: CVAConfig, block: tuple[int, int, int]) -> Prepared:
    """What the student and the teacher get."""
    size = tuple(configuration.patch_size)
    n = configuration.batch_size * (2 if config.needs_second_view else 1)
    views, inside = torch.randn(n, 1, *size), torch.ones(n, 1, *size, dtype=torch.bool)
    rois = torch.tensor([[0.2, 0.2, 0.2], [0.9, 0.9, 0.9]]).expand(n, 2, 3).contiguous()
    grid = [-(-s // b) for s, b in zip(size, block)]
    cells = grid[0] * grid[1] * grid[2]
    mask = (torch.arange(cells) < round(config.mask_ratio * cells)).reshape(1, *grid).expand(n, *grid).contiguous()
    hidden = expand_mask(mask, block, size)
    return Prepared(views, rois, inside, hide(views, hidden), mask, hidden)


def counted(name: str, precision: str, batch: int | None, checkpointing: bool | Literal["selective"] = False) -> float:
    """GB at the peak of the second step, when the optimizer's state exists."""
    recipe, manager, configuration, config = described(name, batch, checkpointing)
    with Fake():
        with patch("torch.nn.init.trunc_normal_", lambda tensor, *_, **__: tensor):  # looks at values, which fakes have not
            run = build(recipe, manager, configuration, config)
        inputs, step = batch_of(configuration, config, run.student.backbone.block), training_step(run, config, precision)
        with Peak() as tracker:
            modules = [m for m in (run.student, run.teacher) if m is not None]
            for tensor in (
                *(t for m in modules for t in (*m.parameters(), *m.buffers())),
                inputs.views,
                inputs.visible,
                inputs.inside,
                inputs.hidden,
            ):
                tracker.note(tensor)
            for _ in range(2):
                step(inputs)
        return tracker.peak / GB


def grown(name: str, precision: str, batch: int | None, checkpointing: bool | Literal["selective"] = False) -> float:
    """GB by which the process grew at most during the same two steps on the CPU."""
    recipe, manager, configuration, config = described(name, batch, checkpointing)
    resident = lambda: int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")  # noqa: E731
    before = peak = resident()
    running = True

    def watch() -> None:
        nonlocal peak
        while running:
            peak = max(peak, resident())
            time.sleep(0.005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run = build(recipe, manager, configuration, config)
    inputs, step = batch_of(configuration, config, run.student.backbone.block), training_step(run, config, precision)
    for _ in range(2):
        step(inputs)
    running = False
    watcher.join()
    return (peak - before) / GB


def main() -> None:
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=sorted(presets()))
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--batch-size", type=int, help="cases per step instead of the preset's")
    parser.add_argument("--real", action="store_true")
    args = parser.parse_args()
    last = " process grew by |" if args.real else ""
    print(f"| preset | precision | GB of tensors at the peak | selective | all recomputed |{last}")
    print("|---|---|---|---|---|" + ("---|" if args.real else ""))
    for name in args.presets:
        found = [counted(name, args.precision, args.batch_size, checkpointing) for checkpointing in (False, "selective", True)]
        line = f"| {name} | {args.precision} | {found[0]:.2f} | {found[1]:.2f} | {found[2]:.2f} |"
        if args.real:
            line += f" {grown(name, args.precision, args.batch_size):.2f} |"
        print(line)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
