"""Tables of cases as csv: written whole, read whatever program saved them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from nnunetv2_cva.files import written_whole


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A csv file, whole or not at all. Names of files may be in another encoding than UTF-8."""
    with written_whole(path) as partial, open(partial, "w", newline="", encoding="utf-8", errors="surrogateescape") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows, by column; none where there is no such file."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as f:
        return [{k: v or "" for k, v in row.items() if k} for row in csv.DictReader(f)]
