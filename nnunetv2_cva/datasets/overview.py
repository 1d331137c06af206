"""What is in a pretraining dataset, as lines of a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_cva.datasets.inventory import CASES, REJECTED, read_accepted, read_rejected
from nnunetv2_cva.sizes import by
from nnunetv2_cva.views.index import read_index

ROW = "{:28} {:>6} {:>8}  {:40} {:38} {}"
LISTED = 10  # rejected files per reason


def overview(folder: Path, data: Path) -> list[str]:
    """Images and preprocessed cases (in ``data``) by the dataset that they come from, and why others are rejected."""
    lines = []
    if (folder / CASES).is_file():
        found = read_accepted(folder)
        shape, spacing = "shape: min, median, max", "spacing in mm: min, median, max"
        lines.append(ROW.format("images", "cases", "channels", shape, spacing, "intensities"))
        for name in sorted({f.dataset for f in found}):
            of = [f for f in found if f.dataset == name]
            low, high = (end(c[which] for f in of for c in f.intensities) for end, which in ((min, "min"), (max, "max")))
            shapes, spacings = _range([f.shape for f in of], ".0f"), _range([f.spacing for f in of], ".3g")
            lines.append(ROW.format(name, len(of), of[0].channels, shapes, spacings, f"{low:g} to {high:g}"))
    index = read_index(data)
    if index is not None:
        lines.append(ROW.format("preprocessed", "cases", "channels", "shape: min, median, max", "", ""))
        for code, name in enumerate(index.datasets):
            shapes_of = index.shapes[index.dataset_of == code]
            lines.append(ROW.format(name, len(shapes_of), shapes_of[0][0], _range(shapes_of[:, 1:], ".0f"), "", ""))
    return [*(line.rstrip() for line in lines), *_rejected(folder)]


def _rejected(folder: Path) -> list[str]:
    """Every reason, the most frequent first, with the first files that have it."""
    reasons: dict[str, list[str]] = {}
    for _, reason, path in read_rejected(folder):
        reasons.setdefault(reason.split(":")[0].split(" of ")[0], []).append(path)
    lines = [f"rejected: {sum(map(len, reasons.values()))}"]
    for reason, paths in sorted(reasons.items(), key=lambda r: -len(r[1])):
        lines.append(f"  {len(paths):6}  {reason}")
        lines.extend(f"          {path.encode('utf-8', 'backslashreplace').decode()}" for path in paths[:LISTED])
        if len(paths) > LISTED:
            lines.append(f"          and {len(paths) - LISTED} more, in {folder / REJECTED}")
    return lines


def _range(rows: Any, form: str) -> str:
    values = np.asarray(rows, dtype=float)
    return ", ".join(by(float(format(n, form)) for n in f(values, axis=0)) for f in (np.min, np.median, np.max))
