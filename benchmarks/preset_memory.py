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
from dataclasses import replace
from typing import Literal

from nnunetv2_cva.config import resolve
from nnunetv2_cva.datasets.nnunet_plans import from_preset, presets
from nnunetv2_cva.training.memory import GB, Precision, prepared, step_memory, step_of, trained


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


def counted(name: str, precision: Precision, batch: int | None, checkpointing: bool | Literal["selective"] = False) -> float:
    """GB at the peak of the second step, when the optimizer's state exists."""
    recipe, manager, configuration, config = described(name, batch, checkpointing)
    return step_memory(recipe.backbone_trainer, manager, configuration, 1, config, precision)


def grown(name: str, precision: Precision, batch: int | None, checkpointing: bool | Literal["selective"] = False) -> float:
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
    size = tuple(configuration.patch_size)
    config = config.for_view(size)
    run = trained(recipe.backbone_trainer.build_network_architecture(manager, configuration, 1, 1, False), config)
    inputs = prepared(size, configuration.batch_size, 1, config, run.student.backbone.block)
    step = step_of(run, config, precision)
    for _ in range(2):
        step(inputs)
    running = False
    watcher.join()
    return (peak - before) / GB


def main() -> None:
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
