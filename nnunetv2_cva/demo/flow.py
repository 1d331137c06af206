"""The demo from beginning to end: its steps in order, each shown on a screen that the caller brings."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch

from nnunetv2_cva.demo import pictures, pipeline, results
from nnunetv2_cva.demo.anatomy import write_dataset
from nnunetv2_cva.demo.pipeline import Size
from nnunetv2_cva.demo.workspace import (
    CONFIGURATION,
    DATASET,
    DATASET_ID,
    PLANS,
    PRETRAINED,
    SCRATCH,
    Workspace,
    environment,
    output_to,
)

LOG_LINES = 15  # of nnU-Net's output, shown when a step fails
STEPS = 6


class Screen(Protocol):
    """Where the steps are shown. ``current``: which step is under way, in words; ``seconds``: what the finished ones took."""

    current: str
    seconds: dict[str, float]

    def say(self, text: str) -> None:
        """Show a paragraph."""

    def step(self, name: str, total: int, title: str, command: str = "") -> AbstractContextManager[Callable[[], None]]:
        """Show a step while the block runs; what it yields is called ``total`` times."""


FULL = Size()


def play(
    folder: str | Path, seed: int, device: str, overwrite: bool, show: Callable[[TextIO, int], Screen], size: Size = FULL
) -> int:
    """All of it. ``show``: makes the screen, given where it may write and how many steps there will be. Returns the exit code:
    1 if a step failed, 130 if it was interrupted.

    Raises:
        ValueError: the device is not there, the seed is negative, or the folder belongs to somebody else.
    """
    if seed < 0:
        raise ValueError(f"`seed`: expected a number >= 0, found {seed}.")
    device = choose_device(device)
    workspace = Workspace(Path(folder).resolve())
    workspace.claim(overwrite)
    with output_to(workspace.log) as terminal, environment(workspace):
        screen = show(terminal, STEPS)
        screen.say(f"nnUNetv2_cva demo on {device}: less than ten minutes on two CPU cores. Nothing is downloaded.")
        screen.say(f"Everything is written to {workspace.folder}; what nnU-Net prints goes to demo.log there.\n")
        try:
            numbers = train_and_compare(workspace, size, seed, device, screen)
            screen.say("\n" + closing(workspace, numbers, seed, screen.seconds))
        except KeyboardInterrupt:
            workspace.record(state=f"interrupted in {screen.current}")
            screen.say(f"\nInterrupted in {screen.current}. The same command starts over; {workspace.folder} can be deleted.")
            return 130
        except Exception as e:
            workspace.record(state=f"failed in {screen.current}: {e}")
            traceback.print_exc()  # goes to the log
            lines = workspace.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
            screen.say(f"\nFailed in {screen.current}: {e}\nThe last lines of {workspace.log}:\n")
            screen.say("\n".join("  " + line for line in lines))
            return 1
        workspace.record(state="complete", seed=seed, device=device, size=asdict(size), seconds=screen.seconds, **numbers)
        return 0


def choose_device(name: str) -> str:
    """The device to use; "auto" is the best that torch finds.

    Raises:
        ValueError: there is no such device.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    found = [device for device, available in there.items() if available]
    if name == "auto":
        return found[0]
    if name not in found:
        raise ValueError(f"`device` {name}: torch {torch.__version__} finds no such device here, only {', '.join(found)}.")
    return name


def train_and_compare(workspace: Workspace, size: Size, seed: int, device: str, screen: Screen) -> dict[str, Any]:
    """The steps. Returns the test cases, Dice per run, structure and case, and the metrics of the features."""
    training, test = prepare(workspace, size, seed, screen)
    before = pretrain(workspace, size, device, screen)
    fine_tune(workspace, size, seed, device, screen)
    title = "Both segment the test cases, and nnU-Net computes Dice"
    with screen.step("prediction", 2 * len(test), title, results.predict_command()) as tick:
        for run in (SCRATCH, PRETRAINED):
            pipeline.predict(workspace, run, test, device, tick)
        dice = {run: pipeline.dice(workspace, run, test) for run in (SCRATCH, PRETRAINED)}
    after = pipeline.history(workspace)[-1]
    return {"test_cases": test, "dice": dice, "untrained": before, "pretrained": {k: after[k] for k in before}}


def prepare(workspace: Workspace, size: Size, seed: int, screen: Screen) -> tuple[list[str], list[str]]:
    """Images, plans, preprocessed data. Returns the names of the training and of the test cases."""
    title = f"Synthetic MRI: {size.images} images, {size.labelled} of which count as labelled; {size.test} test cases"
    with screen.step("data", size.images + size.test, title) as tick:
        training, test = write_dataset(workspace.raw / DATASET, seed, size.images, size.test, tick)
    title = "nnU-Net plans and preprocesses; the plans are then reduced to what a CPU can bear"
    with screen.step("preprocessing", 2, title, f"nnUNetv2_plan_and_preprocess -d {DATASET_ID}") as tick:
        pipeline.plan(workspace, size, seed, training[: size.labelled], training[size.labelled : 2 * size.labelled])
        tick()
        pipeline.preprocess()
    return training, test


def pretrain(workspace: Workspace, size: Size, device: str, screen: Screen) -> dict[str, float]:
    """The pretraining. Returns the metrics of the features before it."""
    epochs, iterations = size.pretraining
    title = f"Pretraining on {size.images} images without labels: {epochs} epochs of {iterations} iterations"
    command = " ".join(("nnUNetv2_train", *pipeline.pretraining_arguments(device)))
    with screen.step("pretraining", epochs + 1, title, command) as tick:
        before = pipeline.untrained_scores(workspace, device)
        tick()
        pipeline.pretrain(workspace, device, tick)
    return before


def fine_tune(workspace: Workspace, size: Size, seed: int, device: str, screen: Screen) -> None:
    """nnU-Net's stock trainer, from scratch and from the pretrained weights."""
    epochs, iterations = size.fine_tuning
    command = f"nnUNetv2_train {DATASET_ID} {CONFIGURATION} 0 -p {PLANS} -device {device}"
    how = f"stock nnUNetTrainer on {size.labelled} labelled cases, {epochs * iterations} iterations (stock: 250,000)"
    with screen.step("from scratch", epochs * iterations, f"From scratch: {how}", command) as tick:
        pipeline.fine_tune(workspace, SCRATCH, size, seed, device, tick)
    command += f" -pretrained_weights {workspace.weights}"
    with screen.step("fine-tuning", epochs * iterations, "From the pretrained weights: the same", command) as tick:
        pipeline.fine_tune(workspace, PRETRAINED, size, seed, device, tick)


def closing(workspace: Workspace, numbers: dict[str, Any], seed: int, seconds: dict[str, float]) -> str:
    """Draw the pictures; everything that is said in the end."""
    test = numbers["test_cases"]
    pictures.write_pictures(workspace, test, numbers["dice"], seed)
    shown = {
        workspace.folder / "views.png": "two views of a case, what they share, and its bins",
        workspace.folder / "predictions.png": "test cases: image, truth, from scratch, pretrained",
        workspace.pretraining / "progress.png": "the pretraining, epoch by epoch",
    }
    listing = "\n".join(f"  {path}\n      {what}" for path, what in shown.items())
    said = results.summary(numbers, seconds), results.caveats(len(test), seed)
    return "\n\n".join((*said, f"Pictures:\n{listing}", results.by_hand(workspace)))
