"""Pictures to look at before a GPU is busy for days: a contact sheet of the cases, and pairs of views with what they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from scipy.ndimage import zoom

from nnunetv2_cva.files import written_whole

TILE = 160  # pixels per slice
COLUMNS = 4
SHARED, BEGIN, HIDDEN, OUTSIDE = "#ffb000", "#00a8e8", "#4a6a8a", "#d9cfe6"
TILE_INCHES, GAP, HEAD, LEGEND = 2.6, 0.1, 0.2, 0.35


@dataclass(frozen=True)
class Sheet:
    """One case of the contact sheet. ``slices``: (TILE, 3 TILE), as ``three_slices`` makes them."""

    title: str
    slices: np.ndarray


def contact_sheet(cases: Sequence[Sheet], path: Path) -> None:
    """The three middle slices of every case, each case windowed on its own."""
    columns = min(COLUMNS, len(cases))
    rows = -(-len(cases) // columns)
    figure = _figure(4.2 * columns, 1.75 * rows)
    for number, case in enumerate(cases):
        axes = figure.add_subplot(rows, columns, number + 1)
        axes.imshow(case.slices, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(case.title, fontsize=6, color="white", pad=2)
        axes.axis("off")
    figure.tight_layout(pad=0.4)
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=100, format="png")


def three_slices(image: Any, spacing: Sequence[float]) -> np.ndarray:
    """(TILE, 3 TILE): the middle slice across each axis, in millimetres, fitted into squares of the same scale.

    ``image``: (C, I, J, K), an array or a compressed one, of which only these slices of the first channel are read.
    """
    shape = image.shape[1:]
    extent = np.multiply(shape, spacing)
    tiles = []
    for axis in range(3):
        where = (0, *(shape[a] // 2 if a == axis else slice(None) for a in range(3)))
        plane = windowed(np.asarray(image[where]).reshape(np.delete(shape, axis)))
        size = np.maximum(1, np.rint(np.delete(extent, axis) / extent.max() * (TILE - 4)).astype(int))
        scaled = zoom(plane, size / plane.shape, order=1)[: TILE - 4, : TILE - 4]
        tile = np.zeros((TILE, TILE), np.float32)
        i, j = (TILE - scaled.shape[0]) // 2, (TILE - scaled.shape[1]) // 2
        tile[i : i + scaled.shape[0], j : j + scaled.shape[1]] = scaled
        tiles.append(tile)
    return np.concatenate(tiles, axis=1)


def windowed(image: np.ndarray) -> np.ndarray:
    """Between the 1st and 99.5th percentile, in [0, 1]."""
    image = np.asarray(image, np.float32)
    low, high = np.percentile(image, (1, 99.5))
    return np.clip((image - low) / max(high - low, 1e-6), 0, 1)


@dataclass(frozen=True)
class Tile:
    """One plane of a view. ``plane``: (J, K); ``roi``: (2, 3), the shared region to be framed; ``hidden``, ``inside``: (J, K),
    voxels that the network is not shown, and those that lie in the case; None where all are shown or inside."""

    title: str
    plane: np.ndarray
    roi: np.ndarray | None = None
    hidden: np.ndarray | None = None
    inside: np.ndarray | None = None


def tiles(rows: Sequence[tuple[str, Sequence[Tile]]], path: Path) -> None:
    """A row of tiles under each title, windowed by its first tile, on white; below what colours and frames mean.

    Raises:
        OSError: the picture cannot be written.
    """
    shape = rows[0][1][0].plane.shape
    columns, height = max(len(row) for _, row in rows), TILE_INCHES * shape[0] / shape[1]
    figure = _figure(columns * (TILE_INCHES + GAP) + GAP, len(rows) * (height + 2 * HEAD) + LEGEND, "white")
    wide, high = figure.get_size_inches()
    for r, (title, row) in enumerate(rows):
        top = high - r * (height + 2 * HEAD) - 2 * HEAD
        figure.text(GAP / wide, (top + HEAD) / high, title, fontsize=9, weight="bold", va="bottom")
        window = np.percentile(row[0].plane, (1, 99.5))
        for c, tile in enumerate(row):
            left = GAP + c * (TILE_INCHES + GAP)
            axes = figure.add_axes((left / wide, (top - height) / high, TILE_INCHES / wide, height / high))
            axes.imshow(_coloured(tile, window), interpolation="nearest", aspect="auto")
            axes.set_title(tile.title, fontsize=8, loc="left", pad=2)
            axes.axis("off")
            if tile.roi is not None:
                _frame(axes, tile.roi, tile.plane.shape)
    figure.legend(
        handles=_legend([tile for _, row in rows for tile in row]), loc="lower left", ncols=4, fontsize=8, frameon=False
    )
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=100, format="png")


def _coloured(tile: Tile, window: Sequence[float]) -> np.ndarray:
    low, high = window
    grey = np.clip((tile.plane.astype(np.float32) - low) / max(high - low, 1e-6), 0, 1)
    image = np.repeat(grey[..., None], 3, axis=2)
    if tile.hidden is not None:
        image[tile.hidden] = to_rgb(HIDDEN)
    if tile.inside is not None:
        image[~tile.inside] = to_rgb(OUTSIDE)
    return image


def _legend(shown: Sequence[Tile]) -> list[Any]:
    handles: list[Any] = []
    if any(t.roi is not None for t in shown):
        handles.append(Patch(fill=False, edgecolor=SHARED, label="what both views show"))
        of_dot = Line2D([], [], marker="o", linestyle="", color=BEGIN, markersize=5)
        of_dot.set_label("where it begins: moves when a view is mirrored")
        handles.append(of_dot)
    if any(t.hidden is not None and t.hidden.any() for t in shown):
        handles.append(Patch(color=HIDDEN, label="hidden from the student"))
    if any(t.inside is not None and not t.inside.all() for t in shown):
        handles.append(Patch(color=OUTSIDE, label="outside of the case"))
    return handles


@dataclass(frozen=True)
class ShownPair:
    """Two views of a case: ``views``, ``inside`` (which voxels lie in the case) and ``hidden`` (from the student; None: none),
    each (2, I, J, K), ``rois`` (2, 2, 3)."""

    title: str
    views: np.ndarray
    inside: np.ndarray
    hidden: np.ndarray | None
    rois: np.ndarray


def view_pairs(pairs: Sequence[ShownPair], path: Path) -> None:
    """A row per pair: both views through the middle of what they share, as the teacher and as the student sees them."""
    tiles([(pair.title, [*_of_pair(pair, "teacher", False), *_of_pair(pair, "student", True)]) for pair in pairs], path)


def _of_pair(pair: ShownPair, who: str, hides: bool) -> list[Tile]:
    found = []
    for view in range(2):
        at = middle(pair.rois[view], pair.views.shape[1])
        hidden = pair.hidden[view, at] if hides and pair.hidden is not None else None
        title = f"{who}: view {view}, {slice_of(at, pair.views.shape[1])}"
        found.append(Tile(title, pair.views[view, at], pair.rois[view], hidden, pair.inside[view, at]))
    return found


def middle(roi: np.ndarray, planes: int) -> int:
    """The plane of the first axis through the middle of the shared region."""
    return int(np.clip(roi[:, 0].mean() * planes, 0, planes - 1))


def slice_of(at: int, planes: int) -> str:
    """Which plane of the first axis is shown, in words."""
    return f"slice {at + 1} of {planes}"


def _frame(axes: Any, roi: np.ndarray, size: Sequence[int]) -> None:
    begin, end = (roi[side, 1:] * size - 0.5 for side in (0, 1))  # imshow centres pixel n at n
    low, extent = np.minimum(begin, end), np.abs(end - begin)
    axes.add_patch(Rectangle((low[1], low[0]), extent[1], extent[0], fill=False, edgecolor=SHARED, linewidth=1.5))
    inset = np.sign(end - begin) * 0.04 * np.asarray(size)
    axes.plot(begin[1] + inset[1], begin[0] + inset[0], "o", color=BEGIN, markersize=4)


def _figure(width: float, height: float, colour: str = "black") -> Figure:
    figure = Figure(figsize=(width, height), facecolor=colour)
    FigureCanvasAgg(figure)
    return figure
