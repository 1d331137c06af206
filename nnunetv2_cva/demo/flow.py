"""The demo from beginning to end: its steps in order, each shown on a screen that the caller brings."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch

from nnunetv2_cva.demo import pictures, pipeline, results
from nnunetv2_cva.demo.anatomy import write_dataset
from nnunetv2_cva.demo.pipeline import Size, Tick
from nnunetv2_cva.demo.workspace import CONFIGURATION, DATASET, DATASET_ID, FOLD, PLANS, Workspace, environment, output_to

LOG_LINES = 15  # of nnU-Net's output, shown when a step fails
# The steps, and which share of the time each takes on two quiet cores.
STEPS = {"data": 0.03, "preprocessing": 0.06, "pretraining": 0.6, "fine-tuning": 0.25, "labels carried": 0.03, "look": 0.03}


class Screen(Protocol):
    """Where the steps are shown. ``current``: which step is under way, in words; ``seconds``: what the finished ones took."""

    current: str
    seconds: dict[str, float]

    def say(self, text: str) -> None:
        """Show a paragraph."""

    def step(self, name: str, total: int, title: str, command: str = "") -> AbstractContextManager[Callable[[], None]]:
        """Show a step while the block runs; what it yields is called ``total`` times."""


Show = Callable[[TextIO, Mapping[str, float]], Screen]
FULL = Size()


def play(folder: str | Path, seed: int, device: str, overwrite: bool, show: Show, size: Size = FULL) -> int:
    """All of it. ``show``: makes the screen, given where it may write and the steps with their shares of the time. Returns the
    exit code: 1 if a step failed, 130 if it was interrupted.

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
        screen.say(f"nnUNetv2_cva demo on {device}: up to six minutes on two CPU cores with nothing else to do. No download.")
        screen.say(f"Everything is written to {workspace.folder}; what nnU-Net prints goes to demo.log there.\n")
        try:
            numbers = all_steps(workspace, size, seed, device, screen)
            screen.say("\n" + closing(workspace, size, numbers, seed, screen.seconds))
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


def all_steps(workspace: Workspace, size: Size, seed: int, device: str, screen: Screen) -> dict[str, Any]:
    """The steps. Returns what was found: plain numbers and words."""
    if device == "cpu":
        torch.set_num_threads(1)
    test = prepare(workspace, size, seed, screen)
    pretrain(workspace, size, device, screen)
    command = (
        f"nnUNetv2_train {DATASET_ID} {CONFIGURATION} {FOLD} -p {PLANS} -pretrained_weights {workspace.short(workspace.weights)}"
    )
    title = f"Fine-tuning from the weights: the same {size.splits} splits and batches, stock nnU-Net"
    with screen.step("fine-tuning", size.splits, title, command) as tick:
        table, sentences = pipeline.compare(workspace, size, device, True, tick)
    title = f"Labels of one test case carried to another by the nearest features, in {size.pairs} random windows"
    with screen.step("labels carried", size.pairs, title) as tick:
        carried = pipeline.propagate(workspace, size, seed, test, device, tick)
    with screen.step("look", 6, "Points of one test case found in others", look_command(workspace, test)) as tick:
        pipeline.look(workspace, test, device, tick)
    return {"test_cases": test, "carried": carried, "table": table, "sentences": list(sentences)}


def prepare(workspace: Workspace, size: Size, seed: int, screen: Screen) -> list[str]:
    """Images, plans, preprocessed data. Returns the names of the test cases."""
    title = f"Synthetic MRI: {size.images} images to train on, {size.test} test cases"
    with screen.step("data", size.images + size.test, title) as tick:
        names = write_dataset(workspace.raw / DATASET, seed, size.images + size.test, tick)
    title = "nnU-Net plans and preprocesses; the plans are then reduced to what a CPU can bear"
    with screen.step("preprocessing", 2, title, f"nnUNetv2_plan_and_preprocess -d {DATASET_ID}") as tick:
        pipeline.plan(workspace, size, seed, names[: size.images], names[size.images :])
        tick()
        pipeline.preprocess()
    return names[size.images :]


def pretrain(workspace: Workspace, size: Size, device: str, screen: Screen) -> None:
    """The pretraining; on the other core, meanwhile, training from scratch."""
    epochs, iterations = size.pretraining
    title = (
        f"Pretraining on {size.images} images without labels, {epochs} epochs of {iterations} iterations; at the same time\n"
        f"      training from scratch on {size.labels} labelled cases, {size.splits} splits, {size.fine_tuning} iterations each "
        "(stock: 250,000)"
    )
    command = " ".join(("nnUNetv2_train", *pipeline.pretraining_arguments(device)))
    with screen.step("pretraining", epochs + size.splits, title, command) as tick:

        def scratch(look: Tick) -> None:
            pipeline.compare(workspace, size, device, False, lambda: (tick(), look()))

        pipeline.pretrain(workspace, device, tick, scratch)


def look_command(workspace: Workspace, test: list[str]) -> str:
    """What a user types for the picture."""
    images = " ".join(workspace.short(pipeline.image_file(workspace, case)) for case in test[:3])
    return f"nnUNetv2_cva look {workspace.short(workspace.weights)} -i {images} -o FOLDER"


def closing(workspace: Workspace, size: Size, numbers: dict[str, Any], seed: int, seconds: dict[str, float]) -> str:
    """Draw what is left to draw; everything that is said in the end."""
    pictures.write_views(workspace, seed)
    shown = {
        workspace.folder / "look.html": "click a point of one patient and see where the network finds it in others",
        workspace.folder / "look.png": "the same as a picture; features as colours",
        workspace.folder / "views.png": "two views of a case, what they share, and its bins",
        workspace.comparison / "curves.png": "fine-tuning, from scratch and pretrained",
        workspace.pretraining / "progress.png": "the pretraining, epoch by epoch",
    }
    listing = "\n".join(f"  {path}\n      {what}" for path, what in shown.items())
    times = ", ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items())
    said = (
        results.carried_table(numbers["carried"], size.pairs),
        results.compared(numbers["table"], numbers["sentences"], size),
        results.caveats(seed),
        f"Pictures, the first of them to play with:\n{listing}",
        results.by_hand(workspace),
        f"Time: {sum(seconds.values()) / 60:.1f} minutes ({times}).",
    )
    return "\n\n".join(said)
