"""``nnUNetv2_cva demo``: pretraining and what follows, from images to Dice, on synthetic data in minutes on a CPU."""

from __future__ import annotations

import argparse
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from nnunetv2_cva.demo.pipeline import Size
    from nnunetv2_cva.demo.workspace import Workspace

HELP = "Pretrain, fine-tune and compare on a small synthetic dataset: less than ten minutes on two CPU cores, no download."

LOG_LINES = 15  # of nnU-Net's output, shown when a step fails
QUIET_SECONDS = 30.0  # between progress lines where there is no terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``nnUNetv2_cva demo``."""
    parser.add_argument("--folder", default="nnunetv2_cva_demo", help="where everything is written (default: ./%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the images and of all training (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: the best there is")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that holds something else, too")


def run(args: argparse.Namespace) -> int:
    """Everything; 1 if a step failed, 130 if it was interrupted.

    Raises:
        ValueError: the device is not there, the seed is negative, or the folder belongs to somebody else.
    """
    # Before torch is imported. Threads that spin while they wait stall each other as soon as anything else runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from nnunetv2_cva.demo.pipeline import Size
    from nnunetv2_cva.demo.workspace import Workspace

    if args.seed < 0:
        raise ValueError(f"--seed: expected a number >= 0, found {args.seed}.")
    device = choose_device(args.device)
    workspace = Workspace(Path(args.folder).resolve())
    workspace.claim(args.overwrite)
    return play(workspace, Size(), args.seed, device)


def choose_device(name: str) -> str:
    """The device to use; "auto" is the best that torch finds.

    Raises:
        ValueError: there is no such device.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    found = [device for device, available in there.items() if available]
    if name == "auto":
        return found[0]
    if name not in found:
        raise ValueError(f"--device {name}: torch {torch.__version__} finds no such device here, only {', '.join(found)}.")
    return name


@dataclass
class Bar:
    """A progress bar that can be moved: redrawn in place on a terminal, a line now and then elsewhere."""

    total: int
    terminal: TextIO

    def __post_init__(self) -> None:
        self.done, self.began, self.shown = 0, time.monotonic(), 0.0
        self.moving = self.terminal.isatty()
        if self.moving:
            self.show()

    def tick(self) -> None:
        self.done += 1
        if time.monotonic() - max(self.began, self.shown) > (0.1 if self.moving else QUIET_SECONDS):
            self.show()

    def show(self) -> None:
        from tqdm import tqdm

        self.shown = time.monotonic()
        text = "      {percentage:3.0f} % |{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left]"
        line = tqdm.format_meter(self.done, self.total, self.shown - self.began, ncols=90, ascii=True, bar_format=text)
        print(line, end="\r" if self.moving else "\n", file=self.terminal, flush=True)

    def finish(self) -> float:
        """Fill the bar and go to the next line. Returns the seconds since it was made."""
        self.done = self.total
        self.show()
        print(end="\n" if self.moving else "", file=self.terminal, flush=True)
        return self.shown - self.began


@dataclass
class Stage:
    """Shows the steps on the terminal and remembers which of them is under way and what they took."""

    terminal: TextIO
    steps: int

    def __post_init__(self) -> None:
        self.current = ""
        self.seconds: dict[str, float] = {}

    def say(self, text: str) -> None:
        print(text, file=self.terminal, flush=True)

    @contextmanager
    def step(self, name: str, total: int, title: str, command: str = "") -> Iterator[Callable[[], None]]:
        """One step with its progress bar; yields what moves the bar on by one of ``total``."""
        self.current = f"step {len(self.seconds) + 1} of {self.steps} ({name})"
        self.say(f"[{len(self.seconds) + 1}/{self.steps}] {title}" + (f"\n      $ {command}" if command else ""))
        bar = Bar(total, self.terminal)
        yield bar.tick
        self.seconds[name] = bar.finish()


def play(workspace: Workspace, size: Size, seed: int, device: str) -> int:
    """All steps, in a folder that is claimed. Returns the exit code."""
    from nnunetv2_cva.demo.workspace import environment, output_to

    with output_to(workspace.log) as terminal, environment(workspace):
        stage = Stage(terminal, steps=6)
        stage.say(f"nnUNetv2_cva demo on {device}: less than ten minutes on two CPU cores. Nothing is downloaded.")
        stage.say(f"Everything is written to {workspace.folder}; what nnU-Net prints goes to demo.log there.\n")
        try:
            numbers = train_and_compare(workspace, size, seed, device, stage)
            stage.say("\n" + closing(workspace, numbers, seed, stage.seconds))
        except KeyboardInterrupt:
            workspace.record(state=f"interrupted in {stage.current}")
            stage.say(f"\nInterrupted in {stage.current}. The same command starts over; {workspace.folder} can be deleted.")
            return 130
        except Exception as e:
            workspace.record(state=f"failed in {stage.current}: {e}")
            traceback.print_exc()  # goes to the log
            lines = workspace.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
            stage.say(f"\nFailed in {stage.current}: {e}\nThe last lines of {workspace.log}:\n")
            stage.say("\n".join("  " + line for line in lines))
            return 1
        workspace.record(state="complete", seed=seed, device=device, size=asdict(size), seconds=stage.seconds, **numbers)
        return 0


def train_and_compare(workspace: Workspace, size: Size, seed: int, device: str, stage: Stage) -> dict[str, Any]:
    """The steps. Returns the test cases, Dice per run, structure and case, and the metrics of the features."""
    from nnunetv2_cva.demo import pipeline, report
    from nnunetv2_cva.demo.workspace import PRETRAINED, SCRATCH

    training, test = prepare(workspace, size, seed, stage)
    before = pretrain(workspace, size, device, stage)
    fine_tune(workspace, size, seed, device, stage)
    title = "Both segment the test cases, and nnU-Net computes Dice"
    with stage.step("prediction", 2 * len(test), title, report.predict_command()) as tick:
        for run in (SCRATCH, PRETRAINED):
            pipeline.predict(workspace, run, test, device, tick)
        dice = {run: pipeline.dice(workspace, run, test) for run in (SCRATCH, PRETRAINED)}
    after = pipeline.history(workspace)[-1]
    return {"test_cases": test, "dice": dice, "untrained": before, "pretrained": {k: after[k] for k in before}}


def prepare(workspace: Workspace, size: Size, seed: int, stage: Stage) -> tuple[list[str], list[str]]:
    """Images, plans, preprocessed data. Returns the names of the training and of the test cases."""
    from nnunetv2_cva.demo import pipeline
    from nnunetv2_cva.demo.anatomy import write_dataset
    from nnunetv2_cva.demo.workspace import DATASET, DATASET_ID

    title = f"Synthetic MRI: {size.images} images, {size.labelled} of which count as labelled; {size.test} test cases"
    with stage.step("data", size.images + size.test, title) as tick:
        training, test = write_dataset(workspace.raw / DATASET, seed, size.images, size.test, tick)
    title = "nnU-Net plans and preprocesses; the plans are then reduced to what a CPU can bear"
    with stage.step("preprocessing", 2, title, f"nnUNetv2_plan_and_preprocess -d {DATASET_ID}") as tick:
        pipeline.plan(workspace, size, seed, training[: size.labelled], training[size.labelled : 2 * size.labelled])
        tick()
        pipeline.preprocess()
    return training, test


def pretrain(workspace: Workspace, size: Size, device: str, stage: Stage) -> dict[str, float]:
    """The pretraining. Returns the metrics of the features before it."""
    from nnunetv2_cva.demo import pipeline

    epochs, iterations = size.pretraining
    title = f"Pretraining on {size.images} images without labels: {epochs} epochs of {iterations} iterations"
    command = " ".join(("nnUNetv2_train", *pipeline.pretraining_arguments(device)))
    with stage.step("pretraining", epochs + 1, title, command) as tick:
        before = pipeline.untrained_scores(workspace, device)
        tick()
        pipeline.pretrain(workspace, device, tick)
    return before


def fine_tune(workspace: Workspace, size: Size, seed: int, device: str, stage: Stage) -> None:
    """nnU-Net's stock trainer, from scratch and from the pretrained weights."""
    from nnunetv2_cva.demo import pipeline
    from nnunetv2_cva.demo.workspace import CONFIGURATION, DATASET_ID, PLANS, PRETRAINED, SCRATCH

    epochs, iterations = size.fine_tuning
    command = f"nnUNetv2_train {DATASET_ID} {CONFIGURATION} 0 -p {PLANS} -device {device}"
    how = f"stock nnUNetTrainer on {size.labelled} labelled cases, {epochs * iterations} iterations (stock: 250,000)"
    with stage.step("from scratch", epochs * iterations, f"From scratch: {how}", command) as tick:
        pipeline.fine_tune(workspace, SCRATCH, size, seed, device, tick)
    command += f" -pretrained_weights {workspace.weights}"
    with stage.step("fine-tuning", epochs * iterations, "From the pretrained weights: the same", command) as tick:
        pipeline.fine_tune(workspace, PRETRAINED, size, seed, device, tick)


def closing(workspace: Workspace, numbers: dict[str, Any], seed: int, seconds: dict[str, float]) -> str:
    """Draw the pictures; everything that is said in the end."""
    from nnunetv2_cva.demo import pictures, report

    test = numbers["test_cases"]
    pictures.write_pictures(workspace, test, numbers["dice"], seed)
    shown = {
        workspace.folder / "views.png": "two views of a case, what they share, and its bins",
        workspace.folder / "predictions.png": "test cases: image, truth, from scratch, pretrained",
        workspace.pretraining / "progress.png": "the pretraining, epoch by epoch",
    }
    listing = "\n".join(f"  {path}\n      {what}" for path, what in shown.items())
    said = report.summary(numbers, seconds), report.caveats(len(test), seed)
    return "\n\n".join((*said, f"Pictures:\n{listing}", report.by_hand(workspace)))
