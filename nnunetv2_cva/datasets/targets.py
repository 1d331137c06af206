"""The datasets that will be fine-tuned: their plans, and one fixed plan for several of them."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunetv2_cva.datasets.inventory import write_json
from nnunetv2_cva.datasets.plan import PER_DATASET, resolved


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


def check_fixed_plans(plans: dict[str, Any], target: FineTuned) -> None:
    """Raise ValueError where the target has other plans of this name: they may be in use."""
    path = target.folder / f"{plans['plans_name']}.json"
    if path.is_file() and json.loads(path.read_text()) != plans:
        raise ValueError(f"{path} exists and differs from the plans to be written. Delete it, or plan under another name (-p).")


def write_fixed_plans(plans: dict[str, Any], target: FineTuned) -> Path:
    """Into the target's preprocessed folder; returns the file."""
    path = target.folder / f"{plans['plans_name']}.json"
    write_json(path, plans)
    return path
