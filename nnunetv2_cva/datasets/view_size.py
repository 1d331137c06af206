"""The configuration for pretraining: a view that leaves room for two different views, and what a step with it takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunetv2_cva.config import DEFAULT, CVAConfig
from nnunetv2_cva.datasets.nnunet_plans import add_pretraining
from nnunetv2_cva.datasets.user_changes import Recipe
from nnunetv2_cva.nnunet import PRETRAINING
from nnunetv2_cva.seeding import stream
from nnunetv2_cva.sizes import by
from nnunetv2_cva.views.geometry import Feasibility, feasibility

PAPERS_BATCH = 4
ROOM_IN = 0.75  # of the cases shall have room for the drawn overlap
LOOKED_AT = 256  # cases whose shapes decide about the view
CELLS = 2  # a view keeps at least so many cells of the deepest feature map along every axis
TOKEN = (8, 8, 8)  # voxels of a Primus token
GB_PER_FEATURES = {"PlainConvUNet": 8 / 560e6, "ResidualEncoderUNet": 8 / 680e6}  # nnU-Net's rule, at 2 patches


def add_configuration(
    plans: dict[str, Any],
    configuration: str,
    shapes: Sequence[tuple[int, ...]],
    preset: dict[str, Any],
    recipe: Recipe,
    view: Sequence[int] | None,
    batch_size: int | None,
    say: Callable[[str], object],
) -> None:
    """Add the configuration for pretraining and say what it is.

    ``shapes``: of the preprocessed cases; ``preset``: the configuration for pretraining that a preset has, else empty; ``view``
    and ``batch_size``: as asked for, None to be proposed.

    Raises:
        ValueError: a view or batch size that cannot be.
    """
    base, given = plans["configurations"][configuration], preset.get("cva", {})
    config = DEFAULT.updated(given, "preset")
    step = TOKEN if recipe.is_primus else strides(base["architecture"])
    chosen, found = _chosen_view(view, preset.get("patch_size"), shapes, base["patch_size"], step, config)
    batch = _chosen_batch(batch_size, preset.get("batch_size", PAPERS_BATCH), len(shapes), config)
    add_pretraining(plans, configuration, chosen, batch, given)
    say(
        f"{configuration}: spacing {by(base['spacing'])} mm, median case {by(np.median(shapes, axis=0))} voxels, "
        f"patch {by(base['patch_size'])}."
    )
    settings = f", {given}" if given else ""
    say(f"{configuration}{PRETRAINING}: view {by(chosen)}, {batch} cases per step{settings}. {found}")
    if found.fits < ROOM_IN * found.cases:
        other, better = propose_view(shapes, chosen, step, config)
        remedy = f"`view={by(other).replace('x', ' ')}` fits into {better.fits}." if other != chosen else ""
        few = f"{found.cases - found.fits} of {found.cases} cases"
        say(f"WARNING: in {few} two views of this size overlap more than configured. {remedy}".rstrip())
    channels = len(base["normalization_schemes"])
    memory = None if recipe.is_primus else estimate_memory(base["architecture"], chosen, batch, channels, config)
    say(str(memory or "GPU memory: no estimate for this network."))


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


@dataclass(frozen=True)
class Memory:
    """GB that a step is expected to take on the GPU."""

    activations: float
    parameters: float

    def __str__(self) -> str:
        return (
            f"GPU memory: about {self.activations + self.parameters:.2g} GB. An estimate, not measured: {self.activations:.2g} "
            "GB by the rule that nnU-Net plans its patches with (voxels of all feature maps), for all views of a step, and "
            f"{self.parameters:.2g} GB of weights, gradients, momentum and teacher."
        )


def estimate_memory(
    architecture: dict[str, Any], view: Sequence[int], batch_size: int, channels: int, config: CVAConfig
) -> Memory | None:
    """For the U-Nets that nnU-Net has a rule for, else None."""
    name = architecture["network_class_name"]
    per_feature = GB_PER_FEATURES.get(name.rpartition(".")[2])
    if per_feature is None:
        return None
    kwargs, imports = architecture["arch_kwargs"], architecture["_kw_requires_import"]
    # As nnU-Net's planners do; its weights are not initialised, which would take the most time.
    network = get_network_from_plans(name, kwargs, imports, channels, channels, allow_init=False)
    views = batch_size * (2 if config.needs_second_view else 1)
    taps, width = sum(kwargs["features_per_stage"]), config.head_width
    heads = (taps + 2 * width + 2 * config.predictor_width) * width if config.needs_heads else 0
    weights = sum(p.numel() for p in network.parameters()) + heads
    copies = 4 if config.needs_heads else 3  # weights, gradients, momentum, teacher
    features = float(network.compute_conv_feature_map_size(tuple(view)))
    return Memory(per_feature * features * views / 2, 4 * copies * weights / 2**30)
