"""One training of a comparison, from nothing but plain values to a result file that is written whole."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from nnunetv2_cva.comparing.design import Design, Job, curve_epochs, epochs_of
from nnunetv2_cva.config import FinetuneConfig
from nnunetv2_cva.files import read_object, write_json


@dataclass(frozen=True)
class Task:
    """A job and everything it needs; can be sent to another process. ``weights``: made for the target, None from scratch;
    ``digest``: of the file that they come from."""

    job: Job
    design: Design
    folder: Path
    weights: Path | None
    digest: str
    device: str

    @property
    def result(self) -> Path:
        return self.folder / "jobs" / f"{self.job.name}.json"

    @property
    def log(self) -> Path:
        return self.folder / "logs" / f"{self.job.name}.log"


@dataclass(frozen=True)
class Result:
    """``points``: [{"iteration", "dice": {case: {structure: Dice}}, "foreground": {case: Dice}}, ...]"""

    task: Task
    points: list[dict[str, Any]]
    seconds: float


def finished(task: Task) -> Result | None:
    """The result, if there is one.

    Raises:
        ValueError: of another file with weights under the same name.
    """
    if not task.result.is_file():
        return None
    found = read_object(task.result)
    if found["digest"] != task.digest:
        raise ValueError(
            f"{task.result} is of another file with weights that was also called {task.job.arm}. Rename one of them, or choose "
            "another `folder`."
        )
    return Result(task, found["points"], found["seconds"])


def perform(task: Task) -> Result:
    """Train and score; what nnU-Net prints goes to the job's log."""
    import torch

    from nnunetv2_cva.comparing.scores import segment
    from nnunetv2_cva.comparing.trainer import fixed, seed_everything, set_length

    began, design, job = time.monotonic(), task.design, task.job
    training = design.cases(job.labels, job.seed)
    points: list[dict[str, Any]] = []

    def after_epoch(trainer: Any) -> None:
        if trainer.current_epoch in curve_epochs(trainer.num_epochs, design.points):
            scores = segment(trainer, design.test)
            points.append(
                {
                    "iteration": trainer.current_epoch * trainer.num_iterations_per_epoch,
                    "dice": {case: s.structures for case, s in scores.items()},
                    "foreground": {case: s.foreground for case, s in scores.items()},
                }
            )

    with _surroundings(task):
        trainer_class = fixed(_trainer_class(design.trainer), training, design.test, job.seed, after_epoch)
        plans, dataset_json = _read(design)
        trainer: Any = trainer_class(plans, design.configuration, design.fold, dataset_json, torch.device(task.device))
        set_length(trainer, design.iterations)
        seed_everything("compared network", job.seed)
        trainer.initialize()
        if task.weights is not None:
            from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

            load_pretrained_weights(trainer.network, str(task.weights))
        seed_everything("compared training", job.seed)
        trainer.run_training()
    seconds = time.monotonic() - began
    task.result.parent.mkdir(parents=True, exist_ok=True)
    write_json(task.result, {**asdict(job), "digest": task.digest, "training": training, "seconds": seconds, "points": points})
    return Result(task, points, seconds)


@cache
def _trainer_class(name: str) -> Any:
    from nnunetv2_cva.transfer.target import trainer_class

    return trainer_class(name)


def _read(design: Design) -> tuple[dict[str, Any], dict[str, Any]]:
    """Plans and dataset.json as nnU-Net's trainers want them."""
    from nnunetv2_cva.nnunet import PREPROCESSED, folder

    place = folder(PREPROCESSED) / design.dataset
    return {**read_object(place / f"{design.plans}.json"), "continue_training": False}, read_object(place / "dataset.json")


@contextlib.contextmanager
def _surroundings(task: Task) -> Iterator[None]:
    """nnU-Net writes into the job's own folder and prints into its log; our fine-tuning trainers are told the length."""
    variable = FinetuneConfig.VARIABLE
    before = dict(os.environ)
    os.environ["nnUNet_results"] = str(task.folder / "nnunet" / task.job.name)
    if task.design.iterations is not None:
        epochs = epochs_of(task.design.iterations)
        length = {"epochs": epochs, "iterations_per_epoch": task.design.iterations // epochs}
        os.environ[variable] = json.dumps({**_given(before.get(variable)), **length})
    task.log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(task.log, "w", buffering=1, errors="replace") as log:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _given(settings: str | None) -> dict[str, Any]:
    """What the user has set for our fine-tuning trainers. Raises ValueError for what is no JSON object."""
    try:
        found = json.loads(settings or "{}")
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"environment variable {FinetuneConfig.VARIABLE}: expected a JSON object, found {settings!r}.")
    return found
