"""Trainings on cases that are made: for measurements where there is no data."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

from nnunetv2_cva.demo.flow import play
from nnunetv2_cva.demo.pipeline import Size
from nnunetv2_cva.demo.workspace import CONFIGURATION, RECORD, Workspace
from nnunetv2_cva.files import read_object
from nnunetv2_cva.seeing.verdict import verdict

NAME = "Dataset900_Made"


def made_training(folder: Path, preset: str, count: int) -> tuple[type, dict[str, Any], dict[str, Any]]:
    """A preset's recipe, plans and dataset.json, and ``count`` preprocessed cases of smooth noise below ``folder``, half as large
    again as a view; nnU-Net's folders are set."""
    from loader import write

    for name in ("raw", "preprocessed", "results"):
        (folder / name).mkdir(exist_ok=True)
        os.environ[f"nnUNet_{name}"] = str(folder / name)
    from nnunetv2_cva.trainers import nnUNetTrainerCVA, nnUNetTrainerCVA_Primus

    from nnunetv2_cva.datasets.nnunet_plans import from_preset

    plans = {**from_preset(preset), "dataset_name": NAME}
    recipe = plans["preset"]["recipe"]
    configuration = plans["configurations"]["3d_fullres"]
    cases = folder / "preprocessed" / NAME / configuration["data_identifier"]
    cases.mkdir(parents=True)
    view = configuration["patch_size"]
    write(cases, tuple(3 * n // 2 for n in view), view[0], None, count)
    dataset_json = {"channel_names": {"0": "made"}, "labels": {"background": 0}, "numTraining": count, "file_ending": ".nii.gz"}
    found = getattr(nnUNetTrainerCVA, recipe, None) or getattr(nnUNetTrainerCVA_Primus, recipe)
    return found, plans, dataset_json


class Reporting:
    """The demo's screen: every finished step is reported with its seconds, the pretraining with its epochs."""

    def __init__(self, folder: Path, report: Callable[..., None]) -> None:
        self.current = ""
        self.seconds: dict[str, float] = {}
        self._workspace, self._report = Workspace(folder.resolve()), report

    def say(self, text: str) -> None:
        pass

    @contextmanager
    def step(self, name: str, total: int, title: str, command: str = "") -> Iterator[Callable[[], None]]:
        self.current, began = name, monotonic()
        yield lambda: None
        self.seconds[name] = monotonic() - began
        self._report(**{f"{name}, s": self.seconds[name]})
        if name == "pretraining":
            self._report(epochs=epochs(self._workspace))


def epochs(workspace: Workspace) -> list[dict[str, Any]]:
    """The metrics of the pretraining's epochs."""
    return [json.loads(line) for line in (workspace.pretraining / "metrics.jsonl").read_text().splitlines()]


def compare(folder: Path, device: str, size: Size, report: Callable[..., None]) -> None:
    """The demo at another size, on another device: pretraining, and stock fine-tuning from its weights and from scratch at one
    budget. Reported: its epochs and verdict, cases per second while something trains beside it, what was compared and carried.

    Raises:
        RuntimeError: a step failed.
    """
    workspace = Workspace(folder.resolve())
    if play(folder, 0, device, True, lambda terminal, steps: Reporting(folder, report), size):
        raise RuntimeError(workspace.log.read_text(errors="replace")[-3000:])
    cases = size.pretraining[1] * workspace.plans()["configurations"][CONFIGURATION]["batch_size"]
    report(**{"cases per second, end to end, last epoch": cases / epochs(workspace)[-1]["seconds"]})
    report(verdict=str(verdict(epochs(workspace))))
    found = read_object(folder / RECORD)
    report(**{f"labels carried, Dice, {row}": mean for row, (mean, _) in found["carried"].items()})
    report(comparison=[*found["table"].splitlines(), *found["sentences"]])
