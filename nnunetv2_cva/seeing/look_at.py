"""Places of one image found in others, by the trained network and by the same one untrained: pictures and numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_cva.datasets.tables import decoded
from nnunetv2_cva.files import write_json
from nnunetv2_cva.seeing.frozen import Frozen, check_comparable, load_frozen, untrained
from nnunetv2_cva.seeing.images import Image, find_images, preprocess
from nnunetv2_cva.seeing.labelled import labelled_cases
from nnunetv2_cva.seeing.look import Look, look, picture
from nnunetv2_cva.seeing.look_page import write_look
from nnunetv2_cva.seeing.look_tables import tables
from nnunetv2_cva.seeing.requests import LookRequest, Progress, counting, device_of

PICTURE, PAGE, NUMBERS = "look.png", "look.html", "look.json"
CASES = 4  # of a target that nobody chose from
POOL = 12  # cases that windows are drawn from


def look_at(request: LookRequest, progress: Progress) -> list[str]:
    """Write picture, page and numbers. Returns what there is to say: with labels the tables, too.

    Raises:
        ValueError: images, labels, points or weights that cannot be read or do not fit together.
    """
    networks = _networks(request)
    first = next(iter(networks.values()))
    labels: dict[str, int] = {}
    pool: list[Image] = []
    if request.target:
        dataset = labelled_cases(request.target, first.channels)
        labels = dataset.labels
        names = request.images or [found.name for found, _ in dataset.cases[:CASES]]
        images = dataset.chosen(names).read(first)
        others = [found.name for found, _ in dataset.cases if found.name not in names]
        pool = images + dataset.chosen(others[: max(0, POOL - len(images))]).read(first)
    else:
        images = [preprocess(found, first) for found in find_images(request.images, first.channels)]
    points = _points(request.points, images[0]) if request.points and images else request.count
    tick = counting(progress, "Features of images", len(images) * len(networks))
    found = look(images, networks, points, tick)
    told = []
    if labels:
        tick = counting(progress, "Carrying labels", request.pairs)
        told = tables(found, networks, labels, pool, request.pairs, tick)
    output = Path(request.output)
    output.mkdir(parents=True, exist_ok=True)
    picture(found, output / PICTURE)
    write_look(found, output / PAGE, told)
    write_json(output / NUMBERS, {**_places(found), "tables": [dict(zip(("title", "header", "rows"), t)) for t in told]})
    said = [line for title, header, rows in told for line in _lines(title, header, rows)]
    return [*said, f"Wrote {output / PICTURE}, {NUMBERS} and {PAGE}, which needs nothing but a browser."]


def _places(found: Look) -> dict[str, Any]:
    """Points and matches in voxels of the files' arrays, as points are given: voxel n spans [n - 0.5, n + 0.5)."""

    def of(image: Image, points: np.ndarray) -> list[list[float]]:
        return (image.to_file(points) - 0.5).round(2).tolist()

    matches = [
        {
            "network": name,
            "image": image.name,
            "places": of(image, m.places),
            "similarity": m.best.astype(float).round(4).tolist(),
        }
        for name, each in found.matches.items()
        for image, m in zip(found.images, each, strict=True)
        if m is not None
    ]
    return {"image": found.images[0].name, "points": of(found.images[0], found.points), "matches": matches}


def _networks(request: LookRequest) -> dict[str, Frozen]:
    """By the names of their rows. All see images as the first one's plans say.

    Raises:
        ValueError: ``against`` wants other images than the first.
    """
    device = device_of(request.device)
    networks = {"trained": load_frozen(request.weights, request.branch, request.trust, device, "trained")}
    networks["untrained"] = untrained(request.weights, request.trust, device)
    if request.against:
        networks["against"] = load_frozen(request.against, request.branch, request.trust, device, "against")
        windows = request.target is not None  # which are of one view for all
        check_comparable(networks["trained"], networks["against"], (request.weights, request.against), windows)
    return networks


def _points(path: str, image: Image) -> np.ndarray:
    """(P, 3) in voxels of the preprocessed image."""
    try:
        lines = decoded(Path(path).read_bytes()).splitlines()
        rows = [re.split(r"[,;\s]+", line.strip(" ,;\t")) for line in lines if line.strip()]
        rows = rows[1:] if rows and not rows[0][0].lstrip("-")[:1].isdigit() else rows  # a header
        values = np.array([[float(v) for v in row] for row in rows]).reshape(-1, 3)
    except (OSError, ValueError) as e:
        raise ValueError(f"`points={path}`: expected three numbers i,j,k a line, found something else ({e}).") from None
    if not len(values):
        raise ValueError(f"`points={path}`: expected three numbers i,j,k a line, found none.")
    return image.from_file(values + 0.5)


def _lines(title: str, header: list[str], rows: list[list[Any]]) -> list[str]:
    widths = [max(len(str(r[c])) for r in [header, *rows]) for c in range(len(header))]
    return [title, *("  " + "  ".join(str(v).ljust(w) for v, w in zip(row, widths)).rstrip() for row in [header, *rows])]
