"""Volumes as pictures: three orthogonal slices of the same scale, grey or coloured, and base64 for pages."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np

# Twelve colours that differ for most eyes (Paul Tol's muted palette and a few of his bright one).
PALETTE = np.array(
    [(204, 102, 119), (51, 34, 136), (221, 204, 119), (17, 119, 51), (136, 204, 238), (136, 34, 85)]
    + [(68, 170, 153), (153, 153, 51), (170, 68, 153), (221, 170, 51), (0, 119, 187), (238, 119, 51)]
)


def windowed(volume: np.ndarray) -> np.ndarray:
    """(I, J, K) uint8 between the 1 % and 99.5 % quantiles."""
    low, high = np.percentile(volume, (1, 99.5))
    return np.rint(255 * np.clip((volume - low) / max(high - low, 1e-6), 0, 1)).astype(np.uint8)


def three(
    volume: np.ndarray, point: Sequence[float] | np.ndarray, size: Sequence[int], spacing: Sequence[float], tile: int
) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Slices across each axis through ``point`` (voxel coordinates of an image of ``size`` voxels and ``spacing`` mm) of any
    ``volume`` (gi, gj, gk[, channels]) that covers it; side by side in squares of ``tile`` pixels, all of one scale, the first
    axis pointing up. Also where the point is in each: (row, column) of the picture."""
    extent = np.multiply(size, spacing)
    scale = tile / extent.max()
    picture = np.zeros((tile, 3 * tile, *volume.shape[3:]), volume.dtype)
    marks = []
    for axis in range(3):
        rows, columns = (a for a in range(3) if a != axis)
        at = min(volume.shape[axis] - 1, int(point[axis] / size[axis] * volume.shape[axis]))
        plane = np.take(volume, at, axis=axis)
        height, width = (max(1, min(tile, round(extent[a] * scale))) for a in (rows, columns))
        r = ((np.arange(height) + 0.5) / height * plane.shape[0]).astype(int)
        c = ((np.arange(width) + 0.5) / width * plane.shape[1]).astype(int)
        shown = plane[r][:, c]
        row = point[rows] / size[rows] * height
        if rows == 0:
            shown, row = shown[::-1], height - row
        top, left = (tile - height) // 2, axis * tile + (tile - width) // 2
        picture[top : top + height, left : left + width] = shown
        marks.append((top + row, left + point[columns] / size[columns] * width))
    return picture, marks


def heated(grey: np.ndarray, heat: np.ndarray, strength: float = 0.85) -> np.ndarray:
    """(H, W, 3) uint8: warm colours over ``grey`` where ``heat`` (H, W) in [0, 1] is high."""
    from matplotlib import colormaps

    colour = colormaps["inferno"](heat)[..., :3] * 255
    weight = (strength * heat)[..., None]
    return np.rint(grey[..., None] * (1 - weight) + colour * weight).astype(np.uint8)


def contrast(heat: np.ndarray) -> np.ndarray:
    """Heat in [0, 1]: 0 up to its median, 1 at its maximum, and steep between, so that the best places stand out."""
    low, high = np.median(heat), heat.max()
    return np.clip((heat - low) / max(high - low, 1e-6), 0, 1) ** 3


def cross(picture: np.ndarray, marks: Sequence[tuple[float, float]], colour: Sequence[int], arm: int = 6) -> None:
    """Draw a cross with an open middle at each mark, in place."""
    for row, column in marks:
        r, c = int(row), int(column)
        for d in (*range(-arm, -1), *range(2, arm + 1)):
            for y, x in ((r + d, c), (r, c + d)):
                if 0 <= y < picture.shape[0] and 0 <= x < picture.shape[1]:
                    picture[y, x] = colour


def png(picture: np.ndarray) -> str:
    """A data address of the picture (H, W[, 3]) uint8."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def packed(values: np.ndarray) -> str:
    """The bytes of an array, as base64."""
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()
