"""The list of training cases is part of a run: names, and stamps of what the files hold."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

PIECE = 4096  # bytes at the beginning, in the middle and at the end of a file
READERS = 16  # threads: on shared storage most of the time is waiting


def stamps(folder: str, keys: Sequence[str]) -> dict[str, str]:
    """Name -> stamp of every case. Of each file three pieces are read, so that this stays cheap for a hundred thousand.

    Raises:
        OSError: a file is missing or cannot be read.
    """
    with ThreadPoolExecutor(READERS) as readers:
        return dict(zip(keys, readers.map(_stamp, (os.path.join(folder, f"{key}.b2nd") for key in keys)), strict=True))


def _stamp(path: str) -> str:
    """Size in bytes, and a checksum of three pieces. Other voxels compress to other bytes, all over the file."""
    with open(path, "rb", buffering=0) as f:
        size, checksum = os.fstat(f.fileno()).st_size, 0
        for start in (0, size // 2, max(0, size - PIECE)):
            f.seek(start)
            checksum = zlib.crc32(f.read(PIECE), checksum)
    return f"{size}-{checksum:08x}"


def refuse_other_cases(before: Mapping[str, str | int], now: Mapping[str, str], allowed: bool) -> str:
    """Compare the cases that a run began with and those of now. Returns a warning where others are allowed; empty: the same.

    Raises:
        ValueError: they differ and others are not allowed; names what is new, gone and changed.
    """
    parts = []
    for what, names in (
        ("new", sorted(now.keys() - before.keys())),
        ("gone", sorted(before.keys() - now.keys())),
        ("changed", sorted(k for k in now.keys() & before.keys() if not _same(before[k], now[k]))),
    ):
        if names:
            parts.append(f"{len(names)} {what} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})")
    if not parts:
        return ""
    said = f"the training cases are not those that the run began with: {', '.join(parts)}."
    if not allowed:
        raise ValueError(f"T{said[1:]} Restore them, or continue with them as they are now: set other_cases to true.")
    return f"WARNING: {said}"


def _same(before: str | int, now: str) -> bool:
    return now == before or (isinstance(before, int) and now.startswith(f"{before}-"))  # earlier checkpoints know sizes only
