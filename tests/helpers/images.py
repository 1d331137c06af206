"""Small images on disk, each in a subfolder or format of its own if wanted, and nnU-Net's folders for a test."""

import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk

SHAPE = (14, 18, 16)


def voxels(seed=0, shape=SHAPE, air=2):
    """Smooth-ish noise around 200 in a margin of zeros, which nnU-Net crops away. int16."""
    rng = np.random.default_rng(seed)
    image = np.zeros(shape, np.int16)
    inner = tuple(slice(air, n - air) for n in shape)
    image[inner] = rng.normal(200, 40, tuple(n - 2 * air for n in shape)).clip(1)
    return image


def write(path, image, spacing=(1.0, 1.0, 1.0)):
    """``spacing`` in the order of the array's axes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    itk = sitk.GetImageFromArray(image, isVector=False)
    itk.SetSpacing(tuple(float(s) for s in spacing[::-1]) + (1.0,) * (image.ndim - 3))
    sitk.WriteImage(itk, str(path))
    return path


def write_several(folder, n=6, spacing=(1.0, 1.0, 1.0), shape=SHAPE, ending=".nii.gz"):
    """``case_0`` ... with different voxels and slightly different shapes."""
    return [write(Path(folder) / f"case_{i}{ending}", voxels(i, (shape[0] + i % 2, *shape[1:])), spacing) for i in range(n)]


def nnunet_folders(folder, monkeypatch):
    """Raw and preprocessed folder, as nnU-Net's variables say. Planning there counts no memory, which takes seconds a network."""
    monkeypatch.setattr("nnunetv2_cva.plan.counted", lambda plans, name, trainer, config: 0.5)
    paths = [Path(folder) / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")]
    for path in paths:
        path.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv(path.name, str(path))
    return paths[0], paths[1]


def labelled_dataset(raw, preprocessed, name, plans, n=6, spacing=(1.0, 1.0, 1.0), channels=("MRI",), first=100):
    """A raw dataset with labels, and its plans and dataset.json as nnU-Net leaves them after planning."""
    for i in range(n):
        for c in range(len(channels)):
            write(raw / name / "imagesTr" / f"{name[11:]}_{i:03d}_{c:04d}.nii.gz", voxels(first + 10 * i + c), spacing)
        write(raw / name / "labelsTr" / f"{name[11:]}_{i:03d}.nii.gz", (voxels(i) > 200).astype(np.uint8), spacing)
    dataset = {
        "channel_names": {str(c): channel for c, channel in enumerate(channels)},
        "labels": {"background": 0, "a": 1},
        "numTraining": n,
        "file_ending": ".nii.gz",
    }
    (preprocessed / name).mkdir()
    (raw / name / "dataset.json").write_text(json.dumps(dataset))
    (preprocessed / name / "dataset.json").write_text(json.dumps(dataset))
    (preprocessed / name / f"{plans['plans_name']}.json").write_text(json.dumps({**plans, "dataset_name": name}))
