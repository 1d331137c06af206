"""A view that leaves room for two different views, and what a step with it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.seeding import stream
from nnunetv2_cva.views.geometry import Feasibility, feasibility

ENOUGH = 0.75  # of the cases shall have room for the drawn overlap
LOOKED_AT = 256  # cases whose shapes decide about the view
CELLS = 2  # a view keeps at least so many cells of the deepest feature map along every axis
TOKEN = (8, 8, 8)  # voxels of a Primus token
SMALL_VIEW = 48  # below, blocks of 16 voxels are too few to hide 75 % of them
GB_PER_FEATURES = {"PlainConvUNet": 8 / 560e6, "ResidualEncoderUNet": 8 / 680e6}  # nnU-Net's rule, at 2 patches


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
        if found.fits >= ENOUGH * found.cases or not possible.any():
            return tuple(int(n) for n in view), found
        axis = int(np.argmax(np.where(possible, view / median, -1)))
        view[axis] = smaller[axis]


def method_block(view: Sequence[int]) -> dict[str, Any]:
    """The ``"cva"`` settings that a view of this size asks for; empty: the recipe's."""
    return {"mask_block": 8} if min(view) < SMALL_VIEW else {}


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
