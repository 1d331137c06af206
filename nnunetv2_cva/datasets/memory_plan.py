"""Which view, cases per step and recomputation fit onto a card."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.datasets.user_changes import Recipe
from nnunetv2_cva.nnunet import PRETRAINING
from nnunetv2_cva.sizes import by

Checkpointing = bool | Literal["selective"]
# GB of tensors at the peak of a step: of plans, with the configuration for pretraining of this name, nnU-Net's trainer, and the
# settings of the recipe.
StepMemory = Callable[[dict[str, Any], str, str, CVAConfig], float]

CARDS = (12, 24, 40, 80)  # GB
OF_PLANNERS = {"nnUNetPlannerResEncM": 8, "nnUNetPlannerResEncL": 24, "nnUNetPlannerResEncXL": 40, "ExperimentPlanner": 8}
# What a card needs beside the tensors: a share, and GB. On an H200 torch reserved 1.01 times (ResEnc-L 128^3) and 1.19 times
# (Primus-M 160^3) what is counted: benchmarks/speed.md.
WORKSPACES, CONTEXT = 1.2, 1.0
MODES: tuple[Checkpointing, ...] = (False, "selective", True)
SAID = {False: "nothing recomputed", "selective": "part recomputed", True: "all recomputed"}


@dataclass(frozen=True)
class CardChoice:
    """``gb``: on the card, tensors and what it needs beside them; choices of one step are equal, however they were found."""

    view: tuple[int, ...]
    cases: int
    checkpointing: Checkpointing
    gb: float = field(compare=False)

    def __str__(self) -> str:
        return f"view {by(self.view)}, {self.cases} cases per step, {SAID[self.checkpointing]}, about {self.gb:.2g} GB"


@dataclass(frozen=True)
class Counting:
    """A network's steps: what they take, counted for the plans and calculated from these counts for other views and cases.

    ``config``: the recipe's own; ``block``: what the plans change of it.
    """

    plans: dict[str, Any]
    configuration: str
    recipe: Recipe
    config: CVAConfig
    block: dict[str, Any]
    measure: StepMemory

    @property
    def usual(self) -> Checkpointing:
        """What the settings or the recipe have."""
        found: Checkpointing = self.block.get("gradient_checkpointing", self.config.gradient_checkpointing)
        return found

    def counted(self, view: Sequence[int], cases: int, checkpointing: Checkpointing) -> CardChoice:
        """Of the very step; of two cases where it has one."""
        plans = copy.deepcopy(self.plans)
        name = self.configuration + PRETRAINING
        block = {**self.block, "gradient_checkpointing": checkpointing}
        found = {
            "inherits_from": self.configuration,
            "patch_size": [int(n) for n in view],
            "batch_size": max(2, cases),
            "cva": block,
        }
        plans["configurations"][name] = found
        plans["configurations"] = {c: plans["configurations"][c] for c in (self.configuration, name)}
        tensors = self.measure(plans, name, self.recipe.trainer, self.config)
        return CardChoice(tuple(view), cases, checkpointing, tensors * WORKSPACES + CONTEXT)

    def calculated(self, start: CardChoice) -> Callable[[Sequence[int], int, Checkpointing], CardChoice]:
        """For any view and number of cases: what grows with their voxels and what does not, from two counts and one for every
        further mode."""
        other = start.cases // 2 if start.cases >= 4 else start.cases + 2  # of one case there is nothing to contrast
        voxels, second = float(np.prod(start.view)), self.counted(start.view, other, start.checkpointing)
        each = max(0.0, (start.gb - second.gb) / (start.cases - other)) / voxels
        fixed = start.gb - each * start.cases * voxels
        rates = {start.checkpointing: each}

        def choice(view: Sequence[int], cases: int, checkpointing: Checkpointing) -> CardChoice:
            if checkpointing not in rates:
                rates[checkpointing] = (self.counted(start.view, start.cases, checkpointing).gb - fixed) / start.cases / voxels
            return CardChoice(tuple(view), cases, checkpointing, fixed + rates[checkpointing] * cases * float(np.prod(view)))

        return choice


def budget(asked: float | None, planner: str | None) -> tuple[float, str] | None:
    """GB of the card to plan for, and which it is: as asked, the one that is here, the one that nnU-Net's planner plans for."""
    import torch

    if asked is not None:
        if not asked > 0:
            raise ValueError(f"`gpu_memory={asked:g}`: expected a positive number of GB.")
        return asked, "as asked"
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / 2**30, torch.cuda.get_device_name(0)
    return (OF_PLANNERS[planner], f"what {planner} plans for") if planner in OF_PLANNERS else None


def best(
    gb: float,
    start: CardChoice,
    calculate: Callable[[Sequence[int], int, Checkpointing], CardChoice],
    views: Sequence[tuple[int, ...]],
    fixed_cases: bool,
    modes: Sequence[Checkpointing],
) -> CardChoice | None:
    """The first choice that fits: the largest view and the paper's cases with as little recomputed as possible, then smaller
    views to half of the voxels, then fewer cases, then the smallest views."""
    for view, cases in _in_order(start, views, fixed_cases):
        for mode in modes:
            found = calculate(view, cases, mode)
            if found.gb <= gb:
                return found
    return None


def _in_order(start: CardChoice, views: Sequence[tuple[int, ...]], fixed_cases: bool) -> Iterator[tuple[tuple[int, ...], int]]:
    fewer = [] if fixed_cases or start.cases < 4 else [max(2, start.cases // 2)]
    half = np.prod(start.view) / 2
    for cases in (start.cases, *fewer):
        yield from ((view, cases) for view in views if np.prod(view) >= half)
    for cases in (*fewer, start.cases)[:1]:
        yield from ((view, cases) for view in views if np.prod(view) < half)
