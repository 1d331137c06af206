"""Plans for a pretraining dataset: nnU-Net's own, with a configuration for pretraining that inherits from them."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nnunetv2
import numpy as np
import SimpleITK as sitk
from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from nnunetv2_cva.datasets.findings import Finding
from nnunetv2_cva.datasets.reading import ending_for, ending_of, read_images, readers
from nnunetv2_cva.files import read_object, write_json
from nnunetv2_cva.nnunet import PRETRAINING
from nnunetv2_cva.nnunet import configuration as configuration_of

DEFAULT_PLANNER = "nnUNetPlannerResEncL"
PER_DATASET = (
    "dataset_name",
    "plans_name",
    "image_reader_writer",
    "foreground_intensity_properties_per_channel",
    "original_median_spacing_after_transp",
    "original_median_shape_after_transp",
)


def presets() -> dict[str, Path]:
    """The shipped presets by name."""
    spec = importlib.util.find_spec("nnunetv2_cva.plans")
    if spec is None or spec.origin is None:
        raise ValueError("nnunetv2_cva.plans not found: this copy of the source is not installed. Run `pip install -e .` in it.")
    return {path.stem: path for path in sorted(Path(spec.origin).parent.glob("*.json"))}


def from_preset(name: str) -> dict[str, Any]:
    """A preset's plans, for one channel; ``"preset"`` in them says what it is (nothing in a plans file of nnU-Net).

    Raises:
        ValueError: no such preset.
    """
    shipped = presets()
    path = shipped.get(name) or Path(name)
    if name not in shipped and not (path.suffix == ".json" and path.is_file()):
        raise ValueError(f"`preset={name}`: expected one of {', '.join(shipped)}, or a plans file (.json).")
    return {"preset": {}, **read_object(path)}


def planner_class(name: str) -> Any:
    """nnU-Net's planner of this name. Raises ValueError when there is none."""
    place = os.path.join(nnunetv2.__path__[0], "experiment_planning")
    found = recursive_find_python_class(place, name, current_module="nnunetv2.experiment_planning")
    if found is None:
        raise ValueError(f"`planner={name}`: nnU-Net has no such planner. Expected {DEFAULT_PLANNER}, ExperimentPlanner, ...")
    return found


def from_fingerprint(
    name: str, dataset: dict[str, Any], fingerprint: dict[str, Any], example: Finding, planner: str
) -> dict[str, Any]:
    """What nnU-Net's planner makes of the images. It reads and writes in a temporary folder of its own.

    Raises:
        ValueError: unknown planner, or images that are not volumes for it.
    """
    kind = planner_class(planner)
    with tempfile.TemporaryDirectory() as folder, _nnunet_folders(Path(folder)) as (raw, preprocessed):
        image = example.files[0]
        if ending_of(image) is None:  # DICOM, which nnU-Net does not read
            image = os.path.join(folder, "example.nii.gz")
            sitk.WriteImage(sitk.GetImageFromArray(read_images(example.files).images[0]), image)
        one_case = {example.key: {"images": [image], "label": image}}
        (raw / name).mkdir(parents=True)
        (preprocessed / name).mkdir(parents=True)
        write_json(raw / name / "dataset.json", {**dataset, "file_ending": ending_of(image), "dataset": one_case})
        write_json(preprocessed / name / "dataset_fingerprint.json", fingerprint)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            plans = kind(name).plan_experiment()
    recursive_fix_for_json_export(plans)
    plans = json.loads(json.dumps(plans))
    if "3d_fullres" not in plans["configurations"]:
        raise ValueError("nnU-Net plans no 3D configuration for these images: their median has a single slice.")
    return plans


@contextlib.contextmanager
def _nnunet_folders(folder: Path) -> Iterator[tuple[Path, Path]]:
    """nnU-Net's raw and preprocessed folder, for the time of planning, in ``folder``."""
    paths = {"nnUNet_raw": folder / "raw", "nnUNet_preprocessed": folder / "preprocessed"}
    # Planners give torch nnUNet_n_proc_DA threads; 0, for loading in the training's own process, is none.
    meanwhile = {**{k: str(v) for k, v in paths.items()}, "nnUNet_n_proc_DA": "1"}
    before = {k: os.environ.get(k) for k in meanwhile}
    os.environ.update(meanwhile)
    try:
        yield paths["nnUNet_raw"], paths["nnUNet_preprocessed"]
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def schemes_of(channels: Sequence[str]) -> list[str]:
    """The normalisation that nnU-Net gives channels of these names."""
    return [get_normalization_scheme(c).__name__ for c in channels]


def normalised_as(plans: dict[str, Any], channels: Sequence[str]) -> dict[str, Any]:
    """The plans with the normalisation that nnU-Net gives channels of these names."""
    plans = copy.deepcopy(plans)
    for configuration in plans["configurations"].values():
        if "normalization_schemes" in configuration:
            configuration["normalization_schemes"] = schemes_of(channels)
            configuration["use_mask_for_norm"] = [False] * len(channels)
    return plans


def volume_configuration(plans: dict[str, Any], name: str) -> dict[str, Any]:
    """One configuration with all it inherits: a copy.

    Raises:
        ValueError: there is none of this name, or not 3D.
    """
    found = configuration_of(plans, name)
    if len(found["patch_size"]) != 3:
        raise ValueError(f"Configuration {name} of {plans['plans_name']} is 2D. Pretraining needs a 3D configuration.")
    return found


def for_images(
    base: dict[str, Any],
    configuration: str,
    name: str,
    plans_name: str,
    channels: int,
    found: Sequence[Finding],
    intensities: dict[str, Any] | None,
) -> dict[str, Any]:
    """``base`` as the plans of the pretraining dataset: network, spacing and normalisation stay, ``configuration`` alone is kept.

    ``intensities``: of these images, None to keep those of ``base`` (a target's: its normalisation is to be repeated).
    """
    plans = {k: copy.deepcopy(v) for k, v in base.items() if k not in ("configurations", "preset")}
    kept = volume_configuration(base, configuration)
    kept.pop("cva", None)
    for key in ("normalization_schemes", "use_mask_for_norm"):
        if len(kept[key]) != channels:
            kept[key] = [kept[key][0]] * channels
    kept["data_identifier"] = f"{plans_name}_{configuration}_images_only"
    plans["configurations"] = {configuration: kept}
    order = plans["transpose_forward"]
    plans.update(dataset_name=name, plans_name=plans_name)
    if found:
        plans["image_reader_writer"] = readers(ending_for(found[0].files[0]))[0].__name__
        plans["original_median_spacing_after_transp"] = np.median([f.spacing for f in found], 0)[order].tolist()
        plans["original_median_shape_after_transp"] = np.median([f.cropped for f in found], 0)[order].round().astype(int).tolist()
    if intensities is not None:
        plans["foreground_intensity_properties_per_channel"] = intensities
    elif channels != len(plans["foreground_intensity_properties_per_channel"] or range(channels)):
        first = plans["foreground_intensity_properties_per_channel"]["0"]
        plans["foreground_intensity_properties_per_channel"] = {str(c): first for c in range(channels)}
    return plans


def add_pretraining(
    plans: dict[str, Any], configuration: str, view: Sequence[int], batch_size: int, block: dict[str, Any]
) -> str:
    """Add the configuration for pretraining; returns its name."""
    name = configuration + PRETRAINING
    plans["configurations"][name] = {
        "inherits_from": configuration,
        "patch_size": [int(n) for n in view],
        "batch_size": batch_size,
        "cva": block,
    }
    return name
