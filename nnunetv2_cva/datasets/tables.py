"""Tables of cases as csv: written whole, read whatever program saved them."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from nnunetv2_cva.files import written_whole

DELIMITERS = ",;\t"


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A csv file, whole or not at all. Names of files may be in another encoding than UTF-8."""
    with written_whole(path) as partial, open(partial, "w", newline="", encoding="utf-8", errors="surrogateescape") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def read_table(path: Path, columns: Sequence[str] = ()) -> list[tuple[int, dict[str, str]]]:
    """(line, {column: value}) of every row; none where there is no such file. Cells that a row lacks are empty.

    Programs save tables with commas, semicolons or tabs, as UTF-8 (with a byte order mark or not), UTF-16 or cp1252.

    Raises:
        ValueError: a column is missing, or it is no table.
    """
    if not path.is_file():
        return []
    text = decoded(path.read_bytes())
    first, _, rest = text.partition("\n")
    delimiter = None
    if first.strip().lower().startswith("sep="):  # a line that only Excel writes and reads
        delimiter, text = first.strip()[4:5], rest
        first = rest.partition("\n")[0]
    delimiter = delimiter or max(DELIMITERS, key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        found = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as e:
        raise ValueError(f"{path}, line {reader.line_num}: expected a table ({e}). Save it as csv.") from None
    missing = [name for name in columns if name not in header]
    if missing:
        found_columns = ", ".join(header) or "none"
        raise ValueError(f"{path}: expected the columns {', '.join(columns)}, found {found_columns}. Correct its first line.")
    return [(line, {name: row[n] if n < len(row) else "" for n, name in enumerate(header)}) for line, row in found]


def decoded(content: bytes) -> str:
    """The text of a file that some program has saved."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16", "replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        # Ours hold names of files byte by byte. Other programs leave signs of themselves.
        saved_elsewhere = b"\r\n" in content or content.partition(b"\n")[0].count(b";") > 1
        return content.decode(*(("cp1252", "replace") if saved_elsewhere else ("utf-8-sig", "surrogateescape")))
