"""Preprocessed nnU-Net cases on disk: reading boxes of voxels, and checking before training that all can be read."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import blosc2
import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd

from nnunetv2_cva.views.geometry import Triple

HEADERS = 2000  # of more cases than this, as many headers are checked, evenly spread
LISTED = 10
CONSTANT = "Remove it from the dataset."
REMEDY = "Preprocess the case again (nnUNetv2_preprocess), or remove it from the dataset."
MMAP = {} if os.name == "nt" else {"mmap_mode": "r"}  # blosc2 cannot map files on Windows


class Case:
    """One open case: (C, I, J, K) of any real type, read as float32."""

    def __init__(self, path: str) -> None:
        """Raises ValueError, naming the file, when it is not a case."""
        self.path = path
        blosc2.set_nthreads(1)
        try:
            self.array = blosc2.open(urlpath=path, mode="r", dparams={"nthreads": 1}, **MMAP)
        except Exception as e:
            raise ValueError(f"{path}: {_unreadable(path, e)} {REMEDY}") from e
        shape = getattr(self.array, "shape", ())
        if len(shape) != 4 or 0 in shape:
            raise ValueError(f"{path}: expected four axes (channels, i, j, k), none empty, found shape {shape}. {REMEDY}")

    @property
    def channels(self) -> int:
        return int(self.array.shape[0])

    @property
    def shape(self) -> Triple:
        """Voxels along (i, j, k)."""
        i, j, k = self.array.shape[1:]
        return int(i), int(j), int(k)

    def read(self, box: np.ndarray) -> np.ndarray:
        """(C, ...) float32: the voxels of ``box`` (3, 2), zeros outside the case. Only its blocks are decompressed.

        Raises:
            ValueError: the file is damaged or holds NaN or Inf there; names the file.
        """
        try:
            voxels = crop_and_pad_nd(self.array, box.tolist(), cast_cropped_to=np.float32)
        except Exception as e:
            raise ValueError(f"{self.path}: {_unreadable(self.path, e)} {REMEDY}") from e
        # A sum is finite when every voxel is, but for overflow, and takes a fraction of the time of looking at each.
        x = torch.from_numpy(voxels)
        if not math.isfinite(x.sum()) and not x.isfinite().all():
            raise ValueError(f"{self.path}: holds NaN or Inf. {REMEDY}")
        return voxels

    def blocks(self, box: np.ndarray) -> int:
        """How many compressed blocks reading ``box`` touches: what reading costs."""
        inside = np.clip(box, 0, np.array(self.shape)[:, None])
        size = np.array(self.array.blocks[1:])
        return int(np.prod(-(-inside[:, 1] // size) - inside[:, 0] // size))

    def chunks(self) -> Iterator[np.ndarray]:
        """All voxels as float32, one compressed chunk after the other."""
        shape, size = self.array.shape, self.array.chunks
        for index in np.ndindex(*(-(-n // c) for n, c in zip(shape, size, strict=True))):
            where = tuple(slice(i * c, min((i + 1) * c, n)) for i, c, n in zip(index, size, shape, strict=True))
            try:
                chunk = self.array[where].astype(np.float32, copy=False)
            except Exception as e:
                raise ValueError(f"{self.path}: {_unreadable(self.path, e)} {REMEDY}") from e
            yield chunk


def check_varies(case: Case) -> None:
    """That a case is not the same everywhere; reads no further than to the first voxel that differs.

    Raises:
        ValueError: it is; names the file.
    """
    first = None
    for chunk in case.chunks():
        first = chunk.flat[0] if first is None else first
        if (chunk != first).any():
            return
    raise ValueError(f"{case.path}: every voxel is {first:g}. {CONSTANT}")


class Cases:
    """The cases of one preprocessed configuration, ``<folder>/<key>.b2nd``. Segmentations are never opened.

    Nothing stays open and the names are one array, so loader processes do not grow while they run.
    """

    def __init__(self, folder: str | Path, keys: Sequence[str] | np.ndarray) -> None:
        self.folder, self.keys = str(folder), np.array(keys, dtype=str)

    def __len__(self) -> int:
        return len(self.keys)

    def open(self, key: str) -> Case:
        """Raises ValueError, naming the file, when it is missing, damaged or not a case."""
        return Case(os.path.join(self.folder, f"{key}.b2nd"))

    def shape(self, key: str) -> Triple:
        """Voxels of a case along (i, j, k), from its header."""
        return self.open(key).shape


@dataclass(frozen=True)
class Checked:
    """Of how many ``cases`` how many ``headers`` and ``voxels`` were checked; ``shapes`` are those of the headers."""

    cases: int
    headers: int
    voxels: int
    shapes: list[Triple]

    def __str__(self) -> str:
        spread = "" if self.headers == self.cases else " (evenly spread)"
        later = "; the others are checked when they are read" if self.voxels < self.cases else ""
        return (
            f"Checked the headers of {self.headers} of {self.cases} cases{spread} and the voxels of {self.voxels} "
            f"for NaN and Inf{later}."
        )


def check_cases(cases: Cases, channels: int, seconds: float, progress: Callable[[int, int], None] | None = None) -> Checked:
    """Open every case (of more than ``HEADERS`` an evenly spread subset), then look at voxels for up to ``seconds``.

    Voxels are looked at case by case in a shuffled order: blosc2 decompresses under Python's global lock, so threads
    would gain nothing. ``progress(done, total)`` is called after every case.

    Raises:
        ValueError: cases that cannot be used, with the reason for each: not readable, another number of channels, NaN
            or Inf, the same value in every voxel.
    """
    keys = cases.keys[np.linspace(0, len(cases) - 1, min(len(cases), HEADERS)).astype(int)]
    shapes: list[Triple] = []
    bad: list[str] = []
    for key in keys:
        try:
            case = cases.open(key)
            if case.channels != channels:
                bad.append(f"{case.path}: has {case.channels} channels, expected {channels} as in dataset.json.")
            shapes.append(case.shape)
        except ValueError as e:
            bad.append(str(e))
    _raise(bad, len(keys))
    until, voxels = monotonic() + seconds, 0
    for key in np.random.default_rng(0).permutation(keys) if seconds > 0 else ():
        fault = _voxel_fault(cases.open(key), until)
        if fault:
            bad.append(fault)
        if monotonic() > until:
            break
        voxels += 1
        if progress:
            progress(voxels, len(keys))
    _raise(bad, voxels)
    return Checked(len(cases), len(keys), voxels, shapes)


def _voxel_fault(case: Case, until: float) -> str | None:
    """Why a case's voxels cannot be used, or None when they can or time is over."""
    low, high = math.inf, -math.inf
    try:
        for chunk in case.chunks():
            ends = torch.stack(torch.aminmax(torch.from_numpy(chunk)))
            if not ends.isfinite().all():
                return f"{case.path}: holds NaN or Inf. {REMEDY}"
            low, high = min(low, float(ends[0])), max(high, float(ends[1]))
            if monotonic() > until:
                return None
    except ValueError as e:
        return str(e)
    return f"{case.path}: every voxel is {low:g}. {CONSTANT}" if low == high else None


def _raise(bad: list[str], checked: int) -> None:
    if bad:
        more = [f"and {len(bad) - LISTED} more"] if len(bad) > LISTED else []
        listing = "\n  ".join(bad[:LISTED] + more)
        raise ValueError(f"{len(bad)} of {checked} checked cases cannot be trained on:\n  {listing}")


def _unreadable(path: str, error: Exception) -> str:
    if not os.path.exists(path):
        return "there is no such file."
    if os.path.getsize(path) == 0:
        return "the file is empty."
    return f"cannot be read, is it complete? (blosc2: {error})"
