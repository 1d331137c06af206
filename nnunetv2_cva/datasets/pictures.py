"""Pictures to look at before a GPU is busy for days: a contact sheet of the cases, and pairs of views with what they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy.ndimage import zoom

from nnunetv2_cva.files import written_whole

TILE = 160  # pixels per slice
COLUMNS = 4
SHARED = "#ffb000"
BEGIN = "#00c8ff"


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
class ShownPair:
    """Two views of a case: ``views`` and ``visible`` (what the student sees) (2, I, J, K), ``rois`` (2, 2, 3)."""

    title: str
    views: np.ndarray
    visible: np.ndarray
    rois: np.ndarray


def view_pairs(pairs: Sequence[ShownPair], path: Path) -> None:
    """A row per pair: both views through the middle of what they share, and the same with the hidden blocks.

    The shared region is framed; the dot marks where it begins along both axes, so a mirrored view has it elsewhere.
    """
    figure = _figure(10.5, 2.75 * len(pairs))
    headings = ("teacher: view 0", "view 1", "student: view 0", "view 1")
    for row, pair in enumerate(pairs):
        low, high = (float(np.percentile(pair.views, q)) for q in (1, 99.5))
        for column, heading in enumerate(headings):
            view, images = column % 2, pair.views if column < 2 else pair.visible
            plane = images[view][_middle(pair.rois[view], images.shape[1])]
            axes = figure.add_subplot(len(pairs), 4, 4 * row + column + 1)
            axes.imshow(plane, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
            _frame(axes, pair.rois[view], plane.shape)
            axes.set_title(f"{pair.title}\n{heading}" if column == 0 else heading, fontsize=7, color="white", loc="left", pad=3)
            axes.axis("off")
    figure.tight_layout(pad=0.5)
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=100, format="png")


def _middle(roi: np.ndarray, planes: int) -> int:
    """The plane of the first axis through the middle of the shared region."""
    return int(np.clip(roi[:, 0].mean() * planes, 0, planes - 1))


def _frame(axes: Any, roi: np.ndarray, size: Sequence[int]) -> None:
    begin, end = (roi[side, 1:] * size - 0.5 for side in (0, 1))  # imshow centres pixel n at n
    low, extent = np.minimum(begin, end), np.abs(end - begin)
    axes.add_patch(Rectangle((low[1], low[0]), extent[1], extent[0], fill=False, edgecolor=SHARED, linewidth=1.5))
    inset = np.sign(end - begin) * 0.04 * np.asarray(size)
    axes.plot(begin[1] + inset[1], begin[0] + inset[0], "o", color=BEGIN, markersize=4)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), facecolor="black")
    FigureCanvasAgg(figure)
    return figure
