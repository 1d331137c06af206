"""The network of a file in plans for a target, beside the target's own: written from what lies in the file."""

from __future__ import annotations

import copy
import re
import shlex
from typing import Any

from nnunetv2_cva import nnunet
from nnunetv2_cva.files import read_object, write_json
from nnunetv2_cva.model.naming import Layout
from nnunetv2_cva.transfer.architectures import importable, in_plans
from nnunetv2_cva.transfer.card import entry, settings
from nnunetv2_cva.transfer.read import Source
from nnunetv2_cva.transfer.target import Target

CONFIGURATION = "3d_fullres"  # of plans for a file that names none of nnU-Net's
_PATCH = ("patch_size", "batch_size")
_NETWORK_AND_GRID = ("architecture", *_PATCH, "spacing")
_RESAMPLING = re.compile(r"resampling_fn_\w+")


def same_plans(source: Source, there: Layout, target: Target) -> str | None:
    """How the target, whose network has the layout ``there``, gets the network that the weights were made with, where that is
    another U-Net; None where nothing can be said.

    The target's own plans, and what was preprocessed with them, are never overwritten.
    """
    name, plans = str(target.plans["dataset_name"]), entry(source.card, "plans").get("plans_name")
    differences = source.layout.differences(there)
    differ = source.layout.stages and any("stage" in d or d.startswith("architecture") for d in differences)
    try:
        configuration, _ = _network_of(source)
    except ValueError:
        return None
    if not differ:
        return None
    origin = entry(source.card, "dataset").get("name")
    given = re.sub(r"[^A-Za-z0-9]+", "_", f"{plans or 'Plans'}From{origin or source.path.stem}")
    dataset, own = nnunet.dataset_argument(name), f"-c {target.configuration} -p {target.plans['plans_name']}"
    return (
        f"The plans differ. To give {name} the network of the file, in plans beside its own: nnUNetv2_cva export "
        f"{shlex.quote(str(source.path))} --format plans -d {dataset} {own} -o {given} && nnUNetv2_preprocess -d {dataset} "
        f"-plans_name {given} -c {configuration}; then use -p {given} -c {configuration}"
    )


def write_plans(source: Source, target: Target, name: str, dry_run: bool = False) -> tuple[str, list[str]]:
    """Write plans ``name`` for the target's dataset: network, spacing, patch and batch size of the file; what follows from the
    target's images (normalisation, intensities, reader) as in the target's own configuration, so that the network sees the same
    kind of input. Returns the configuration's name, and what was written as lines.

    Raises:
        ValueError: the file does not describe a U-Net; the target has other plans of this name; not a name for plans.
    """
    if not re.fullmatch(r"[A-Za-z0-9_]+", name):
        raise ValueError(f"{name!r}: expected a name for the new plans, of letters, digits and _, as nnUNetPlansOther.")
    configuration, theirs = _network_of(source)
    mine = {k: v for k, v in target.settings.items() if k not in ("cva", "previous_stage", "next_stage")}
    mine.update({k: copy.deepcopy(v) for k, v in theirs.items() if v is not None})
    mine["data_identifier"] = f"{name}_{configuration}"
    plans = {**copy.deepcopy(target.plans), "plans_name": name, "configurations": {configuration: mine}}
    file = nnunet.folder(nnunet.PREPROCESSED) / str(target.plans["dataset_name"]) / f"{name}.json"
    if file.is_file() and read_object(file) != plans:
        raise ValueError(f"{file} exists and differs from the plans to be written. Delete it, or choose another name.")
    if not dry_run:
        write_json(file, plans)
    shown = (*_PATCH, "spacing", "normalization_schemes")
    return configuration, [f"{key:24} {mine.get(key)}" for key in shown]


def _network_of(source: Source) -> tuple[str, dict[str, Any]]:
    """The configuration that is fine-tuned, and of it what belongs to the network and its grid.

    Raises:
        ValueError: the file does not state a U-Net.
    """
    card = source.card
    plans, trained = entry(card, "plans"), card.get("configuration")
    found = settings(plans, trained)
    primus = source.layout.family.kin == "Primus"
    if "architecture" in found and not primus:
        name = nnunet.fine_tuned(plans, str(trained))
        found = settings(plans, name)
        importable(found["architecture"])
        return name, {k: v for k, v in found.items() if k in _NETWORK_AND_GRID or _RESAMPLING.fullmatch(k)}
    architecture = in_plans(source.architecture, source.weights)
    if architecture is None:
        raise ValueError(f"{source.path} ({source.kind}) does not state a U-Net or a Primus V1 that plans describe.")
    spacing = card.get("spacing")  # null: not resampled, for which nnU-Net has no plans
    return CONFIGURATION, {"architecture": architecture, "patch_size": card.get("view_size"), "spacing": spacing}
