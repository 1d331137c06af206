"""Images that a target validates on, among those that are pretrained on: warn of them, or leave them out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunetv2_cva.datasets.findings import Finding, inspect_case
from nnunetv2_cva.datasets.inventory import Inventory, remembered
from nnunetv2_cva.datasets.parallel import Progress
from nnunetv2_cva.datasets.sources import Candidate
from nnunetv2_cva.datasets.targets import FineTuned
from nnunetv2_cva.files import read_json
from nnunetv2_cva.nnunet import RAW

REASON = "held out: a target validates on it"


class Unknown(ValueError):
    """Why a target's validation images cannot be compared with those that are pretrained on."""


@dataclass(frozen=True)
class HeldOut:
    """Of a fold's ``total`` validation cases of a target: ``cases`` whose images are pretrained on, under these ``identities``;
    and how many could not be compared, for their images were not found."""

    target: str
    fold: int
    total: int
    cases: tuple[str, ...]
    identities: frozenset[str]
    missing: int

    def __str__(self) -> str:
        found = (
            f"{len(self.cases)} of {self.total} validation cases of fold {self.fold} of {self.target} are in the "
            f"pretraining set ({', '.join(self.cases[:3])}{', ...' if len(self.cases) > 3 else ''}): that fold's score is not "
            f"one on unseen images. `hold_out={self.fold}` leaves them out."
        )
        unknown = (
            f"The images of {self.missing} of {self.total} validation cases of fold {self.fold} of {self.target} were not found "
            "in nnUNet_raw, so they could not be compared with the pretraining set."
        )
        return f"WARNING: {' '.join(([found] if self.cases else []) + ([unknown] if self.missing else []))}"


Compare = Callable[[FineTuned], list[HeldOut]]


def left_out(targets: Sequence[FineTuned], fold: int | None, compare: Compare, say: Callable[[str], object]) -> frozenset[str]:
    """Identities of the cases to leave out: those of validation fold ``fold``. None: warn of those of every fold instead.

    ``compare``: what of each of a target's folds is pretrained on.

    Raises:
        ValueError: a target has no such fold, or it cannot be told which of its images are pretrained on.
    """
    out: frozenset[str] = frozenset()
    for target in targets:
        try:
            folds = compare(target)
        except Unknown as e:
            if fold is not None:
                raise ValueError(f"`hold_out={fold}`: {target.name} cannot be compared with the pretraining set: {e}") from None
            say(f"WARNING: could not check whether {target.name} validates on images that are pretrained on: {e}")
            continue
        if fold is None:
            for found in folds:
                if found.cases or found.missing:
                    say(str(found))
            continue
        if not 0 <= fold < len(folds):
            raise ValueError(f"`hold_out={fold}`: {target.name} has the folds 0 to {len(folds) - 1}.")
        if folds[fold].missing:
            raise ValueError(f"`hold_out={fold}`: {str(folds[fold]).removeprefix('WARNING: ')}")
        out |= folds[fold].identities
        say(f"`hold_out={fold}`: {len(folds[fold].identities)} cases are left out, on which {target.name} validates.")
    return out


def comparing_voxels(found: Sequence[Finding], folder: Path, processes: int, progress: Progress) -> Compare:
    """Looks for a target's validation images among images; what it reads is remembered in ``folder``."""
    return lambda target: by_voxels(target, found, folder, processes, progress)


def by_voxels(target: FineTuned, found: Sequence[Finding], folder: Path, processes: int, progress: Progress) -> list[HeldOut]:
    """Per fold of the target, the images that are pretrained on, recognised by their voxels, whatever they are called.

    ``folder``: where it is remembered what was looked at.

    Raises:
        Unknown: the target's images or folds are not there.
    """
    root = os.environ.get(RAW)
    raw = Path(root) / target.name if root else None
    files = _raw_files(raw, target) if raw is not None and raw.is_dir() else {}
    if not files:
        raise Unknown(f"its images are not in nnUNet_raw ({raw or 'which is not set'}).")
    together = found[0].channels == target.channels

    def parts(case: str) -> list[tuple[str, ...]]:
        return [files[case]] if together else [(f,) for f in files[case]]

    folds = _validated(target, list(files))
    there = {case for fold in folds for case in fold if case in files and all(map(os.path.isfile, files[case]))}
    groups = {part for case in there for part in parts(case)}
    candidates = [Candidate("", g, target.name, "") for g in sorted(groups)]
    what = f"Looking for validation images of {target.name}"
    looked = remembered(inspect_case, candidates, folder, processes, progress, what)
    pretrained = {f.content for f in found}
    same = {case: {looked[part].content for part in parts(case)} & pretrained for case in there}
    return [_held_out(target, n, fold, same, [c for c in fold if c not in there]) for n, fold in enumerate(folds)]


def by_name(target: FineTuned, inventory: Inventory) -> list[HeldOut]:
    """The same for data that nnU-Net has preprocessed: cases of the target's own dataset, by their names.

    Raises:
        Unknown: no case is the target's; or it has no folds.
    """
    same = {os.path.basename(f.key): {f.identity} for f in inventory.accepted if f.dataset == target.name}
    if not same:
        raise Unknown("preprocessed cases are recognised by their names, and these are of other datasets.")
    rejected = {os.path.basename(f.key) for f in inventory.rejected if f.dataset == target.name}
    return [_held_out(target, n, fold, same, []) for n, fold in enumerate(_validated(target, [*same, *rejected]))]


def _held_out(target: FineTuned, number: int, fold: Sequence[str], same: dict[str, set[str]], missing: Sequence[str]) -> HeldOut:
    hit = sorted(case for case in fold if same.get(case))
    identities = frozenset(identity for case in hit for identity in same[case])
    return HeldOut(target.name, number, len(fold), tuple(hit), identities, len(missing))


def folds_of(target: FineTuned, cases: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    """Training and validation cases of every fold: of the target's splits, else those that nnU-Net would make of ``cases``.

    Raises:
        Unknown: no splits, and too few cases to make some.
    """
    splits = target.folder / "splits_final.json"
    if splits.is_file():
        return [(list(fold["train"]), list(fold["val"])) for fold in read_json(splits)]
    if len(cases) < 5:
        raise Unknown("it has no splits_final.json, and fewer than five cases to make nnU-Net's folds of.")
    folds = generate_crossval_split([str(k) for k in np.sort(list(cases))], seed=12345, n_splits=5)
    return [([str(case) for case in fold["train"]], [str(case) for case in fold["val"]]) for fold in folds]


def _validated(target: FineTuned, cases: Sequence[str]) -> list[list[str]]:
    return [validation for _, validation in folds_of(target, cases)]


def _raw_files(raw: Path, target: FineTuned) -> dict[str, tuple[str, ...]]:
    listed = target.dataset.get("dataset")
    if listed:
        return {k: tuple(os.path.abspath(raw / os.path.expandvars(i)) for i in v["images"]) for k, v in listed.items()}
    ending, folder = target.dataset["file_ending"], raw / "imagesTr"
    names = set(os.listdir(folder)) if folder.is_dir() else set()
    keys = sorted({n[: -len(ending) - 5] for n in names if n.endswith(f"_0000{ending}")})
    return {k: tuple(str(folder / f"{k}_{c:04d}{ending}") for c in range(target.channels)) for k in keys}
