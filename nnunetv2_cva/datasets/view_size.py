"""The configuration for pretraining: a view that leaves room for two different views, and what a step with it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.datasets.memory_plan import CARDS, CONTEXT, MODES, WORKSPACES, CardChoice, Counting, StepMemory, best, budget
from nnunetv2_cva.datasets.nnunet_plans import add_pretraining
from nnunetv2_cva.datasets.user_changes import Recipe
from nnunetv2_cva.nnunet import PRETRAINING, TOKEN
from nnunetv2_cva.seeding import stream
from nnunetv2_cva.sizes import by
from nnunetv2_cva.views.geometry import Feasibility, feasibility

PAPERS_BATCH = 4
ROOM_IN = 0.75  # of the cases shall have room for the drawn overlap
LOOKED_AT = 256  # cases whose shapes decide about the view
CELLS = 2  # a view keeps at least so many cells of the deepest feature map along every axis


@dataclass(frozen=True)
class Asked:
    """What a user asked for; None to be chosen. ``gpu_memory``: GB of the card."""

    view: Sequence[int] | None = None
    batch_size: int | None = None
    gpu_memory: float | None = None


def add_configuration(
    plans: dict[str, Any],
    configuration: str,
    shapes: Sequence[tuple[int, ...]],
    preset: dict[str, Any] | None,
    recipe: Recipe,
    config: CVAConfig,
    asked: Asked,
    measure: StepMemory,
    say: Callable[[str], object],
) -> None:
    """Add the configuration for pretraining and say what it is.

    ``config``: the recipe's own settings; ``shapes``: of the preprocessed cases;
    ``preset``: the configuration for pretraining that a preset has, None without one.

    Raises:
        ValueError: a view or batch size that cannot be.
    """
    base, given = plans["configurations"][configuration], preset or {}
    block = dict(given.get("cva", {}))
    of_recipe, config = config, config.updated(block, "preset")
    step = TOKEN if recipe.is_primus else strides(base["architecture"])
    chosen, found = _chosen_view(asked.view, given.get("patch_size"), shapes, base["patch_size"], step, config)
    batch = _chosen_batch(asked.batch_size, given.get("batch_size", PAPERS_BATCH), len(shapes), config)
    counting = Counting(plans, configuration, recipe, of_recipe, block, measure)
    planner = None if preset is not None else plans.get("experiment_planner_used")
    fixed_view = bool(asked.view or (given.get("patch_size") and asked.gpu_memory is None))
    views = [chosen] if fixed_view else smaller(chosen, step, np.median(shapes, axis=0))
    fixed_cases = asked.batch_size is not None
    choice, lines = _onto_card(counting, chosen, batch, views, fixed_cases, budget(asked.gpu_memory, planner))
    if choice.checkpointing != counting.usual:
        block["gradient_checkpointing"] = choice.checkpointing
    if choice.view != chosen:
        found = room(shapes, choice.view, config)
    add_pretraining(plans, configuration, choice.view, choice.cases, block)
    say(
        f"{configuration}: spacing {by(base['spacing'])} mm, median case {by(np.median(shapes, axis=0))} voxels, "
        f"patch {by(base['patch_size'])}."
    )
    settings = f", {block}" if block else ""
    say(f"{configuration}{PRETRAINING}: view {by(choice.view)}, {choice.cases} cases per step{settings}. {found}")
    if found.fits < ROOM_IN * found.cases:
        other, better = propose_view(shapes, choice.view, step, config)
        remedy = f"`view={by(other).replace('x', ' ')}` fits into {better.fits}." if other != choice.view else ""
        few = f"{found.cases - found.fits} of {found.cases} cases"
        say(f"WARNING: in {few} two views of this size overlap more than configured. {remedy}".rstrip())
    if choice.cases == 1:
        say("WARNING: one case per step is too few: losses that compare cases have nothing to compare.")
    for line in lines:
        say(line)


def _onto_card(
    counting: Counting,
    view: tuple[int, ...],
    cases: int,
    views: Sequence[tuple[int, ...]],
    fixed_cases: bool,
    card: tuple[float, str] | None,
) -> tuple[CardChoice, list[str]]:
    """What fits onto the card, of these views, and what is said about memory; without a card the first view as it is."""
    usual = counting.usual
    start = counting.counted(view, cases, usual)
    calculate = counting.calculated(start)
    modes = [m for m in MODES if m is usual or MODES.index(m) > MODES.index(usual)]
    chosen, lines = start, []
    if card is not None and start.gb > card[0]:
        found = best(card[0], start, calculate, views, fixed_cases, modes)
        if found is None:
            lines.append(f"WARNING: nothing that fits onto {card[0]:.3g} GB ({card[1]}) was found; this is what a step takes:")
        else:
            chosen = counting.counted(found.view, found.cases, found.checkpointing)
    of = f", of {card[0]:.3g} GB ({card[1]})" if card is not None else ""
    lines.append(
        f"GPU memory: about {chosen.gb:.2g} GB{of}. Tensors of a step of this network counted, in bf16, without a GPU; for what "
        f"a card needs beside them {WORKSPACES - 1:.0%} and {CONTEXT:g} GB are added."
    )
    others = {gb: best(gb, start, calculate, views, fixed_cases, modes) for gb in CARDS}
    for gb, choice in others.items():
        lines.append(f"  on {gb} GB: {chosen if choice == chosen else choice or 'nothing of these fits'}")
    return chosen, lines


def smaller(view: tuple[int, ...], step: Sequence[int], median: np.ndarray) -> list[tuple[int, ...]]:
    """This view and those that are made of it, by ``step`` where it fills the median case most, down to the smallest."""
    views, now = [view], np.array(view)
    while (possible := now - step >= np.multiply(CELLS, step)).any():
        axis = int(np.argmax(np.where(possible, now / median, -1)))
        now[axis] -= step[axis]
        views.append(tuple(int(n) for n in now))
    return views


def _chosen_view(
    asked: Sequence[int] | None,
    preset: Sequence[int] | None,
    shapes: Sequence[tuple[int, ...]],
    largest: Sequence[int],
    step: tuple[int, ...],
    config: CVAConfig,
) -> tuple[tuple[int, ...], Feasibility]:
    """The view that was asked for, is the preset's or is proposed, and how much room the cases leave for two of them."""
    if asked and any(n < s or n % s for n, s in zip(asked, step)):
        raise ValueError(f"`view={by(asked)}`: expected multiples of {by(step)}, the network's strides.")
    given = asked or preset
    if not given:
        return propose_view(shapes, largest, step, config)
    return tuple(given), room(shapes, given, config)


def _chosen_batch(asked: int | None, usual: int, cases: int, config: CVAConfig) -> int:
    """Cases per step, which are different cases; some are kept back for the watched pairs, as in a training on fold all."""
    trained_on = cases - min(config.watched_cases, cases // 10)
    if asked is None:
        return min(usual, trained_on)
    if not 1 <= asked <= trained_on:
        raise ValueError(f"`batch_size={asked}`: expected 1 to {trained_on}, the number of cases to train on.")
    return asked


def strides(architecture: dict[str, Any]) -> tuple[int, ...]:
    """Voxels per cell of the deepest feature map, per axis."""
    return tuple(int(n) for n in np.prod(architecture["arch_kwargs"]["strides"], axis=0))


def room(shapes: Sequence[Sequence[int]], view: Sequence[int], config: CVAConfig) -> Feasibility:
    """For how many of the cases (of many: of a sample) two views of this size differ as configured."""
    rng = stream("feasibility", config.seed)
    if len(shapes) > LOOKED_AT:
        shapes = [shapes[i] for i in rng.choice(len(shapes), LOOKED_AT, replace=False)]
    return feasibility(shapes, view, config, rng)


def propose_view(
    shapes: Sequence[Sequence[int]], largest: Sequence[int], step: Sequence[int], config: CVAConfig
) -> tuple[tuple[int, ...], Feasibility]:
    """The largest view, no larger than ``largest``, for which enough cases have room; made smaller where it fills the median
    case most, by ``step`` voxels (the network's strides) at a time. Ends with the smallest one where no view is small enough.
    """
    view, median = np.array(largest), np.median(shapes, axis=0)
    while True:
        found = room(shapes, [int(n) for n in view], config)
        smaller = view - step
        possible = smaller >= np.multiply(CELLS, step)
        if found.fits >= ROOM_IN * found.cases or not possible.any():
            return tuple(int(n) for n in view), found
        axis = int(np.argmax(np.where(possible, view / median, -1)))
        view[axis] = smaller[axis]
