"""Points of one image found in the others by every network, as a picture: rows for the trained and for the untrained one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunetv2_cva.files import written_whole
from nnunetv2_cva.seeing import slices
from nnunetv2_cva.seeing.describe import Described, by_network, cells
from nnunetv2_cva.seeing.frozen import Frozen
from nnunetv2_cva.seeing.images import Image
from nnunetv2_cva.seeing.matches import Matches, choose_points, colours, match, regions

TILE = 110  # pixels of a slice
POINT, FOUND = (0, 255, 255), (0, 255, 0)


@dataclass(frozen=True)
class Look:
    """What there is to be seen: every image described by every network, and ``points`` (P, 3) in voxels of the first image with
    their matches in the others: ``matches[network][image]``, None for the first image."""

    images: tuple[Image, ...]
    points: np.ndarray
    described: dict[str, tuple[Described, ...]]
    matches: dict[str, tuple[Matches | None, ...]]


def look(
    images: Sequence[Image],
    networks: Mapping[str, Frozen],
    points: np.ndarray | int = 4,
    tick: Callable[[], object] = lambda: None,
) -> Look:
    """Describe the images by the networks and match the points: given ones, or how many to choose.

    Raises:
        ValueError: fewer than two images, or points outside the first one.
    """
    if len(images) < 2:
        raise ValueError(f"Matches need at least two images, found {len(images)}.")
    described = {}
    for name, network in networks.items():
        each = []
        for image in images:
            each.append(by_network(image, network, cells(image.size)))
            tick()
        described[name] = tuple(each)
    first = next(iter(described.values()))[0]
    if isinstance(points, int):
        points = choose_points(first, points)
    if ((points < 0) | (points > np.array(first.size))).any():
        outside = points[((points < 0) | (points > np.array(first.size))).any(1)][0]
        raise ValueError(f"Point {outside.round(1).tolist()} lies outside {images[0].name} of {first.size} preprocessed voxels.")
    matches = {name: (None, *(match(each[0], points, other) for other in each[1:])) for name, each in described.items()}
    return Look(tuple(images), points, described, matches)


def picture(found: Look, path: Path) -> None:
    """Write the picture: for every point a row per network, the point in the first image and its matches with heat maps in the
    others; below, principal components as colours and k-means regions, a row per network each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = _match_rows(found) + _colour_rows(found)
    columns = len(found.images)
    figure = Figure(
        figsize=(3.4 * columns, 1.28 * len(rows) + 0.3),
        facecolor="black",
        layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01),
    )
    FigureCanvasAgg(figure)
    for r, (title, tiles) in enumerate(rows):
        for c, (tile, note) in enumerate(tiles):
            axes = figure.add_subplot(len(rows), columns, r * columns + c + 1)
            axes.imshow(tile, interpolation="nearest")
            axes.set_axis_off()
            label = "\n".join(
                part for part in (found.images[c].name[:44] if r == 0 else "", note or (title if c == 0 else "")) if part
            )
            axes.set_title(label, fontsize=6, color="white", pad=2, loc="left")
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


Rows = list[tuple[str, list[tuple[np.ndarray, str]]]]


def _match_rows(found: Look) -> Rows:
    greys = [slices.windowed(i.voxels[0].numpy()) for i in found.images]
    rows: Rows = []
    for p, point in enumerate(found.points):
        for name, each in found.matches.items():
            first = found.images[0]
            tiles = [(_marked(first, greys[0], point, None, POINT), f"point {p + 1}, voxel {first.voxel(point)}, {name}")]
            for image, grey, m in list(zip(found.images, greys, each, strict=True))[1:]:
                assert m is not None
                said = f"similarity {m.best[p]:.2f}, voxel {image.voxel(m.places[p])}"
                tiles.append((_marked(image, grey, m.places[p], m.heat[p], FOUND), said))
            rows.append((name, tiles))
    return rows


def _colour_rows(found: Look) -> Rows:
    rows: Rows = []
    for name, described in found.described.items():
        for kind, values in (("principal components", _rgb(described)), ("k-means regions", _region_colours(described))):
            tiles = []
            for number, (image, volume) in enumerate(zip(found.images, values)):
                middle = np.divide(image.size, 2)
                tile, _ = slices.three(volume, middle, image.size, image.spacing, TILE)
                tiles.append((tile, f"{kind}, {name}" if number == 0 else ""))
            rows.append((kind, tiles))
    return rows


def _rgb(described: Sequence[Described]) -> list[np.ndarray]:
    """(*bins, 3) uint8 for every image, air black."""
    bodies = [d.body.numpy()[:, None] for d in described]
    return [(255 * c * b).astype(np.uint8).reshape(*d.bins, 3) for c, b, d in zip(colours(described), bodies, described)]


def _region_colours(described: Sequence[Described]) -> list[np.ndarray]:
    palette = np.concatenate([slices.PALETTE, [(0, 0, 0)]]).astype(np.uint8)
    return [palette[r].reshape(*d.bins, 3) for r, d in zip(regions(described), described)]


def _marked(image: Image, grey: np.ndarray, point: Any, heat: np.ndarray | None, colour: Sequence[int]) -> np.ndarray:
    tile, marks = slices.three(grey, point, image.size, image.spacing, TILE)
    shown = np.repeat(tile[..., None], 3, axis=2)
    if heat is not None:
        over, _ = slices.three(slices.contrast(heat).astype(np.float32), point, image.size, image.spacing, TILE)
        shown = slices.heated(tile, over)
    slices.cross(shown, marks, colour)
    return shown


def reduced(described: Sequence[Described], dims: int = 40) -> tuple[list[np.ndarray], float, float]:
    """int8 (R, dims) for every image, and a scale: scalar products of the rows are those of the numbers over scale squared, as
    well as ``dims`` numbers can say. Also the share of the squared length that they keep. For pages, which carry them along."""
    rows = torch.cat([d.rows[d.body] for d in described])
    rows = rows[:: max(1, len(rows) // 20_000)]
    basis = torch.linalg.svd(rows, full_matrices=False).Vh[:dims].T
    kept = float((rows @ basis).square().sum() / rows.square().sum())
    projected = [d.rows @ basis for d in described]
    scale = 127 / max(float(p.abs().max()) for p in projected)
    return [(p * scale).round().to(torch.int8).numpy() for p in projected], scale, kept
