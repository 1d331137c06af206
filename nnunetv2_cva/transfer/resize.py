"""Tensors made to fit another shape so that activations keep their size.

Each rule is exact for the inputs it names. Channels and kernels that were grown give back the original when they are shrunk
again; position embeddings do not, as interpolation smooths them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_cva.sizes import by


def resized(
    value: Tensor, shape: tuple[int, ...], transposed: bool, input_layer: bool, images: Sequence[bool] | None = None
) -> tuple[Tensor | None, str]:
    """``value`` in ``shape`` and how it got there; None and the reason where no rule leads there.

    ``images``: which channels of an input layer are images; None: all. The others start at 0.
    """
    how = []
    if value.ndim != len(shape):
        names = {4: "2D", 5: "3D"}
        return None, f"{names.get(value.ndim, value.ndim)} in the file, {names.get(len(shape), len(shape))} in the target"
    if value.ndim > 3 and value.shape[2:] != shape[2:]:
        fitted = (_upsampling if transposed else _kernel)(value, shape[2:])
        sizes = f"kernel {by(value.shape[2:])} -> {by(shape[2:])}"
        if fitted is None:
            return None, sizes
        value = fitted
        how.append(sizes)
    if input_layer and value.ndim > 3 and value.shape[1] != shape[1] and value.shape[0] == shape[0]:
        seen = [c for c in range(shape[1]) if images is None or len(images) != shape[1] or images[c]]
        others = shape[1] - len(seen)
        start = f" ({others} of them no image{'s' * (others > 1)}: start at 0)" if others else ""
        how.append(f"{value.shape[1]} -> {shape[1]} input channels{start}")
        wide = value.new_zeros(value.shape[0], *shape[1:])
        wide[:, seen] = input_channels(value, len(seen)) if len(seen) != value.shape[1] else value
        value = wide
    if tuple(value.shape) != shape:
        return None, f"shape {by(value.shape)} in the file, {by(shape)} in the target"
    return value.contiguous(), ", ".join(how)


def input_channels(weight: Tensor, channels: int) -> Tensor:
    """(O, C, ...) -> (O, ``channels``, ...): repeated in order and divided by the number of copies, or folded together.

    An image that is the same in all channels gives exactly the response it gave before; for a multiple of C channels this is
    repeating and scaling by C / ``channels``.
    """
    before = weight.shape[1]
    new = torch.zeros(weight.shape[0], channels, *weight.shape[2:], dtype=weight.dtype)
    for i in range(max(before, channels)):
        copies = sum(1 for j in range(channels) if j % before == i % before) if channels > before else 1
        new[:, i % channels] += weight[:, i % before] / copies
    return new


def token_grid(
    embedding: Tensor, source: tuple[int, ...], target: tuple[int, ...], registers: tuple[int, int]
) -> tuple[Tensor | None, str]:
    """(1, R + T, D) position embedding of the grid ``source``, interpolated trilinearly to ``target``; R registers stay."""
    if registers[0] != registers[1]:
        return None, f"{registers[0]} register tokens in the file, {registers[1]} in the target"
    if source == target:
        return embedding, ""
    first, rest = embedding[:, : registers[0]], embedding[:, registers[0] :]
    grid = rest.float().transpose(1, 2).unflatten(2, source)
    new = F.interpolate(grid, size=target, mode="trilinear", align_corners=False).flatten(2).transpose(1, 2)
    return torch.cat([first, new.to(rest.dtype)], dim=1), f"tokens {by(source)} -> {by(target)}, trilinear"


def _kernel(weight: Tensor, size: Sequence[int]) -> Tensor | None:
    """A convolution's kernel, per axis n -> 1 and 1 -> n (n odd).

    n -> 1 sums the taps: exact where the input does not change along this axis (the centre tap alone would lose
    the rest of the response). 1 -> n puts the tap into the centre: the same function for every input, up to the edge.
    """
    for axis, (old, new) in enumerate(zip(weight.shape[2:], size, strict=True), start=2):
        if old == new:
            continue
        if new == 1 and old % 2 == 1:
            weight = weight.sum(dim=axis, keepdim=True)
        elif old == 1 and new % 2 == 1:
            side = [0, 0] * (weight.ndim - 1 - axis)
            weight = F.pad(weight, [*side, new // 2, new // 2])
        else:
            return None
    return weight


def _upsampling(weight: Tensor, size: Sequence[int]) -> Tensor | None:
    """A transposed convolution's kernel as long as its stride, per axis n -> 1 and 1 -> n: every output sees one tap.

    n -> 1 takes the mean of what the n outputs would have been; 1 -> n gives all n outputs the value of the one.
    """
    for axis, (old, new) in enumerate(zip(weight.shape[2:], size, strict=True), start=2):
        if old == new:
            continue
        if new == 1:
            weight = weight.mean(dim=axis, keepdim=True)
        elif old == 1:
            weight = weight.repeat_interleave(new, dim=axis)
        else:
            return None
    return weight
