"""nnU-Net's conventions, none of which imports it: names of datasets, folders, inheritance in plans, how a network is asked for.

Nothing else in this package takes a dataset's number out of its name or follows ``inherits_from``.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

RAW, PREPROCESSED, RESULTS = "nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"
PRETRAINING = "_cva"  # how the name of a configuration for pretraining ends; it inherits from the one that is fine-tuned
TOKEN = (8, 8, 8)  # voxels of a token of the Primus that its trainers build
# With another value of these, weights or images of one configuration do not belong to the other.
NETWORK_AND_IMAGES = ("architecture", "spacing", "normalization_schemes", "use_mask_for_norm")
_DATASET = re.compile(r"Dataset(\d{3,})_([^\s/\\]+)", re.ASCII)


# ---- datasets


def is_dataset_name(text: str) -> bool:
    """Whether ``text`` is a name as nnU-Net wants it: ``Dataset``, three or more digits, ``_`` and something without a slash."""
    return _DATASET.fullmatch(text) is not None


def dataset_id(name: str) -> int:
    """4 of ``Dataset004_Hippocampus``, 1234 of ``Dataset1234_Big``.

    Raises:
        ValueError: no name of a dataset.
    """
    found = _DATASET.fullmatch(name)
    if found is None:
        raise ValueError(f"{name!r}: expected the name of a dataset, for example Dataset004_Hippocampus.")
    return int(found.group(1))


def dataset_argument(name: str) -> str:
    """What nnU-Net's commands take for this dataset: its number, or the name where nnU-Net would misread the number.

    nnU-Net looks for folders that begin with ``Dataset123``, which those of ``Dataset1234_Big`` also do.
    """
    number = dataset_id(name)
    clash = any(other != name and other.startswith(f"Dataset{number:03d}") for other in datasets())
    return name if clash else str(number)


def datasets() -> list[str]:
    """The names of all datasets in nnU-Net's folders, sorted."""
    found: set[str] = set()
    for variable in (RAW, PREPROCESSED, RESULTS):
        root = os.environ.get(variable)
        if root and os.path.isdir(root):
            found.update(e.name for e in os.scandir(root) if is_dataset_name(e.name) and e.is_dir())
    return sorted(found)


def find_dataset(given: str) -> str:
    """The name of the dataset with this number or name.

    Raises:
        ValueError: neither a number nor a name, no such dataset, or several with this number.
    """
    there = datasets()
    if is_dataset_name(given):
        found = [name for name in there if name == given]
    elif re.fullmatch(r"\d+", given, re.ASCII):
        found = [name for name in there if dataset_id(name) == int(given)]
    else:
        raise ValueError(f"Expected the number or the name of a dataset, 4 or Dataset004_Hippocampus, found {given!r}.")
    if len(found) > 1:
        raise ValueError(f"Several datasets have the number {given}: {', '.join(found)}. Give the full name.")
    if not found:
        raise ValueError(f"No dataset {given} in {RAW} or {PREPROCESSED} ({', '.join(there) or 'no datasets there'}).")
    return found[0]


def folder(variable: str) -> Path:
    """nnU-Net's folder that the environment variable names.

    Raises:
        ValueError: the variable is not set.
    """
    value = os.environ.get(variable)
    if not value:
        raise ValueError(f"The environment variable {variable} is not set. Point it to the folder that nnU-Net uses for this.")
    return Path(value)


# ---- plans

SIZES: dict[str, Any] = {"patch_size": Integral, "batch_size": Integral, "spacing": Real}  # what they consist of


def inheritance(plans: Mapping[str, Any], name: str) -> list[str]:
    """Names of configurations from the root of ``inherits_from`` to ``name``.

    Raises:
        ValueError: no such configuration, a parent that does not exist, or a circle.
    """
    configurations = plans.get("configurations")
    known = configurations if isinstance(configurations, Mapping) else {}
    chain: list[str] = []
    wanted: Any = name
    while wanted is not None:
        if not isinstance(known.get(wanted) if isinstance(wanted, str) else None, Mapping):
            by = f", from which {chain[0]} inherits" if chain else ""
            there = ", ".join(map(str, known)) or "none"
            raise ValueError(f"Plans {plans.get('plans_name')} have no configuration {wanted!r}{by}. Found: {there}.")
        if wanted in chain:
            circle = " <- ".join([wanted, *chain[: chain.index(wanted) + 1]])
            raise ValueError(f"Plans {plans.get('plans_name')}: configurations inherit in a circle ({circle}).")
        chain.insert(0, wanted)
        wanted = known[wanted].get("inherits_from")
    return chain


def configuration(plans: Mapping[str, Any], name: str, resampled: bool = True) -> dict[str, Any]:
    """A configuration with all it inherits, without ``inherits_from``: a copy. Values are replaced whole, as nnU-Net does.
    ``resampled``: a spacing of null, which is nnssl's word for images at their own spacing, is none.

    Raises:
        ValueError: as ``inheritance``; or sizes that are none, or a folder elsewhere.
    """
    merged: dict[str, Any] = {}
    for ancestor in inheritance(plans, name):
        merged.update(plans["configurations"][ancestor])
    merged.pop("inherits_from", None)
    for key, kinds in SIZES.items():
        if key not in merged or (key == "spacing" and merged[key] is None and not resampled):
            continue
        value = merged[key]
        numbers = [value] if key == "batch_size" else value if isinstance(value, (list, tuple)) else []
        if not (numbers and all(isinstance(n, kinds) and not isinstance(n, bool) and 0 < n < 2**31 for n in numbers)):
            expected = "a positive whole number" if key == "batch_size" else "a list of positive numbers"
            raise ValueError(f"Plans {plans.get('plans_name')}, {name}: expected {expected} as {key}, found {value!r:.60}.")
    where = merged.get("data_identifier", "")
    if not isinstance(where, str) or re.search(r"[/\\]", where) or where in (".", ".."):
        raise ValueError(
            f"Plans {plans.get('plans_name')}, {name}: expected a folder's name as data_identifier, found {where!r:.60}."
        )
    return copy.deepcopy(merged)


def fine_tuned(plans: Mapping[str, Any], name: str) -> str:
    """The configuration that is fine-tuned after a pretraining in ``name``: the nearest one it inherits from that is not for
    pretraining itself, as far as network, spacing and normalisation stay the same; else ``name``.

    Raises:
        ValueError: as ``inheritance``.
    """
    *ancestors, found = inheritance(plans, name)
    mine = configuration(plans, name)
    for ancestor in reversed(ancestors):
        theirs = configuration(plans, ancestor)
        for_pretraining = found == name or found.endswith(PRETRAINING) or "cva" in plans["configurations"][found]
        if not for_pretraining or any(theirs.get(k) != mine.get(k) for k in NETWORK_AND_IMAGES):
            break
        found = ancestor
    return found


# ---- networks


def build_network(trainer: type, plans: Any, configuration: Any, channels: int, outputs: int, deep_supervision: bool) -> Any:
    """The network of one of nnU-Net's trainers, asked for as nnU-Net does. ``plans``, ``configuration``: its managers.

    Like nnU-Net this tells the signature from before nnU-Net 2.8, which is still accepted, by the name of the first parameter.

    Raises:
        ValueError: the trainer has neither signature.
    """
    builder: Any = trainer.build_network_architecture  # type: ignore[attr-defined]
    signature = inspect.signature(builder)
    if "plans_manager" in signature.parameters:
        first: tuple[Any, ...] = (plans, configuration)
    else:
        first = (configuration.network_arch_class_name, configuration.network_arch_init_kwargs)
        first += (configuration.network_arch_init_kwargs_req_import,)
    arguments = (*first, channels, outputs, deep_supervision)
    try:
        signature.bind(*arguments)
    except TypeError:
        raise ValueError(
            f"{trainer.__name__}.build_network_architecture: expected the parameters plans_manager, configuration_manager, "
            "num_input_channels, num_output_channels, enable_deep_supervision, the first by this name, which nnU-Net looks for; "
            f"found {', '.join(signature.parameters)}."
        ) from None
    return builder(*arguments)
