"""Trainings on cases that are made: for measurements where there is no data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

NAME = "Dataset900_Made"


def made_training(folder: Path, preset: str, count: int) -> tuple[type, dict[str, Any], dict[str, Any]]:
    """A preset's recipe, plans and dataset.json, and ``count`` preprocessed cases of smooth noise below ``folder``, half as large
    again as a view; nnU-Net's folders are set."""
    from loader import write

    for name in ("raw", "preprocessed", "results"):
        (folder / name).mkdir(exist_ok=True)
        os.environ[f"nnUNet_{name}"] = str(folder / name)
    from nnunetv2_cva.trainers import nnUNetTrainerCVA, nnUNetTrainerCVA_Primus

    from nnunetv2_cva.datasets.plan import from_preset

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


def compare(device: str, end: float, report: Any) -> None:
    raise NotImplementedError
