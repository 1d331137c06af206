"""The steps of the demo, which are those of a user: plan, preprocess, pretrain, fine-tune beside training from scratch, look.

nnU-Net is used as it is: pretraining is the real ``nnUNetv2_train`` in a process of its own, fine-tuning its stock trainer
(``comparing``). Everything that computes has one thread, so that numbers do not depend on what else the machine does; two
cores are used by doing two things at a time. nnunetv2 is imported inside the functions: it reads the environment.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_cva.demo.workspace import CONFIGURATION, DATASET, DATASET_ID, FOLD, PLANS, RECIPE, Workspace
from nnunetv2_cva.files import read_object, write_json

Tick = Callable[[], object]


@dataclass(frozen=True)
class Size:
    """How much work the demo is. The defaults take about five minutes on two CPU cores that do nothing else."""

    images: int = 40  # for pretraining, which does not open their labels; labelled cases are drawn from them
    test: int = 10
    pretraining: tuple[int, int] = (20, 40)  # epochs, iterations per epoch
    labels: int = 2  # cases that are fine-tuned on
    splits: int = 4
    fine_tuning: int = 200  # iterations
    scored: int = 6  # test cases on which the fine-tuned networks are scored
    pairs: int = 30  # windows that labels are carried to


def plan(workspace: Workspace, size: Size, seed: int, training: list[str], test: list[str]) -> None:
    """nnU-Net's planning, then plans that a CPU can bear, and the split: what is trained on, and what never is."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments

    extract_fingerprints([DATASET_ID], num_processes=2, verbose=False, show_progress_bar=False)
    folder = workspace.preprocessed / DATASET
    plans = read_object(folder / f"{plan_experiments([DATASET_ID])}.json")
    write_json(folder / f"{PLANS}.json", _reduced(plans, size, seed))
    write_json(folder / "splits_final.json", [{"train": training, "val": test}])


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
        features_per_stage=[8, 16, 32, 64],
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
    }
    return {**plans, "plans_name": PLANS, "configurations": {CONFIGURATION: configuration}}


def preprocess() -> None:
    """nnU-Net's preprocessing of the configuration."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess as run

    run([DATASET_ID], PLANS, (CONFIGURATION,), (2,), show_progress_bar=False)


def pretrain(workspace: Workspace, device: str, tick: Tick, meanwhile: Callable[[Tick], object]) -> None:
    """``nnUNetv2_train`` in a process of its own, as a user would start it. ``tick`` is called after every epoch.

    ``meanwhile(look)`` runs in this process at the same time and calls ``look()`` now and then.

    Raises:
        RuntimeError: it failed; what it printed is in the log.
    """
    entry = "from nnunetv2.run.run_training import run_training_entry; run_training_entry()"
    process = subprocess.Popen([sys.executable, "-c", entry, *pretraining_arguments(device)])
    seen = 0

    def look() -> None:
        nonlocal seen
        for _ in range(epochs_done(workspace) - seen):
            seen += 1
            tick()

    try:
        meanwhile(look)
        while process.poll() is None:
            time.sleep(0.3)
            look()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if process.returncode != 0:
        command = " ".join(("nnUNetv2_train", *pretraining_arguments(device)))
        raise RuntimeError(f"{command} ended with code {process.returncode}.")
    look()


def pretraining_arguments(device: str) -> list[str]:
    """What follows nnUNetv2_train. The fold's validation cases, the test cases, are not trained on."""
    return [str(DATASET_ID), CONFIGURATION, str(FOLD), "-tr", RECIPE, "-p", PLANS, "-device", device]


def epochs_done(workspace: Workspace) -> int:
    """Of the pretraining."""
    path = workspace.pretraining / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def compare(workspace: Workspace, size: Size, device: str, pretrained: bool, tick: Tick) -> tuple[str, tuple[str, ...]]:
    """nnU-Net's stock trainer on few labelled cases, several splits: from scratch, or from scratch and from the weights. What
    has been trained before is not trained again. ``tick`` is called after every training.

    Returns the table, and what may be said.
    """
    from nnunetv2_cva.comparing.design import CompareRequest
    from nnunetv2_cva.comparing.run import run

    request = CompareRequest(
        DATASET,
        CONFIGURATION,
        (str(workspace.weights),) if pretrained else (),
        plans=PLANS,
        labels=(size.labels,),
        seeds=size.splits,
        fold=FOLD,
        test=size.scored,
        iterations=size.fine_tuning,
        points=2,
        folder=str(workspace.comparison),
        device=device,
        processes=2 if pretrained and device == "cpu" else 1,
    )
    outcome = run(request, lambda text: None, lambda *_: None, lambda *_: tick())
    return outcome.table, outcome.sentences


def propagate(workspace: Workspace, size: Size, seed: int, test: list[str], device: str, tick: Tick) -> dict[str, Any]:
    """Labels of a random window carried to one of another test case by nearest features: for every row the mean Dice over
    windows and half of its 95 % interval."""
    from nnunetv2_cva.seeing.labelled import labelled_cases
    from nnunetv2_cva.seeing.propagation import means, one_shot

    networks = frozen(workspace, device)
    dataset = labelled_cases(DATASET, 1)
    cases = dataset.chosen(test).read(next(iter(networks.values())))
    found = one_shot(cases, networks, [*dataset.labels.values()], size.pairs, seed, tick=tick)
    return {row: list(values) for row, values in means(found).items()}


def look(workspace: Workspace, test: list[str], device: str, tick: Tick) -> tuple[Path, Path]:
    """Points of one test case found in two others: a picture, and a page to click in."""
    from nnunetv2_cva.seeing.images import find_images, preprocess
    from nnunetv2_cva.seeing.look import look, picture
    from nnunetv2_cva.seeing.look_page import write_look

    networks = frozen(workspace, device)
    first = next(iter(networks.values()))
    files = [str(image_file(workspace, case)) for case in test[:3]]
    found = look([preprocess(f, first) for f in find_images(files, 1)], networks, 3, tick)
    picture(found, workspace.folder / "look.png")
    write_look(found, workspace.folder / "look.html")
    return workspace.folder / "look.png", workspace.folder / "look.html"


def frozen(workspace: Workspace, device: str) -> dict[str, Any]:
    """The pretrained network, and the same one as it was before."""
    from nnunetv2_cva.seeing.frozen import load_frozen, untrained

    trained = load_frozen(workspace.weights, device=device, label="pretrained")
    return {"untrained": untrained(workspace.weights, device=device), "pretrained": trained}


def image_file(workspace: Workspace, case: str) -> Path:
    """The raw image of a case."""
    return workspace.raw / DATASET / "imagesTr" / f"{case}_0000.nii.gz"
