"""Small preprocessed cases on disk, as nnU-Net's preprocessing leaves them (blosc2), written without nnU-Net."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import blosc2
import numpy as np


def write_case(folder: Path, key: str, voxels: np.ndarray, **options: Any) -> Path:
    """Write ``<key>.b2nd`` (C, I, J, K) and, beside it, a segmentation and properties that nothing may open."""
    path = folder / f"{key}.b2nd"
    # Small chunks and blocks, so that windows of small cases touch only some of them.
    chunks = tuple(min(c, n) for c, n in zip((1, 32, 32, 32), voxels.shape, strict=False))
    blocks = tuple(min(b, n) for b, n in zip((1, 8, 8, 8), voxels.shape, strict=False))
    options = {"chunks": chunks, "blocks": blocks, **options}
    blosc2.asarray(np.ascontiguousarray(voxels), urlpath=str(path), mode="w", **options)
    (folder / f"{key}_seg.b2nd").write_bytes(b"not a segmentation")
    (folder / f"{key}.pkl").write_bytes(b"not a pickle")
    return path


def ramp(shape: tuple[int, int, int]) -> np.ndarray:
    """(3, I, J, K) float32: every voxel holds the coordinates of its centre."""
    return np.stack(np.meshgrid(*[np.arange(n) + 0.5 for n in shape], indexing="ij")).astype(np.float32)


def texture(shape: tuple[int, int, int], seed: int = 0, channels: int = 1) -> np.ndarray:
    """(C, I, J, K) float32 noise, standard normal."""
    return np.random.default_rng(seed).standard_normal((channels, *shape)).astype(np.float32)
