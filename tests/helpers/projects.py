"""A preprocessed nnU-Net dataset small enough to train on in seconds, and nnU-Net's own way of training on it."""

import json
import pickle
from pathlib import Path

import blosc2
import numpy as np
import torch

NAME, CONFIGURATION = "Dataset100_Tiny", "3d_fullres"
VIEW = (16, 24, 16)
FAST = {
    "epochs": 2,
    "iterations_per_epoch": 2,
    "head_width": 16,
    "predictor_width": 8,
    "roi_size": [2, 3, 2],
    "mask_block": 8,
    "workers": 0,
}


def architecture(kind="residual", features=(4, 8, 8), strides=((1, 1, 1), (2, 2, 2), (2, 2, 2))):
    """The "architecture" entry of a plans file."""
    n = len(features)
    name, blocks = ("ResidualEncoderUNet", "n_blocks_per_stage") if kind == "residual" else ("PlainConvUNet", "n_conv_per_stage")
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{name}",
        "arch_kwargs": {
            "n_stages": n,
            "features_per_stage": list(features),
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * n,
            "strides": [list(s) for s in strides],
            blocks: [1] * n,
            "n_conv_per_stage_decoder": [1] * (n - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def plans(view=VIEW, batch_size=2, kind="residual", cva=None):
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": batch_size,
        "patch_size": list(view),
        "median_image_size_in_voxels": [24.0, 30.0, 26.0],
        "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": resampling,
        "architecture": architecture(kind),
        "batch_dice": False,
        "cva": {**FAST, **(cva or {})},
    }
    return {
        "dataset_name": NAME,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [24, 30, 26],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {},
        "configurations": {CONFIGURATION: configuration, "2d": {**configuration, "patch_size": [32, 32]}},
    }


DATASET_JSON = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "a": 1}, "numTraining": 12, "file_ending": ".nii.gz"}


def make_project(folder: Path, monkeypatch, cases=12, **plan_options) -> Path:
    """A preprocessed dataset below ``folder``; sets nnU-Net's folders. Returns the folder of the cases."""
    for name in ("raw", "preprocessed", "results"):
        (folder / name).mkdir(exist_ok=True)
        monkeypatch.setenv(f"nnUNet_{name}", str(folder / name))
    dataset = folder / "preprocessed" / NAME
    data = dataset / "nnUNetPlans_3d_fullres"
    data.mkdir(parents=True, exist_ok=True)
    (dataset / "nnUNetPlans.json").write_text(json.dumps(plans(**plan_options)))
    (dataset / "dataset.json").write_text(json.dumps(DATASET_JSON))
    (dataset / "dataset_fingerprint.json").write_text("{}")
    rng = np.random.default_rng(0)
    for i in range(cases):
        shape = (1, 22 + i % 5, 30 + i % 3, 24 + i % 4)
        smooth = np.cumsum(rng.normal(size=shape), axis=1).astype(np.float32)
        smooth = (smooth - smooth.mean()) / smooth.std()
        blosc2.asarray(smooth, urlpath=str(data / f"case_{i:02d}.b2nd"), mode="w")
    return data


def add_labels(data: Path) -> None:
    """Labels, bright or not, for every case of ``make_project``, and what else nnU-Net's preprocessing writes."""
    for file in sorted(data.glob("case_??.b2nd")):
        labels = (blosc2.open(str(file), mode="r")[:] > 0.5).astype(np.int8)
        blosc2.asarray(labels, urlpath=str(file.with_name(f"{file.stem}_seg.b2nd")), mode="w")
        properties = {"class_locations": {1: np.argwhere(labels > 0)}, "spacing": [1.0, 1.0, 1.0]}
        file.with_suffix(".pkl").write_bytes(pickle.dumps(properties))


def make_trainer(recipe, configuration=CONFIGURATION, fold="all", resume=False, weights=None, device="cpu"):
    """The trainer as nnUNetv2_train makes it, without the look-up by name."""
    import os

    from nnunetv2.run.run_training import maybe_load_checkpoint

    dataset = Path(os.environ["nnUNet_preprocessed"]) / NAME
    content = json.loads((dataset / "nnUNetPlans.json").read_text())
    content["continue_training"] = resume
    dataset_json = json.loads((dataset / "dataset.json").read_text())
    trainer = recipe(content, configuration, fold, dataset_json, torch.device(device))
    maybe_load_checkpoint(trainer, resume, False, weights)
    return trainer


def train(*args, **kwargs):
    """Train as nnUNetv2_train does; returns the trainer."""
    trainer = make_trainer(*args, **kwargs)
    trainer.run_training()
    trainer.perform_actual_validation()
    return trainer
