"""Images that a target validates on, among those that ``plan`` is to pretrain on: warn of them, or leave them out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2_cva.commands.progress import Bar

if TYPE_CHECKING:
    from nnunetv2_cva.datasets.heldout import HeldOut
    from nnunetv2_cva.datasets.inspect import Finding
    from nnunetv2_cva.datasets.targets import FineTuned

REASON = "held out: a target validates on it"


def warn_or_leave_out(
    targets: Sequence[FineTuned], fold: int | None, compare: Callable[[FineTuned], list[HeldOut]]
) -> frozenset[str]:
    """Identities of the cases to leave out: those of validation fold ``fold``. None: warn of those of every fold instead.

    ``compare(target)``: what of each of its folds is pretrained on.

    Raises:
        ValueError: a target has no such fold, or it cannot be told which of its images are pretrained on.
    """
    from nnunetv2_cva.datasets.heldout import Unknown

    left_out: frozenset[str] = frozenset()
    for target in targets:
        try:
            folds = compare(target)
        except Unknown as e:
            if fold is not None:
                raise ValueError(f"--hold-out {fold}: {target.name} cannot be compared with the pretraining set: {e}") from None
            print(f"WARNING: could not check whether {target.name} validates on images that are pretrained on: {e}")
            continue
        if fold is None:
            print("".join(f"{found}\n" for found in folds if found.cases or found.missing), end="")
            continue
        if not 0 <= fold < len(folds):
            raise ValueError(f"--hold-out {fold}: {target.name} has the folds 0 to {len(folds) - 1}.")
        if folds[fold].missing:
            raise ValueError(f"--hold-out {fold}: {str(folds[fold]).removeprefix('WARNING: ')}")
        left_out |= folds[fold].identities
        print(f"--hold-out {fold}: {len(folds[fold].identities)} cases are left out, on which {target.name} validates.")
    return left_out


def comparing_voxels(found: Sequence[Finding], folder: Path, processes: int) -> Callable[[FineTuned], list[HeldOut]]:
    """Looks for a target's validation images among images; what it reads is remembered in ``folder``."""
    from nnunetv2_cva.datasets.heldout import by_voxels

    def compare(target: FineTuned) -> list[HeldOut]:
        with Bar(f"Looking for validation images of {target.name}") as bar:
            return by_voxels(target, found, folder, processes, bar.start, bar.tick)

    return compare
