"""What ``plan`` and ``preprocess`` have written into files that the user may change, so that such changes are recognised.

``cva_written.json``: ``"splits"``, a hash of the ``splits_final.json`` that was written; ``"plans"``, by the name of a plans
file, the ``"cva"`` block of every configuration that was planned, for which recipe and trainer of nnU-Net's, and for which
targets.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_cva.datasets.fingerprint import splits
from nnunetv2_cva.files import read_json, read_object, write_json

WRITTEN, SPLITS = "cva_written.json", "splits_final.json"
GONE = object()


@dataclass(frozen=True)
class Recipe:
    """``name``: the trainer that pretrains; ``trainer``: the one of nnU-Net's that fine-tunes the same network."""

    name: str = "nnUNetTrainerCVA"
    trainer: str = "nnUNetTrainer"

    @property
    def is_primus(self) -> bool:
        """Whether weights have shapes that depend on the dataset, and views are cut into tokens."""
        return "Primus" in self.trainer


def recipe_of(folder: Path, plans_name: str) -> Recipe:
    """What plans were made for; the default recipe where nothing is noted."""
    noted = _notes(folder)["plans"].get(plans_name, {})
    return Recipe(**{k: noted[k] for k in ("name", "trainer") if k in noted})


def save_plans(plans: dict[str, Any], folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Write the plans file. As in nnU-Net, configurations that are not planned now survive, and so does what the user has changed
    in a ``"cva"`` block, which is returned: None for a setting that was removed.
    """
    name = plans["plans_name"]
    path, notes = folder / f"{name}.json", _notes(folder)
    before = read_object(path)["configurations"] if path.is_file() else {}
    planned = {c: v["cva"] for c, v in plans["configurations"].items() if "cva" in v}
    earlier = notes["plans"].get(name, {}).get("cva", {})
    configurations, kept = {**before, **plans["configurations"]}, {}
    for c, block in planned.items():
        own = _changes(before.get(c, {}).get("cva", {}), earlier.get(c, {}))
        merged = {k: v for k, v in {**block, **own}.items() if v is not GONE}
        configurations[c] = {**configurations[c], "cva": merged}
        kept.update({k: merged.get(k) for k, v in own.items() if v != block.get(k, GONE)})
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {**plans, "configurations": configurations})
    of_these = {"name": recipe.name, "trainer": recipe.trainer, "cva": {**earlier, **planned}}
    notes["plans"][name] = {**notes["plans"].get(name, {}), **of_these}
    write_json(folder / WRITTEN, notes)
    return kept


def save_targets(folder: Path, plans_name: str, targets: Mapping[str, str], keep: bool) -> None:
    """Note the datasets that these plans are for, with the names of their own plans; ``keep``: beside those noted before."""
    notes = _notes(folder)
    of_these = notes["plans"].setdefault(plans_name, {})
    of_these["targets"] = {**(of_these.get("targets", {}) if keep else {}), **targets}
    write_json(folder / WRITTEN, notes)


def targets_of(folder: Path, plans_name: str) -> list[tuple[str, str]]:
    """(dataset, its plans) of every target that was named when these plans were made, or later."""
    found: dict[str, str] = _notes(folder)["plans"].get(plans_name, {}).get("targets", {})
    return list(found.items())


def _changes(found: dict[str, Any], noted: dict[str, Any]) -> dict[str, Any]:
    """What the user has made of the block that was written: values, or GONE."""
    return {k: found.get(k, GONE) for k in {**noted, **found} if found.get(k, GONE) != noted.get(k, GONE)}


def save_splits(folder: Path, found: Sequence[tuple[str, str]]) -> Path | None:
    """Write ``splits_final.json`` for these (case, subject), unless the one there has the same cases: it may be the user's own.

    Returns where the one there has been moved to, if it has other cases and was not written by us.
    """
    path, notes, moved = folder / SPLITS, _notes(folder), None
    if path.is_file():
        if {key for fold in read_json(path) for side in fold.values() for key in side} == {key for key, _ in found}:
            return None
        if notes["splits"] != _hash(path.read_bytes()):
            moved = next(p for n in range(1, 10**6) if not (p := folder / f"{SPLITS}.bak{n if n > 1 else ''}").exists())
            os.replace(path, moved)
    folds = splits(found)
    if not folds:
        path.unlink(missing_ok=True)
        return moved
    write_json(path, folds)
    write_json(folder / WRITTEN, {**notes, "splits": _hash(path.read_bytes())})
    return moved


def replaced(splits_kept: Path) -> str:
    """What to say when ``save_splits`` has moved the user's own."""
    return f"WARNING: splits_final.json had other cases than there are now. New ones were written; yours: {splits_kept}."


def _notes(folder: Path) -> dict[str, Any]:
    path = folder / WRITTEN
    return {"splits": "", "plans": {}, **(read_object(path) if path.is_file() else {})}


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
