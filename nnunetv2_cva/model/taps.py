"""Feature maps of nnU-Net's networks, and where their cells are.

A stride-2 convolution with kernel 3 and padding 1 puts cell n at input voxel 2n + 0.5 and not at 2 (n + 0.5). The offset adds up
over the stages; alignment needs it as soon as the two views are oriented differently. It is derived here from the operations
that made the map. A residual block adds two paths of different offset (average pooling: none; strided convolution: half an input
cell); the sum of both is taken to lie in their middle, which random networks confirm (tests) and which bounds the error for any
weighting of the two paths by a quarter of the block's input cell.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.patch_encode_decode import (
    PatchEmbed,
    PatchEmbed_deeper,
    PatchEmbedDeeperControlled,
)
from dynamic_network_architectures.building_blocks.residual import BasicBlockD, BottleneckD, StackedResidualBlocks
from dynamic_network_architectures.building_blocks.simple_conv_blocks import ConvDropoutNormReLU, StackedConvBlocks
from torch import nn

from nnunetv2_cva.sizes import by


@dataclass(frozen=True)
class Tap:
    """A feature map taken from the backbone. The centre of cell n along an axis is at input coordinate
    ``stride * (n + 0.5) + offset``, in voxels of the view."""

    channels: int
    stride: tuple[int, int, int]
    offset: tuple[float, float, float]


IMAGE = Tap(0, (1, 1, 1), (0.0, 0.0, 0.0))  # every voxel is where it is
_POOLS = (nn.AvgPool3d, nn.MaxPool3d)
_POINTWISE = (
    nn.Identity,
    nn.Dropout3d,
    nn.InstanceNorm3d,
    nn.BatchNorm3d,
    nn.GroupNorm,
    nn.LeakyReLU,
    nn.ReLU,
    nn.GELU,
    nn.SiLU,
    nn.PReLU,
    nn.ELU,
)


def unet_taps(encoder: nn.Module) -> tuple[Tap, ...]:
    """The taps of a plain-conv or residual encoder of dynamic_network_architectures: every stage.

    Raises:
        ValueError: the encoder holds something whose cells cannot be located; names it.
    """
    stages: Any = getattr(encoder, "stages", None)
    channels_per_stage: Any = getattr(encoder, "output_channels", None)
    if stages is None or channels_per_stage is None:
        raise ValueError(
            f"{type(encoder).__name__} has no taps: expected an encoder with `stages` and `output_channels`, as the "
            "PlainConvUNet and ResidualEncoderUNet of dynamic_network_architectures have."
        )
    place = IMAGE
    if getattr(encoder, "stem", None) is not None:
        place = behind(encoder.stem, place)
    taps = []
    for stage, channels in zip(stages, channels_per_stage, strict=True):
        place = behind(stage, place)
        taps.append(replace(place, channels=channels))
    return tuple(taps)


def token_tap(tokenizer: nn.Module, channels: int) -> Tap:
    """The tap of a Primus: its tokens, which stay where the tokenizer has put them.

    Tokenizers with ``add_skips`` also add projections of their early stages, whose weights start at 1e-5; those do not count.

    Raises:
        ValueError: a tokenizer whose cells cannot be located; names what it holds.
    """
    return replace(behind(tokenizer), channels=channels)


def check_divisible(size: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Raise ValueError, with the nearest valid sizes, unless a view of this size is divisible by the strides."""
    if any(n % s for n, s in zip(size, strides)):
        nearest = [sorted({max(s, n // s * s), -(-n // s) * s}) for n, s in zip(size, strides)]
        raise ValueError(
            f"View {by(size)} (patch_size of the plans) is not divisible by the network's strides {by(strides)}. Nearest "
            f"valid sizes per axis: {', '.join(' or '.join(map(str, choice)) for choice in nearest)}."
        )


def check_visible(size: tuple[int, ...], block: tuple[int, ...], ratio: float, what: str) -> None:
    """Raise ValueError when hiding ``ratio`` of the blocks of a view, called ``what``, hides all of them."""
    count = math.prod(-(-n // b) for n, b in zip(size, block, strict=True))
    if round(ratio * count) == count:
        raise ValueError(
            f"View {by(size)} (patch_size of the plans) has {count} {what} of {by(block)} voxels, and mask_ratio {ratio} hides "
            "all of them. Use a larger view, a smaller mask_block (U-Nets) or a lower mask_ratio."
        )


def behind(module: Any, place: Tap = IMAGE) -> Tap:
    """Where the cells of ``module``'s output are, when those of its input are at ``place``; its channels are still to be stated.

    Raises:
        ValueError: a module whose cells cannot be located; names it.
    """
    if isinstance(module, (nn.Conv3d, *_POOLS)):
        return _window(module, place)
    if isinstance(module, ConvDropoutNormReLU):
        return behind(module.conv, place)
    if isinstance(module, StackedConvBlocks):
        return _chain(module.convs, place)
    if isinstance(module, StackedResidualBlocks):
        return _chain(module.blocks, place)
    if isinstance(module, (BasicBlockD, BottleneckD)):
        convs = [module.conv1, module.conv2] + ([module.conv3] if isinstance(module, BottleneckD) else [])
        main = _chain(convs, place)
        skip = behind(module.skip, place) if isinstance(module.skip, nn.Module) else place
        assert main.stride == skip.stride
        i, j, k = ((a + b) / 2 for a, b in zip(main.offset, skip.offset))
        return replace(main, offset=(i, j, k))
    if isinstance(module, PatchEmbed):
        return behind(module.proj, place)
    if isinstance(module, (PatchEmbed_deeper, PatchEmbedDeeperControlled)):
        return _chain([module.stem, *module.stages, module.final_proj], place)
    if isinstance(module, nn.Sequential):
        return _chain(module, place)
    if isinstance(module, _POINTWISE):
        return place
    raise ValueError(f"Cannot tell where the cells of a {type(module).__name__} are: no tap behind it.")


def _chain(modules: Iterable[nn.Module], place: Tap) -> Tap:
    for module in modules:
        place = behind(module, place)
    return place


def _window(op: Any, place: Tap) -> Tap:
    """A sliding window: output cell n reads input cells s n - p ... s n - p + k - 1."""
    kernel, stride, padding, dilation = (_triple(v) for v in (op.kernel_size, op.stride, op.padding, getattr(op, "dilation", 1)))
    offset = [
        place.offset[d] + place.stride[d] * (((kernel[d] - 1) * dilation[d] + 1) / 2 - padding[d] - stride[d] / 2)
        for d in range(3)
    ]
    i, j, k = (a * b for a, b in zip(place.stride, stride))
    return Tap(place.channels, (i, j, k), (offset[0], offset[1], offset[2]))


def _triple(value: Any) -> tuple[int, int, int]:
    i, j, k = (value,) * 3 if isinstance(value, int) else value
    return i, j, k


def image_vector(maps: Iterable[torch.Tensor]) -> torch.Tensor:
    """(N, sum of C) float32: the mean of every map over the whole view, concatenated (paper, contrastive branch of U-Nets)."""
    return torch.cat([m.mean(dim=(2, 3, 4), dtype=torch.float32) for m in maps], dim=1)
