"""The network of a state dict that nothing is said about: as nnU-Net builds it, from names and shapes alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nnunetv2_cva.model.families import PRIMUS_V1, RESIDUAL
from nnunetv2_cva.model.naming import Layout
from nnunetv2_cva.transfer.architectures import DYNAMIC, RESENC_L


def inferred(layout: Layout, weights: Mapping[str, Tensor]) -> tuple[dict[str, Any], tuple[int, ...]]:
    """``architecture_plans`` of the network, and the view that it was built for: a cube of a Primus's tokens, () for a
    U-Net.

    What leaves no trace in a state dict is taken to be as in every plan of nnU-Net: a first stage without stride, LeakyReLU,
    instance norm where no running statistics are held.

    Raises:
        ValueError: shapes leave it open; says what.
    """
    if layout.family.kin == "Primus":
        edge = round(layout.tokens ** (1 / 3))
        if layout.family is not PRIMUS_V1:
            raise ValueError(f"and a {layout.family.name} is none that plans describe")
        if edge == 0 or edge**3 != layout.tokens:
            raise ValueError(f"and its {layout.tokens} positions are no cube, which would tell the view")
        return {"arch_class_name": "Primus"}, tuple(edge * n for n in layout.token_size)
    if not layout.stages:
        raise ValueError(f"and a {layout.family.name} is none that plans describe")
    residual = layout.family is RESIDUAL
    strides = [s.stride for s in layout.stages[1:]]
    if None in strides:
        raise ValueError("and the strides of its stages show in the upsampling of a decoder only, which it lacks")
    axes = len(layout.stages[0].kernel)
    n = len(layout.stages)
    batch_norm = any(k.endswith(".running_mean") for k in weights)
    count = "n_blocks_per_stage" if residual else "n_conv_per_stage"
    arguments: dict[str, Any] = {
        **{k: v for k, v in RESENC_L.items() if k != "n_blocks_per_stage"},
        "n_stages": n,
        "features_per_stage": [s.features for s in layout.stages],
        "conv_op": f"torch.nn.modules.conv.Conv{axes}d",
        "kernel_sizes": [list(s.kernel) for s in layout.stages],
        "strides": [[1] * axes, *(list(s) for s in strides if s is not None)],
        count: [s.blocks for s in layout.stages],
        "n_conv_per_stage_decoder": [_convolutions(weights, i) for i in range(n - 1)],
        "conv_bias": any(k.endswith(".conv.bias") or k.endswith(".all_modules.0.bias") for k in weights),
        "norm_op": f"torch.nn.modules.{'batchnorm.Batch' if batch_norm else 'instancenorm.Instance'}Norm{axes}d",
    }
    return {"arch_class_name": DYNAMIC[0] if residual else DYNAMIC[1], "arch_kwargs": arguments}, ()


def check_same(network: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """That the network that was inferred has every tensor of the file in its shape.

    Raises:
        ValueError: it has not; names the first.
    """
    for key, value in weights.items():
        if re.match(r"(encoder|decoder|eva|down_projection)\.", key) and (
            key not in network or network[key].shape != value.shape
        ):
            raise ValueError(f"and nnU-Net builds no network of these shapes that has {key}")


def _convolutions(weights: Mapping[str, Tensor], level: int) -> int:
    """Of a decoder's level."""
    pattern = re.compile(rf"decoder\.stages\.{level}\.convs\.(\d+)\.")
    return len({m.group(1) for k in weights if (m := pattern.match(k))})
