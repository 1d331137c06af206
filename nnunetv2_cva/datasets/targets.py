"""The datasets that will be fine-tuned: their plans, one fixed plan for several of them, and their held-out images."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunetv2_cva.datasets.inspect import Finding
from nnunetv2_cva.datasets.inventory import look_at, write_json
from nnunetv2_cva.datasets.plan import PER_DATASET, resolved
from nnunetv2_cva.datasets.sources import Candidate


@dataclass(frozen=True)
class FineTuned:
    """A dataset that will be fine-tuned. ``folder``: preprocessed."""

    name: str
    folder: Path
    dataset: dict[str, Any]
    plans: dict[str, Any]

    @property
    def channels(self) -> int:
        return len(self.dataset["channel_names"])


def dataset_name(given: str) -> str:
    """``DatasetXXX_Name`` for an id or a name.

    Raises:
        ValueError: no dataset of this id, or several.
    """
    try:
        return str(maybe_convert_to_dataset_name(given))
    except (RuntimeError, ValueError) as e:
        if "More than one" in str(e):
            raise ValueError(f"several datasets have the id {given}: give the full name.") from None
        raise ValueError(f"no dataset {given} in nnUNet_raw or nnUNet_preprocessed.") from None


def load_target(given: str, plans_name: str) -> FineTuned:
    """Raises ValueError when the dataset has no such plans."""
    name = dataset_name(given)
    folder = Path(nnUNet_preprocessed) / name
    for file in (f"{plans_name}.json", "dataset.json"):
        if not (folder / file).is_file():
            there = sorted(p.stem for p in folder.glob("*Plans*.json")) or ["none"]
            raise ValueError(
                f"--target {given}: {folder / file} not found (plans there: {', '.join(there)}). Plan it with nnU-Net first, "
                f"nnUNetv2_plan_and_preprocess -d {given} --no_pp, or name its plans with --target-plans."
            )
    dataset, plans = (json.loads((folder / file).read_text()) for file in ("dataset.json", f"{plans_name}.json"))
    return FineTuned(name, folder, dataset, plans)


def fixed_plans(fixed: dict[str, Any], configuration: str, target: FineTuned, own: str) -> dict[str, Any]:
    """The fixed plans as this target's: network, spacing, patch and batch size of ``fixed``, normalisation, intensities and
    reader of the target's configuration ``own`` (after normalisation the network sees the same kind of input).

    nnU-Net's ``nnUNetv2_move_plans_between_datasets`` keeps the source's normalisation, which ruins MR under CT's clipping.
    """
    plans = {k: copy.deepcopy(v) for k, v in fixed.items() if k != "configurations"}
    plans.update({k: target.plans[k] for k in PER_DATASET if k in target.plans}, plans_name=fixed["plans_name"])
    kept = copy.deepcopy(resolved(fixed, configuration))
    kept.pop("cva", None)
    theirs = resolved(target.plans, own)
    kept.update({k: theirs[k] for k in ("normalization_schemes", "use_mask_for_norm", "batch_dice") if k in theirs})
    kept["data_identifier"] = f"{fixed['plans_name']}_{configuration}"
    plans["configurations"] = {configuration: kept}
    return plans


def write_fixed_plans(plans: dict[str, Any], target: FineTuned) -> Path:
    """Into the target's preprocessed folder.

    Raises:
        ValueError: there are other plans of this name.
    """
    path = target.folder / f"{plans['plans_name']}.json"
    if path.is_file() and json.loads(path.read_text()) != plans:
        raise ValueError(f"{path} exists and differs from the plans to be written. Delete it, or plan under another name (-p).")
    write_json(path, plans)
    return path


def validation_images(target: FineTuned) -> list[dict[str, tuple[str, ...]]]:
    """For every fold, its validation cases with their raw files; by nnU-Net's default split where there is none yet."""
    raw = Path(nnUNet_raw) / target.name if nnUNet_raw.is_set() else None
    if raw is None or not raw.is_dir():
        return []
    files = _raw_files(raw, target)
    splits = target.folder / "splits_final.json"
    if splits.is_file():
        folds = json.loads(splits.read_text())
    elif len(files) >= 5:
        folds = generate_crossval_split([str(k) for k in np.sort(list(files))], seed=12345, n_splits=5)
    else:
        return []
    return [{str(key): files[key] for key in fold["val"] if key in files} for fold in folds]


def _raw_files(raw: Path, target: FineTuned) -> dict[str, tuple[str, ...]]:
    listed = target.dataset.get("dataset")
    if listed:
        return {k: tuple(os.path.abspath(raw / os.path.expandvars(i)) for i in v["images"]) for k, v in listed.items()}
    ending, folder = target.dataset["file_ending"], raw / "imagesTr"
    names = set(os.listdir(folder)) if folder.is_dir() else set()
    keys = sorted({n[: -len(ending) - 5] for n in names if n.endswith(f"_0000{ending}")})
    return {k: tuple(str(folder / f"{k}_{c:04d}{ending}") for c in range(target.channels)) for k in keys}


@dataclass(frozen=True)
class HeldOut:
    """Of a fold's ``total`` validation cases of a target, those whose images are pretrained on, there called ``keys``."""

    target: str
    fold: int
    total: int
    cases: tuple[str, ...]
    keys: frozenset[str]

    def __str__(self) -> str:
        return (
            f"WARNING: {len(self.cases)} of {self.total} validation cases of fold {self.fold} of {self.target} are in the "
            f"pretraining set ({', '.join(self.cases[:3])}{', ...' if len(self.cases) > 3 else ''}): that fold's score is not "
            f"one on unseen images. --hold-out {self.fold} leaves them out."
        )


def held_out(
    target: FineTuned,
    found: Sequence[Finding],
    folder: Path,
    processes: int,
    started: Callable[[int], Any],
    tick: Callable[[], Any],
) -> list[HeldOut]:
    """Per fold, the overlap of the target's validation images and the pretraining images; by their voxels, not by their names.

    ``folder``: where it is remembered what was looked at.
    """
    folds = validation_images(target)
    together = len(found[0].files) == target.channels

    def parts(files: tuple[str, ...]) -> list[tuple[str, ...]]:
        return [files] if together else [(f,) for f in files]

    groups = {part for fold in folds for files in fold.values() for part in parts(files)}
    looked = look_at([Candidate("", g, target.name, "") for g in sorted(groups)], folder, processes, started, tick)
    by_content = {f.content: f.key for f in found}
    hits = []
    for number, fold in enumerate(folds):
        cases, keys = [], set()
        for case, files in fold.items():
            contents = [looked[part].content for part in parts(files)]
            same = {by_content[c] for c in contents if c in by_content}
            if same:
                cases.append(case)
                keys |= same
        if cases:
            hits.append(HeldOut(target.name, number, len(fold), tuple(sorted(cases)), frozenset(keys)))
    return hits
