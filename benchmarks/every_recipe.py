"""Does every recipe train on real images, and go on after a stop? A few steps of each, on anisotropic views and bins.

    python benchmarks/every_recipe.py --raw FOLDER_WITH_Dataset004_Hippocampus --folder WORK [RECIPE ...]

Each recipe that ``nnUNetv2_cva trainers`` lists and that pretrains is found by nnU-Net's own look-up, trains 2 epochs of 2 steps,
is continued from its checkpoint to a third epoch, and all its losses and metrics have to be finite. Views of 16x32x24 voxels,
``roi_size`` 2x7x7. The largest networks take about 12 GB of memory and 6 GB of disk for as long as they run.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import math
import os
import resource
import shutil
from pathlib import Path
from time import perf_counter
from typing import Any

import small_project
import torch
from small_project import NAME, PLANS, prepare

CONFIGURATION = "every_recipe"


def recipes() -> list[str]:
    """Names of the pretraining recipes."""
    from nnunetv2_cva.installation.hook import recipes_folder
    from nnunetv2_cva.installation.recipes import recipes as listed

    return [name for name in listed(Path(recipes_folder())) if "Finetune" not in name]


def configure(folder: Path) -> None:
    """Add the configuration, and let nnU-Net find the recipes."""
    from nnunetv2_cva.installation.hook import recipes_folder

    changes = {"patch_size": [16, 32, 24], "batch_size": 2, "cva": {"roi_size": [2, 7, 7], "mask_block": 8}}
    small_project.configure(folder / "pre" / NAME, CONFIGURATION, changes)
    os.environ["nnUNet_extTrainer"] = recipes_folder()


def trained(name: str, epochs: int, resume: bool) -> Any:
    """The trainer after training, as nnUNetv2_train makes and runs it."""
    from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

    os.environ["nnUNet_cva"] = json.dumps({"epochs": epochs, "iterations_per_epoch": 2, "check_seconds": 1})
    trainer = get_trainer_from_args(NAME, CONFIGURATION, "all", name, PLANS, resume, torch.device("cpu"))
    maybe_load_checkpoint(trainer, resume, False, None)
    trainer.run_training()
    return trainer


def run(name: str) -> str:
    """A row of the table.

    Raises:
        AssertionError: not continued, or something is not finite.
    """
    began = perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        folder = Path(trained(name, 2, resume=False).output_folder_base)
        gc.collect()  # a trainer refers to itself: without this, two of the largest would be in memory
        trainer = trained(name, 3, resume=True)
    epochs = trainer.history.epochs
    shutil.rmtree(folder)
    assert [epoch["epoch"] for epoch in epochs] == [0, 1, 2], f"{name}: epochs {[e['epoch'] for e in epochs]}"
    wrong = [key for epoch in epochs for key, value in epoch.items() if not math.isfinite(value)]
    assert not wrong, f"{name}: {wrong} not finite"
    parameters = sum(p.numel() for p in trainer.student.parameters() if p.requires_grad)
    losses = ", ".join(f"{key[:-5]} {epochs[-1][key]:.2f}" for key in epochs[-1] if key.endswith("_loss"))
    return f"| {name} | {parameters / 1e6:.1f} | {losses} | {perf_counter() - began:.0f} |"


def main() -> None:
    """Run them one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", metavar="RECIPE")
    parser.add_argument("--raw", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    prepare(args.raw.resolve(), args.folder.resolve())
    configure(args.folder)
    print("| recipe | trained parameters, millions | losses of the third epoch | s |\n|---|---|---|---|")
    for name in args.recipes or recipes():
        print(run(name), flush=True)
        gc.collect()
    print(f"\nPeak memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GB")  # Linux: kB


if __name__ == "__main__":
    main()
