"""Numbers beside the pictures where there are labels: how far off matches are, and how well labels are carried over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nnunetv2_cva.seeing.describe import Described, by_intensity, by_position, cells, coarser
from nnunetv2_cva.seeing.frozen import Frozen
from nnunetv2_cva.seeing.images import Image
from nnunetv2_cva.seeing.look import Look
from nnunetv2_cva.seeing.matches import errors_mm
from nnunetv2_cva.seeing.propagation import Carried, from_first, mean_and_interval, means, one_shot

MOST_CELLS = 8_000  # of a whole image whose labels are carried: all pairs of cells are compared
Table = tuple[str, list[str], list[list[Any]]]  # title, header, rows


def tables(
    found: Look,
    networks: Mapping[str, Frozen],
    labels: Mapping[str, int],
    pool: Sequence[Image],
    pairs: int,
    tick: Callable[[], object],
) -> list[Table]:
    """Errors of matches in mm; Dice of the first image's labels carried to the others; and Dice of ``pairs`` random windows of
    ``pool``, beside the same relative position and the intensity. ``tick`` is called after every pair.

    Raises:
        ValueError: fewer than two cases of the pool show labels.
    """
    values = list(labels.values())
    first, *others = (i.name for i in found.images)
    whole = from_first(found.images, _rows(found, MOST_CELLS), values)
    windows = one_shot(pool, networks, values, pairs, tick=tick)
    return [
        _errors(found, values),
        _carried(f"Labels of {first} carried to {', '.join(others)} by nearest features, whole images: Dice", whole, labels),
        _carried(f"Labels of a random window carried to one of another case, {pairs} pairs: Dice", windows, labels),
    ]


def _rows(found: Look, most: int | None = None) -> dict[str, list[Described]]:
    """Every image by everything that is compared; ``most`` cells, by default as many as the networks' descriptions have."""
    described = {name: [d if most is None else coarser(d, most) for d in each] for name, each in found.described.items()}
    grids = [cells(i.size) if most is None else cells(i.size, most) for i in found.images]
    return {
        "same relative position": [by_position(i, b) for i, b in zip(found.images, grids, strict=True)],
        "intensity": [by_intensity(i, b) for i, b in zip(found.images, grids, strict=True)],
        **described,
    }


def _errors(found: Look, labels: Sequence[int]) -> Table:
    listed = []
    for kind, each in errors_mm(found.images, _rows(found), labels).items():
        mean, half = mean_and_interval(each)
        listed.append([kind, f"{mean:.1f} ± {half:.1f}", len(each)])
    return (
        f"Centroids of labels of {found.images[0].name} found in the others: distance to the label's centroid there, mm",
        ["by", "mean, 95 % interval", "centroids"],
        listed,
    )


def _carried(title: str, found: Sequence[Carried], labels: Mapping[str, int]) -> Table:
    rows = []
    for row, (mean, half) in means(found).items():
        each = np.array([c.dice for c in found if c.row == row])
        rows.append([row, f"{mean:.3f} ± {half:.3f}", *(_mean(d) for d in each.T)])
    return title, ["by", "mean, 95 % interval", *labels], rows


def _mean(values: np.ndarray) -> str:
    """Of what is known; nothing where no image shows the label."""
    known = values[values == values]
    return f"{known.mean():.3f}" if len(known) else "-"
