"""Fine-tunings of evidence.py by nnU-Net's own trainers: the training of `nnUNetv2_cva compare`, splits and starts of light.py.

The labelled cases, the test cases and the network that is started from are those of the light loop; loss, optimiser, schedule,
augmentation, sampling and prediction are nnU-Net's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import small_project
import torch
from light import POINTS, Protocol, Recipe, start
from small_project import PLANS, resenc

from nnunetv2_cva.comparing.design import Design, Job
from nnunetv2_cva.comparing.job import Task, perform
from nnunetv2_cva.seeding import torch_seed

CONFIGURATION = "evidence"


@dataclass(frozen=True)
class Given(Design):
    """Training cases as they are given, not drawn."""

    def cases(self, labels: int, seed: int) -> list[str]:
        return [*self.training]


def fine_tune(
    protocol: Protocol,
    recipe: Recipe,
    states: dict[str, dict[str, torch.Tensor]] | None,
    dataset: Path,
    structures: int,
    keys: Sequence[str],
    test: Sequence[str],
    split: int,
) -> dict[str, Any]:
    """As light.fine_tune; ``dataset``: nnU-Net's preprocessed folder."""
    assert protocol.trainer is not None and protocol.deep_supervision
    network = {"patch_size": [*recipe.view], "batch_size": protocol.batch, "architecture": resenc(recipe.widths)}
    small_project.configure(dataset, CONFIGURATION, network, of="3d_fullres")
    os.environ.update(nnUNet_preprocessed=str(dataset.parent), nnUNet_n_proc_DA="0")
    length: dict[str, Any] = {"settings": "", "iterations": protocol.iterations, "points": len(POINTS), "fold": 0}
    names = dataset.name, CONFIGURATION, PLANS, protocol.trainer
    design = Given(*names, **length, training=tuple(keys), test=tuple(test))
    with TemporaryDirectory() as folder:
        weights = Path(folder) / "start.pth"
        begin = start(protocol, recipe, states, structures, torch_seed("start", split) % 2**31)
        torch.save({"network_weights": {k: v.contiguous() for k, v in begin.state_dict().items()}}, weights)
        found = perform(Task(Job("arm", len(keys), split), design, Path(folder), weights, "", "cpu"))
    scores = [[[*case.values()] for case in p["dice"].values()] for p in found.points]
    per_case = np.nanmean(np.array(scores, float), axis=2)  # None, a structure that is in neither, becomes nan
    return {
        "points": [p["iteration"] for p in found.points],
        "dice": [round(float(np.nanmean(p)), 4) for p in per_case],
        "foreground": [round(float(np.mean([*p["foreground"].values()])), 4) for p in found.points],
        "per_case": [round(float(v), 3) for v in per_case[-1]],
        "seconds": round(found.seconds, 1),
    }
