"""The configuration for pretraining: which view, how many cases per step, and what that takes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nnunetv2_cva.commands.following import by

if TYPE_CHECKING:
    from nnunetv2_cva.config import CVAConfig
    from nnunetv2_cva.datasets.written import Recipe

PAPERS_BATCH = 4


def add_configuration(
    args: argparse.Namespace,
    plans: dict[str, Any],
    shapes: Sequence[tuple[int, ...]],
    preset: dict[str, Any] | None,
    recipe: Recipe,
) -> None:
    """Add the configuration for pretraining and say what it is. ``shapes``: of the preprocessed cases.

    Raises:
        ValueError: a view or batch size that cannot be.
    """
    import numpy as np

    from nnunetv2_cva.config import CVAConfig
    from nnunetv2_cva.datasets import plan, proposal
    from nnunetv2_cva.nnunet import PRETRAINING

    base = plans["configurations"][args.configuration]
    given = preset["configurations"].get(args.configuration + PRETRAINING, {}) if preset else {}
    config = CVAConfig().updated(given.get("cva", {}), "preset")
    step = proposal.TOKEN if recipe.is_primus else proposal.strides(base["architecture"])
    view, found = _view(args.view, given.get("patch_size"), shapes, base["patch_size"], step, config)
    block = {**proposal.method_block(view), **given.get("cva", {})}
    batch = _batch(args.batch_size, given.get("batch_size", PAPERS_BATCH), len(shapes), config)
    name = plan.add_pretraining(plans, args.configuration, view, batch, block)
    print(
        f"{args.configuration}: spacing {by(base['spacing'])} mm, median case {by(np.median(shapes, axis=0))} voxels, "
        f"patch {by(base['patch_size'])}.\n{name}: view {by(view)}, {batch} cases per step"
        f"{f', {block}' if block else ''}. {found}"
    )
    if found.fits < proposal.ENOUGH * found.cases:
        other, better = proposal.propose_view(shapes, view, step, config)
        remedy = f"--view {by(other).replace('x', ' ')} fits into {better.fits}." if other != tuple(view) else ""
        few = f"{found.cases - found.fits} of {found.cases} cases"
        print(f"WARNING: in {few} two views of this size overlap more than configured. {remedy}")
    channels = len(base["normalization_schemes"])
    memory = None if recipe.is_primus else proposal.estimate_memory(base["architecture"], view, batch, channels, config)
    print(memory or "GPU memory: no estimate for this network.")


def _view(
    asked: Any, preset: Any, shapes: Sequence[tuple[int, ...]], largest: Any, step: tuple[int, ...], config: CVAConfig
) -> tuple[tuple[int, ...], Any]:
    """The view that was asked for, is the preset's or is proposed, and how much room the cases leave for two of them."""
    from nnunetv2_cva.datasets import proposal

    if asked and any(n < s or n % s for n, s in zip(asked, step)):
        raise ValueError(f"--view {by(asked)}: expected multiples of {by(step)}, the network's strides.")
    given = asked or preset
    if not given:
        return proposal.propose_view(shapes, largest, step, config)
    return tuple(given), proposal.room(shapes, given, config)


def _batch(asked: int | None, usual: int, cases: int, config: CVAConfig) -> int:
    """Cases per step, which are different cases; some are kept back for the watched pairs, as in a training on fold all."""
    trained_on = cases - min(config.watched_cases, cases // 10)
    if asked is None:
        return min(usual, trained_on)
    if not 1 <= asked <= trained_on:
        raise ValueError(f"--batch-size {asked}: expected 1 to {trained_on}, the number of cases to train on.")
    return asked
