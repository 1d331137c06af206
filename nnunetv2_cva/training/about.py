"""What a file of weights is, and what to type next where it is a pretraining's."""

from __future__ import annotations

from dataclasses import dataclass

from nnunetv2_cva.training.messages import of_plan
from nnunetv2_cva.transfer.describe import Description, describe

PRETRAINING = "pretraining checkpoint"


@dataclass(frozen=True)
class About:
    """``next``: the lines that ``plan`` printed for every target, with this file."""

    description: Description
    next: tuple[str, ...]


def about(file: str, trust: bool = False) -> About:
    """Facts and next steps.

    Raises:
        ValueError: as ``describe``.
    """
    found = describe(file, trust)
    if not str(found.everything["kind"]).startswith(PRETRAINING):
        return About(found, ())
    configuration, builder = found.everything["card"].get("configuration"), found.everything["builder"]
    return About(found, tuple(of_plan(found.plans, str(configuration), builder, file)))
