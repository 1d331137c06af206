"""look.html: a click on the first image shows where every network finds that place in the others."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_cva.files import write_text
from nnunetv2_cva.seeing import slices
from nnunetv2_cva.seeing.dense import DenseMap, on_grid
from nnunetv2_cva.seeing.describe import cells, coarser
from nnunetv2_cva.seeing.images import Image
from nnunetv2_cva.seeing.look import Look, reduced
from nnunetv2_cva.seeing.matches import colours, regions
from nnunetv2_cva.seeing.page import data, page, table

MOST_CELLS = 8_000  # of an image, with their numbers in the page
MOST_VOXELS = 300_000  # of an image as it is shown

STYLE = """
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: .8rem; align-items: end; }
canvas { width: 100%; cursor: crosshair; background: #000; touch-action: manipulation; }
label { margin-right: 1rem; }
"""
EXPLANATION = """<p>Click or drag in the first image. The cross shows where each network finds that place in the other images, the
colours how similar every place is. <em>untrained</em> is the same network with random weights: what it finds, no training has
taught. Cells are averaged over a coarser grid than in the tables, and similarities are rounded.</p>"""


def write_look(found: Look, path: Path, tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[Any]]]] = ()) -> None:
    """Write the page, with ``tables`` (title, header, rows) below the images."""
    script = resources.files("nnunetv2_cva.seeing").joinpath("look.js").read_text("utf-8")
    below = "".join(f"<h2>{escape(title)}</h2>{table(header, rows)}" for title, header, rows in tables)
    body = f'{EXPLANATION}<div id="choices"></div><div id="networks"></div>{below}'
    write_text(path, page("What the network has learned", body, f"const LOOK = {data(content(found))};\n{script}", STYLE))


def content(found: Look) -> dict[str, Any]:
    """Everything the page shows, as plain types: volumes and what the cells are described by, as base64."""
    images = []
    for image in found.images:
        bins = cells(image.size, MOST_VOXELS)
        grey = on_grid([DenseMap(image.voxels[:1], (1, 1, 1), (0.0, 0.0, 0.0), image.size)], bins)[0].numpy()
        images.append(
            {
                "name": image.name,
                "size": list(image.size),
                "spacing": list(image.spacing),
                "file": _to_file(image),
                "bins": list(bins),
                "grey": slices.packed(slices.windowed(grey)),
            }
        )
    networks = []
    for name, described in found.described.items():
        coarse = [coarser(d, MOST_CELLS) for d in described]
        rows, scale, kept = reduced(coarse)
        networks.append(
            {
                "name": name,
                "dims": rows[0].shape[1],
                "scale": scale,
                "kept": round(kept, 3),
                "images": [
                    {
                        "bins": list(d.bins),
                        "rows": slices.packed(r),
                        "body": slices.packed(d.body.numpy().astype(np.uint8)),
                        "colours": slices.packed((255 * c).astype(np.uint8)),
                        "regions": slices.packed(g.astype(np.int8)),
                    }
                    for d, r, c, g in zip(coarse, rows, colours(coarse), regions(coarse))
                ],
            }
        )
    return {"images": images, "networks": networks, "point": found.points[0].tolist(), "palette": slices.PALETTE.tolist()}


def _to_file(image: Image) -> dict[str, list]:
    """Preprocessed coordinate p of axis a is ``begin + p * step`` on axis ``order[a]`` of the file's array."""
    begin, one = image.to_file(np.array([[0.0] * 3, [1.0] * 3]))
    return {"begin": begin.tolist(), "step": (one - begin).tolist(), "order": list(image.order)}
