"""Images into nnU-Net's preprocessed layout, by nnU-Net's preprocessor, without segmentations.

Every case is a file of its own that appears when it is whole, so a run can be killed, repeated and split over machines. What all
cases share is written when the last of them is there.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import blosc2
import numpy as np
import SimpleITK as sitk
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_cva.datasets.describe import splits
from nnunetv2_cva.datasets.inspect import Finding
from nnunetv2_cva.datasets.inventory import read_accepted, read_rejected, write_json, write_rejected
from nnunetv2_cva.datasets.parallel import for_each
from nnunetv2_cva.datasets.reading import Unusable, read_images
from nnunetv2_cva.views.index import Entry, write_index

SETTINGS = "settings.json"
FAILED = ".failed"  # <case>.failed holds why a case could not be preprocessed
PREFIX = "preprocessing: "
# What decides about the voxels; a folder holds cases of one such setting only.
DECISIVE = ("spacing", "normalization_schemes", "use_mask_for_norm", "resampling_fn_data", "resampling_fn_data_kwargs",
            "preprocessor_name")  # fmt: skip
TYPICAL_RATIO = 0.8  # compressed / raw; measured on MR and CT: 0.3 to 0.9, the more the less background

Storage = Literal["float32", "float16"]


@dataclass(frozen=True)
class Target:
    """Where the cases go and how they are made. ``folder``: of the configuration's data."""

    dataset: Path
    plans: dict[str, Any]
    configuration: str
    storage: Storage = "float32"

    @property
    def manager(self) -> ConfigurationManager:
        return PlansManager(self.plans).get_configuration(self.configuration)

    @property
    def folder(self) -> Path:
        return self.dataset / self.manager.data_identifier


@dataclass(frozen=True)
class Job:
    """One case to preprocess."""

    key: str
    files: tuple[str, ...]
    target: Target


def shape_after(case: Finding, plans: dict[str, Any], spacing: Sequence[float]) -> tuple[int, ...]:
    """Voxels of a case after cropping, transposing and resampling, as nnU-Net computes them."""
    order = plans["transpose_forward"]
    shape = compute_new_shape([case.cropped[a] for a in order], [case.spacing[a] for a in order], spacing)
    return tuple(int(n) for n in shape)


def missing(target: Target, cases: Sequence[Finding]) -> list[Finding]:
    """The cases that are not there yet."""
    return [c for c in cases if not (target.folder / f"{c.key}.b2nd").is_file()]


def needed_bytes(target: Target, cases: Sequence[Finding]) -> int:
    """About how much the cases will take on disk."""
    spacing, size = target.manager.spacing, np.dtype(target.storage).itemsize
    voxels = sum(int(np.prod(shape_after(c, target.plans, spacing))) * len(c.files) for c in cases)
    return int(voxels * size * TYPICAL_RATIO)


def prepare(target: Target, cases: Sequence[Finding]) -> None:
    """Check and make the folder. ``cases``: of all parts, since these share the disk.

    Raises:
        ValueError: the folder holds cases made with other settings, or the disk is too small.
    """
    target.folder.mkdir(parents=True, exist_ok=True)
    path, now = target.folder / SETTINGS, _settings(target)
    if path.is_file():
        before = json.loads(path.read_text())
        changed = [k for k in now if before.get(k) != now[k]]
        if changed:
            listing = "; ".join(f"{k}: {before.get(k)}, now {now[k]}" for k in changed)
            raise ValueError(
                f"{target.folder} holds cases made with other settings ({listing}). Delete "
                "the folder to preprocess again, or plan under another name (plan -p NAME)."
            )
    todo = missing(target, cases)
    need, free = needed_bytes(target, todo), shutil.disk_usage(target.folder).free
    if need > free:
        raise ValueError(
            f"{len(todo)} cases need about {need / 2**30:.1f} GB in {target.folder}, {free / 2**30:.1f} GB are free there. "
            "Make room, point nnUNet_preprocessed to a larger disk, or store half the bytes with --storage float16."
        )
    write_json(path, now)


def preprocess(target: Target, todo: Sequence[Finding], processes: int, tick: Callable[[], Any]) -> None:
    """Preprocess these cases; ``tick()`` after each. A case that fails is noted and the rest goes on."""
    for_each(preprocess_case, [Job(c.key, c.files, target) for c in todo], processes, lambda _: tick())


def preprocess_case(job: Job) -> None:
    """One case, by nnU-Net's preprocessor. Never raises for a bad file."""
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    final, failed = job.target.folder / f"{job.key}.b2nd", job.target.folder / f"{job.key}{FAILED}"
    try:
        images, properties = read_images(job.files)
        manager = _without_mask_resampling(job.target)
        preprocessor = manager.preprocessor_class(verbose=False)
        data, _, properties = preprocessor.run_case_npy(images, None, properties, PlansManager(job.target.plans), manager, {})
        data = _stored(data, job.target.storage)
    except Unusable as e:
        failed.write_text(str(e), encoding="utf-8")
        return
    except MemoryError:
        failed.write_text("does not fit into memory; run again with fewer processes (-np)", encoding="utf-8")
        return
    _write(data, properties, final, tuple(manager.patch_size))
    failed.unlink(missing_ok=True)


def finish(target: Target) -> tuple[int, int] | None:
    """When every case is there or has failed: write the index, the splits, ``rejected.csv``; returns (cases, failed).

    None while cases are missing: other parts are still running.
    """
    cases = read_accepted(target.dataset)
    there = {name[: -len(".b2nd")] for name in os.listdir(target.folder) if name.endswith(".b2nd")}
    failed = {c.key: target.folder / f"{c.key}{FAILED}" for c in cases if c.key not in there}
    if not all(path.is_file() for path in failed.values()):
        return None
    done = [c for c in cases if c.key in there]
    spacing = target.manager.spacing
    write_index(
        target.folder,
        (Entry(c.key, (len(c.files), *shape_after(c, target.plans, spacing)), c.dataset) for c in done),
    )
    update_splits(target.dataset, [(c.key, c.subject) for c in done])
    _note_failures(target.dataset, {c.key: c for c in cases}, failed)
    for leftover in target.folder.glob("*.partial"):
        leftover.unlink(missing_ok=True)
    return len(done), len(failed)


def update_splits(dataset: Path, found: Sequence[tuple[str, str]]) -> None:
    """Write ``splits_final.json`` unless the one there has the same cases: then it may be the user's own."""
    path = dataset / "splits_final.json"
    if path.is_file():
        there = {key for fold in json.loads(path.read_text()) for side in fold.values() for key in side}
        if there == {key for key, _ in found}:
            return
    write_json(path, splits(found))


def _note_failures(dataset: Path, cases: dict[str, Finding], failed: dict[str, Path]) -> None:
    earlier = [row for row in read_rejected(dataset) if not row[1].startswith(PREFIX)]
    new = [(key, PREFIX + path.read_text(encoding="utf-8"), ";".join(cases[key].files)) for key, path in failed.items()]
    write_rejected(dataset, earlier + new)


def _settings(target: Target) -> dict[str, Any]:
    configuration = target.manager.configuration
    return {
        **{k: configuration[k] for k in DECISIVE},
        "transpose_forward": target.plans["transpose_forward"],
        "foreground_intensity_properties_per_channel": target.plans["foreground_intensity_properties_per_channel"]
        if "CTNormalization" in configuration["normalization_schemes"]
        else None,
        "storage": target.storage,
    }


def _without_mask_resampling(target: Target) -> ConfigurationManager:
    """nnU-Net makes a mask of what is not zero, normalises with it and then resamples it, for nobody: leave that out."""
    return _configuration(json.dumps(target.plans), target.configuration)


@lru_cache(maxsize=1)
def _configuration(plans: str, name: str) -> ConfigurationManager:
    content = json.loads(plans)
    configuration = dict(PlansManager(content).get_configuration(name).configuration)
    configuration.update(resampling_fn_seg="no_resampling_hack", resampling_fn_seg_kwargs={})
    return ConfigurationManager(configuration)


def _stored(data: np.ndarray, storage: Storage) -> np.ndarray:
    if storage == "float16":
        data = np.clip(data, -65504, 65504)
    data = np.ascontiguousarray(data, dtype=storage)
    if not np.isfinite(data).all():
        raise Unusable("NaN or Inf after normalisation and resampling")
    return data


def _write(data: np.ndarray, properties: dict[str, Any], final: Path, view: tuple[int, ...]) -> None:
    """nnU-Net's blosc2 file, in blocks that suit the view, and its ``.pkl``; named so only when whole, ``.b2nd`` last."""
    blosc2.set_nthreads(1)
    blocks, chunks = comp_blosc2_params(data.shape, view, data.itemsize)
    codec, level = blosc2.Codec.LZ4HC, 5  # nnU-Net's
    chosen = nnUNetDatasetBlosc2._select_filter(data, blocks, chunks, codec, level)
    partial = final.with_name(f"{final.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    cparams = {"codec": codec, "clevel": level, "filters": [chosen], "nthreads": 1}
    blosc2.asarray(data, urlpath=str(partial), chunks=chunks, blocks=blocks, cparams=cparams)
    notes = final.with_name(f"{final.stem}.pkl.{os.getpid()}.partial")
    notes.write_bytes(pickle.dumps(properties))
    os.replace(notes, final.with_suffix(".pkl"))
    os.replace(partial, final)
