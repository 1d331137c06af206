"""Which blocks of a view are hidden from the student. A mask is True where hidden."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

Triple = tuple[int, int, int]


def draw_mask(n: int, size: Triple, block: Triple, ratio: float, generator: np.random.Generator) -> Tensor:
    """Hidden blocks of n views, each drawn on its own: every subset of exactly round(ratio * blocks) is equally likely.

    Args:
        size: of a view, voxels.
        block: voxels. A block at the far edge may be partial; an axis thinner than a block is one block.
        ratio: 0 to 1, of the blocks; half a block is rounded to even. Partial blocks count as whole ones.

    Returns:
        (n, *grid) bool on the CPU, grid = ceil(size / block).

    Raises:
        ValueError: ``ratio`` outside [0, 1], or a size below 1.
    """
    if not 0 <= ratio <= 1:
        raise ValueError(f"draw_mask: expected a ratio in [0, 1], found {ratio!r}.")
    grid = _grid(size, block)
    blocks = math.prod(grid)
    hidden = np.broadcast_to(np.arange(blocks) < round(ratio * blocks), (n, blocks))
    return torch.from_numpy(generator.permuted(hidden, axis=1)).view(n, *grid)


def expand_mask(mask: Tensor, block: Triple, size: Triple) -> Tensor:
    """Hidden voxels: voxel (i, j, k) is hidden iff its block is.

    Args:
        mask: (n, *grid) bool, on any device, where it stays; nothing is read back.
        block, size: as in :func:`draw_mask`.

    Returns:
        (n, 1, I, J, K) bool, contiguous.

    Raises:
        ValueError: the mask's grid does not belong to this block and size.
    """
    grid = _grid(size, block)
    if mask.ndim != 4 or tuple(mask.shape[1:]) != grid:
        raise ValueError(
            f"expand_mask: expected a mask (n, {', '.join(map(str, grid))}) for views of {tuple(size)} voxels in "
            f"blocks of {tuple(block)}, found {tuple(mask.shape)}."
        )
    a, b, c = (min(pair) for pair in zip(block, size, strict=True))
    voxels = mask[:, :, None, :, None, :, None].expand(-1, -1, a, -1, b, -1, c)
    voxels = voxels.reshape(len(mask), 1, grid[0] * a, grid[1] * b, grid[2] * c)
    return voxels[..., : size[0], : size[1], : size[2]].contiguous()


def hide(views: Tensor, voxel_mask: Tensor) -> Tensor:
    """A copy of the views (n, C, I, J, K) with the hidden voxels (n, 1, I, J, K) 0 in all channels."""
    return views.masked_fill(voxel_mask, 0)


def _grid(size: Triple, block: Triple) -> Triple:
    """Blocks along each axis."""
    if min(*size, *block) < 1:
        raise ValueError(f"masking: expected sizes of at least 1, found views of {tuple(size)} and blocks of {tuple(block)}.")
    i, j, k = (-(-s // b) for s, b in zip(size, block, strict=True))
    return i, j, k
