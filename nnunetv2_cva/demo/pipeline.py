"""The steps of the demo, which are those of a user: plan, preprocess, pretrain, fine-tune, predict, compare.

nnU-Net is used as it is. Pretraining is the real ``nnUNetv2_train`` in a process of its own; fine-tuning drives
nnU-Net's stock trainer from Python, because its epochs of 250 iterations cannot be shortened otherwise. nnunetv2 is
imported inside the functions: it reads the environment while it is imported, and that takes seconds.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunetv2_cva.demo.workspace import CONFIGURATION, DATASET, DATASET_ID, PLANS, PRETRAINED, RECIPE, Workspace
from nnunetv2_cva.files import read_object, write_json

Tick = Callable[[], None]


@dataclass(frozen=True)
class Size:
    """How much work the demo is. The defaults take about eight minutes on two CPU cores that do nothing else."""

    images: int = 40  # for pretraining, which does not open their labels
    labelled: int = 4  # of these, for fine-tuning
    test: int = 10
    pretraining: tuple[int, int] = (16, 25)  # epochs, iterations per epoch
    fine_tuning: tuple[int, int] = (16, 50)


def plan(workspace: Workspace, size: Size, seed: int, labelled: list[str], watched: list[str]) -> None:
    """nnU-Net's planning, then plans that a CPU can bear, and the split: only ``labelled`` cases are fine-tuned on."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments

    extract_fingerprints([DATASET_ID], num_processes=2, verbose=False, show_progress_bar=False)
    folder = workspace.preprocessed / DATASET
    plans = read_object(folder / f"{plan_experiments([DATASET_ID])}.json")
    write_json(folder / f"{PLANS}.json", _reduced(plans, size, seed))
    write_json(folder / "splits_final.json", [{"train": labelled, "val": watched}])


def _reduced(plans: dict[str, Any], size: Size, seed: int) -> dict[str, Any]:
    """nnU-Net's plans with a small U-Net and small views; everything else as planned."""
    configuration = plans["configurations"][CONFIGURATION]
    stages = 4
    configuration["data_identifier"] = f"{PLANS}_{CONFIGURATION}"
    configuration["patch_size"] = [32, 40, 32]
    configuration["batch_size"] = 2
    configuration["batch_dice"] = True  # few structures fit into one small patch
    configuration["architecture"]["arch_kwargs"].update(
        n_stages=stages,
        features_per_stage=[16, 32, 64, 64],
        kernel_sizes=[[3, 3, 3]] * stages,
        strides=[[1, 1, 1]] + [[2, 2, 2]] * (stages - 1),
        n_conv_per_stage=[1] * stages,
        n_conv_per_stage_decoder=[1] * (stages - 1),
    )
    epochs, iterations = size.pretraining
    configuration["cva"] = {
        "epochs": epochs,
        "iterations_per_epoch": iterations,
        "seed": seed,
        "head_width": 256,
        "predictor_width": 64,
        "mask_block": 8,
        # AdamW comes further than the default SGD in so few iterations.
        "optimizer": "adamw",
        "learning_rate": 1e-3,
        "weight_decay": 0.01,
        "warmup_epochs": min(2, epochs - 1),
    }
    return {**plans, "plans_name": PLANS, "configurations": {CONFIGURATION: configuration}}


def preprocess() -> None:
    """nnU-Net's preprocessing of the configuration."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess as run

    run([DATASET_ID], PLANS, (CONFIGURATION,), (2,), show_progress_bar=False)


def untrained_scores(workspace: Workspace, device: str) -> dict[str, float]:
    """The metrics of the watched pairs, as the pretraining logs them, for the network that it starts from."""
    from nnunetv2_cva.training.trainer import CVATrainer

    class Untrained(CVATrainer):
        """A name, and with it a results folder, of its own."""

    plans = {**workspace.plans(), "continue_training": False}
    trainer = Untrained(plans, CONFIGURATION, "all", workspace.dataset_json(), torch.device(device))
    trainer.initialize()
    trainer.make_teacher()
    trainer.open_data()
    return trainer.watch()


def pretrain(workspace: Workspace, device: str, tick: Tick) -> None:
    """``nnUNetv2_train`` in a process of its own, as a user would start it. ``tick`` is called after every epoch.

    Raises:
        RuntimeError: it failed; what it printed is in the log.
    """
    entry = "from nnunetv2.run.run_training import run_training_entry; run_training_entry()"
    process = subprocess.Popen([sys.executable, "-c", entry, *pretraining_arguments(device)])
    seen = 0
    try:
        while process.poll() is None:
            time.sleep(0.3)
            for _ in range(len(history(workspace)) - seen):
                seen += 1
                tick()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if process.returncode != 0:
        command = " ".join(("nnUNetv2_train", *pretraining_arguments(device)))
        raise RuntimeError(f"{command} ended with code {process.returncode}.")
    for _ in range(len(history(workspace)) - seen):
        tick()


def pretraining_arguments(device: str) -> list[str]:
    """What follows nnUNetv2_train."""
    return [str(DATASET_ID), CONFIGURATION, "all", "-tr", RECIPE, "-p", PLANS, "-device", device]


def history(workspace: Workspace) -> list[dict[str, Any]]:
    """The metrics of the pretraining's epochs so far."""
    path = workspace.pretraining / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def fine_tune(workspace: Workspace, run: str, size: Size, seed: int, device: str, tick: Tick) -> None:
    """nnU-Net's stock trainer on the labelled cases, for fewer iterations than stock; PRETRAINED from the weights.

    Seeds and budget are the same for both runs. ``tick`` is called at every iteration.
    """
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    os.environ["nnUNet_results"] = str(workspace.results(run))
    os.environ["nnUNet_n_proc_DA"] = "0"  # no loader processes: both runs see the same batches
    plans = {**workspace.plans(), "continue_training": False}
    _seed(seed)
    trainer = nnUNetTrainer(plans, CONFIGURATION, 0, workspace.dataset_json(), torch.device(device))
    trainer.num_epochs, trainer.num_iterations_per_epoch = size.fine_tuning
    trainer.num_val_iterations_per_epoch = 2
    trainer.initialize()
    if run == PRETRAINED:
        load_pretrained_weights(trainer.network, str(workspace.weights))
    trainer.network.register_forward_hook(lambda network, *_: tick() if network.training else None)
    _seed(seed)
    trainer.run_training()


def _seed(seed: int) -> None:
    """Stock nnU-Net has no seed option and draws from all three of these."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def predict(workspace: Workspace, run: str, test: list[str], device: str, tick: Tick) -> None:
    """Segment the test cases with nnU-Net's predictor, without test-time mirroring, which takes eight times as long."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device(device), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(workspace.trained(run)), (0,))
    out = workspace.predictions(run)
    out.mkdir(parents=True, exist_ok=True)
    for name in test:
        predictor.predict_from_files_sequential([[str(image_file(workspace, name))]], [str(out / name)])
        tick()


def image_file(workspace: Workspace, test_case: str) -> Path:
    return workspace.raw / DATASET / "imagesTs" / f"{test_case}_0000.nii.gz"


def truth_file(workspace: Workspace, test_case: str) -> Path:
    return workspace.raw / DATASET / "labelsTs" / f"{test_case}.nii.gz"


def dice(workspace: Workspace, run: str, test: list[str]) -> dict[str, list[float]]:
    """Dice of every test case for every structure, by nnU-Net's evaluation."""
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    structures = {name: label for name, label in workspace.dataset_json()["labels"].items() if label != 0}
    found: dict[str, list[float]] = {name: [] for name in structures}
    for case in test:
        guess = workspace.predictions(run) / f"{case}.nii.gz"
        found_here = compute_metrics(str(truth_file(workspace, case)), str(guess), SimpleITKIO(), [*structures.values()])
        for name, label in structures.items():
            found[name].append(float(found_here["metrics"][label]["Dice"]))
    return found
