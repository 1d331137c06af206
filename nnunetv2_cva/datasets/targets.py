"""The datasets that will be fine-tuned: their plans, and one fixed plan for several of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_cva.datasets.nnunet_plans import PER_DATASET, volume_configuration
from nnunetv2_cva.files import read_object, write_json
from nnunetv2_cva.nnunet import PREPROCESSED, find_dataset
from nnunetv2_cva.nnunet import folder as nnunet_folder


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


def load_target(given: str, plans_name: str) -> FineTuned:
    """Raises ValueError when the dataset has no such plans."""
    name = find_dataset(given)
    folder = nnunet_folder(PREPROCESSED) / name
    for file in (f"{plans_name}.json", "dataset.json"):
        if not (folder / file).is_file():
            there = sorted(p.stem for p in folder.glob("*Plans*.json")) or ["none"]
            raise ValueError(
                f"`target={given}`: {folder / file} not found (plans there: {', '.join(there)}). Plan it with nnU-Net first, "
                "or name its plans with `target_plans`."
            )
    dataset, plans = (read_object(folder / file) for file in ("dataset.json", f"{plans_name}.json"))
    return FineTuned(name, folder, dataset, plans)


def fixed_plans(fixed: dict[str, Any], configuration: str, target: FineTuned, own: str) -> dict[str, Any]:
    """The fixed plans as this target's: network, spacing, patch and batch size of ``fixed``, normalisation, intensities and
    reader of the target's configuration ``own`` (after normalisation the network sees the same kind of input).

    nnU-Net's ``nnUNetv2_move_plans_between_datasets`` keeps the source's normalisation, which ruins MR under CT's clipping.
    """
    plans = {k: copy.deepcopy(v) for k, v in fixed.items() if k != "configurations"}
    plans.update({k: target.plans[k] for k in PER_DATASET if k in target.plans}, plans_name=fixed["plans_name"])
    kept = volume_configuration(fixed, configuration)
    kept.pop("cva", None)
    theirs = volume_configuration(target.plans, own)
    kept.update({k: theirs[k] for k in ("normalization_schemes", "use_mask_for_norm", "batch_dice") if k in theirs})
    kept["data_identifier"] = f"{fixed['plans_name']}_{configuration}"
    plans["configurations"] = {configuration: kept}
    return plans


def check_fixed_plans(plans: dict[str, Any], target: FineTuned) -> None:
    """Raise ValueError where the target has other plans of this name: they may be in use. Configurations that a user has added to
    them are no difference."""
    path = target.folder / f"{plans['plans_name']}.json"
    if path.is_file() and read_object(path) != _with_added(plans, path):
        raise ValueError(
            f"{path} exists and differs from the plans to be written. Delete it, or plan under another name (`plans`)."
        )


def write_fixed_plans(plans: dict[str, Any], target: FineTuned) -> Path:
    """Into the target's preprocessed folder; returns the file."""
    path = target.folder / f"{plans['plans_name']}.json"
    write_json(path, _with_added(plans, path))
    return path


def _with_added(plans: dict[str, Any], path: Path) -> dict[str, Any]:
    there = read_object(path).get("configurations") if path.is_file() else None
    added = {k: v for k, v in there.items() if k not in plans["configurations"]} if isinstance(there, dict) else {}
    return {**plans, "configurations": {**plans["configurations"], **added}}
