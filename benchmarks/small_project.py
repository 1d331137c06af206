"""The project that the CPU scripts share: MSD Task04 (hippocampus) as nnU-Net preprocesses it, made-up bodies, small networks.

nnU-Net plans and preprocesses; a configuration "small" is a plain-conv U-Net that CPUs can bear, and every script adds its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunetv2_cva.files import write_json

NAME, MADE_UP, PLANS = "Dataset004_Hippocampus", "Dataset901_MadeUp", "nnUNetPlans"
CASES = f"{PLANS}_3d_fullres"  # nnU-Net's folder of preprocessed cases
VIEW, FEATURES = [24, 32, 24], [8, 16, 32, 64]


def prepare(raw: Path, folder: Path) -> None:
    """Plan and preprocess with nnU-Net; add a configuration that CPUs can bear."""
    os.environ.update(nnUNet_raw=str(raw), nnUNet_preprocessed=str(folder / "pre"), nnUNet_results=str(folder / "res"))
    (folder / "pre").mkdir(parents=True, exist_ok=True)
    plans_file = folder / "pre" / NAME / f"{PLANS}.json"
    if not plans_file.exists():
        run = "from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import plan_and_preprocess_entry as r; r()"
        subprocess.run([sys.executable, "-c", run, "-d", "4", "-c", "3d_fullres", "-np", "2", "-npfp", "2"], check=True)
    plans = json.loads(plans_file.read_text())
    architecture = json.loads(json.dumps(plans["configurations"]["3d_fullres"]["architecture"]))
    architecture["arch_kwargs"]["features_per_stage"] = FEATURES
    plans["configurations"]["small"] = {
        "inherits_from": "3d_fullres",
        "patch_size": VIEW,
        "batch_size": 2,
        "architecture": architecture,
        "cva": {"head_width": 256, "predictor_width": 64},
    }
    write_json(plans_file, plans)
    os.environ["nnUNet_n_proc_DA"] = "0"  # one process; with NumPy's and torch's seeds a stock training is repeatable


def made_up(preprocessed: Path, cases: int = 60) -> Path:
    """A second dataset: the demo's anatomy (body, liver, kidneys, vessel, lesion) as nnU-Net would preprocess it, without
    resampling; its plans are the hippocampus's."""
    import numpy as np
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    from nnunetv2_cva.demo.anatomy import LABELS, make_case

    dataset = preprocessed / MADE_UP
    (dataset / CASES).mkdir(parents=True, exist_ok=True)
    plans = json.loads((preprocessed / NAME / f"{PLANS}.json").read_text())
    write_json(dataset / f"{PLANS}.json", {**plans, "dataset_name": MADE_UP})
    about = {"channel_names": {"0": "made up"}, "labels": LABELS, "numTraining": cases, "file_ending": ".nii.gz"}
    write_json(dataset / "dataset.json", about)
    for number in range(cases):
        name = dataset / CASES / f"case_{number:03d}"
        if not name.with_suffix(".pkl").exists():
            image, truth = make_case(0, number)
            image = (image.astype(np.float32) - image.mean()) / image.std()
            places = DefaultPreprocessor._sample_foreground_locations(truth[None], [*range(1, len(LABELS))])
            nnUNetDatasetBlosc2.save_case(image[None], truth[None].astype(np.int8), {"class_locations": places}, str(name))
    return dataset


def resenc(widths: Sequence[int]) -> dict[str, Any]:
    """The plans' ``architecture`` of a residual U-Net with one block per stage, as wide as ``widths``."""
    n = len(widths)
    arguments = {
        **{"n_stages": n, "features_per_stage": [*widths], "conv_op": "torch.nn.modules.conv.Conv3d"},
        **{"kernel_sizes": [[3] * 3] * n, "strides": [[1] * 3] + [[2] * 3] * (n - 1)},
        **{"n_blocks_per_stage": [1] * n, "n_conv_per_stage_decoder": [1] * (n - 1), "conv_bias": True},
        **{"norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d", "norm_op_kwargs": {"eps": 1e-5, "affine": True}},
        **{"dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True}},
    }
    return {
        "network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
        "arch_kwargs": arguments,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def configure(dataset: Path, name: str, changes: dict[str, Any], of: str = "small") -> None:
    """Add the configuration ``name``, which is ``of`` but for ``changes``, to the plans of a preprocessed dataset."""
    file = dataset / f"{PLANS}.json"
    plans = json.loads(file.read_text())
    plans["configurations"][name] = {"inherits_from": of, **changes}
    write_json(file, plans)


def shuffled(dataset: Path) -> list[str]:
    """The preprocessed cases in an order that is always the same."""
    import numpy as np

    names = sorted(p.name[:-5] for p in (dataset / CASES).glob("*.b2nd") if not p.name.endswith("_seg.b2nd"))
    return np.random.default_rng(0).permutation(names).tolist()


def hold_out(dataset: Path, count: int) -> list[str]:
    """Make fold 0 train on all but ``count`` cases, which are returned."""
    order = shuffled(dataset)
    write_json(dataset / "splits_final.json", [{"train": order[count:], "val": order[:count]}])
    return order[:count]


def recipe(name: str) -> Any:
    """A trainer of this package, by the name that ``-tr`` takes."""
    from nnunetv2_cva.trainers import nnUNetTrainerCVA, nnUNetTrainerCVA_objectives, nnUNetTrainerCVA_Primus

    modules = (nnUNetTrainerCVA, nnUNetTrainerCVA_objectives, nnUNetTrainerCVA_Primus)
    return next(getattr(m, name) for m in modules if hasattr(m, name))


def make_trainer(trainer_class: Any, configuration: str, settings: dict[str, Any] | None = None, fold: int = 0) -> Any:
    """nnU-Net's or one of this package, which is told ``settings``, on the CPU."""
    import torch

    if settings is not None:
        os.environ["nnUNet_cva"] = json.dumps(settings)
    dataset = Path(os.environ["nnUNet_preprocessed"]) / NAME
    plans = {**json.loads((dataset / f"{PLANS}.json").read_text()), "continue_training": False}
    dataset_json = json.loads((dataset / "dataset.json").read_text())
    return trainer_class(plans, configuration, fold, dataset_json, torch.device("cpu"))
