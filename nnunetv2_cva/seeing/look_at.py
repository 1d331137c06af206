"""Places of one image found in others, by the trained network and by the same one untrained: pictures and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_cva.seeing.describe import by_intensity, by_position
from nnunetv2_cva.seeing.frozen import Frozen, load_frozen, untrained
from nnunetv2_cva.seeing.images import Image, find_images, preprocess
from nnunetv2_cva.seeing.labelled import labelled_cases
from nnunetv2_cva.seeing.look import Look, look, picture
from nnunetv2_cva.seeing.look_page import write_look
from nnunetv2_cva.seeing.matches import errors_mm
from nnunetv2_cva.seeing.propagation import mean_and_interval, means, one_shot
from nnunetv2_cva.seeing.requests import LookRequest, Progress, counting, device_of

PICTURE, PAGE = "look.png", "look.html"
CASES = 4  # of a target that nobody chose from
POOL = 12  # cases that windows are drawn from
Table = tuple[str, list[str], list[list[Any]]]


def look_at(request: LookRequest, progress: Progress) -> list[str]:
    """Write picture and page. Returns what there is to say: with labels the tables, too.

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
    tables = [_errors(found, labels), _carried(pool, networks, labels, request.pairs, progress)] if labels else []
    output = Path(request.output)
    output.mkdir(parents=True, exist_ok=True)
    picture(found, output / PICTURE)
    write_look(found, output / PAGE, tables)
    said = [line for title, header, rows in tables for line in _lines(title, header, rows)]
    return [*said, f"Wrote {output / PICTURE} and {PAGE}, which needs nothing but a browser."]


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
        a, b = networks["trained"], networks["against"]
        if (a.spacing, a.channels) != (b.spacing, b.channels):
            raise ValueError(
                f"`against={request.against}`: expected spacing {a.spacing} and {a.channels} channel(s), as "
                f"{request.weights} has, found {b.spacing} and {b.channels}."
            )
    return networks


def _points(path: str, image: Image) -> np.ndarray:
    """(P, 3) in voxels of the preprocessed image."""
    try:
        rows = [line.replace(",", " ").split() for line in Path(path).read_text("utf-8-sig").splitlines() if line.strip()]
        rows = rows[1:] if rows and not rows[0][0].lstrip("-")[:1].isdigit() else rows  # a header
        values = np.array([[float(v) for v in row] for row in rows]).reshape(-1, 3)
    except (OSError, ValueError) as e:
        raise ValueError(f"`points={path}`: expected three numbers i,j,k a line, found something else ({e}).") from None
    if not len(values):
        raise ValueError(f"`points={path}`: expected three numbers i,j,k a line, found none.")
    return image.from_file(values + 0.5)


def _errors(found: Look, labels: dict[str, int]) -> Table:

    bins = [d.bins for d in next(iter(found.described.values()))]
    rows: dict[str, Any] = {
        "same relative position": [by_position(i, b) for i, b in zip(found.images, bins)],
        "intensity": [by_intensity(i, b) for i, b in zip(found.images, bins)],
        **found.described,
    }
    listed = []
    for kind, each in errors_mm(found.images, rows, list(labels.values())).items():
        mean, half = mean_and_interval(each)
        listed.append([kind, f"{mean:.1f} ± {half:.1f}", len(each)])
    return (
        f"Centroids of labels of {found.images[0].name} found in the others: distance to the label's centroid there, mm",
        ["by", "mean, 95 % interval", "centroids"],
        listed,
    )


def _carried(pool: list[Image], networks: dict[str, Frozen], labels: dict[str, int], pairs: int, progress: Progress) -> Table:

    tick = counting(progress, "Carrying labels", pairs)
    found = one_shot(pool, networks, list(labels.values()), pairs, tick=tick)
    rows = []
    for row, (mean, half) in means(found).items():
        each = np.array([c.dice for c in found if c.row == row])
        rows.append([row, f"{mean:.3f} ± {half:.3f}", *(_mean(d) for d in each.T)])
    return (
        f"Labels of a random window carried to a random window of another case by nearest features, {pairs} pairs: Dice",
        ["by", "mean, 95 % interval", *labels],
        rows,
    )


def _mean(values: np.ndarray) -> str:
    """Of what is known; nothing where no window shows the label."""
    known = values[values == values]
    return f"{known.mean():.3f}" if len(known) else "-"


def _lines(title: str, header: list[str], rows: list[list[Any]]) -> list[str]:
    widths = [max(len(str(r[c])) for r in [header, *rows]) for c in range(len(header))]
    return [title, *("  " + "  ".join(str(v).ljust(w) for v, w in zip(row, widths)).rstrip() for row in [header, *rows])]
