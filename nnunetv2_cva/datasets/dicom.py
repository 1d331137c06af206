"""DICOM series: one case per series, found by what its files say, read by SimpleITK.

Names of patients, which also stand in names of files and folders, are in no name of a case: names are made of hashes of the
UIDs. A series stands for its first file (by name); the others lie in the same folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import locale
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunetv2_cva.datasets.formats import Unusable, one_line

SERIES, PATIENT, STUDY, MODALITY = "0020|000e", "0010|0020", "0020|000d", "0008|0060"
POSITION, ORIENTATION, SPACING, FRAMES = "0020|0032", "0020|0037", "0028|0030", "0028|0008"
UNEVEN = 0.05  # of the distance of slices, or 0.02 mm: what positions may be rounded by
ROUNDED_MM = 0.02


@dataclass(frozen=True)
class Series:
    """``first``: its first file; ``slices``: number of files; ``patient``: hash of the patient, or of the study without one."""

    first: str
    slices: int
    uid: str
    patient: str
    modality: str

    @property
    def name(self) -> str:
        return f"series_{_hash(self.uid)}"


def is_dicom(path: str) -> bool:
    """By its content: DICOM files often have no ending, or any."""
    try:
        with open(path, "rb") as f:
            return f.read(132)[128:] == b"DICM"
    except OSError:
        return False


def series_in(folder: str, names: Sequence[str]) -> tuple[list[Series], Counter[str]]:
    """The series of the DICOM files ``names`` in a folder, ordered by their first files, and how many files are of none, by what
    is known of them: GDCM does not read even the tags of a transfer syntax that it does not know."""
    slices: dict[str, list[tuple[str, dict[str, str]]]] = {}
    others: Counter[str] = Counter()
    for name in sorted(names):
        tags = _tags(os.path.join(folder, name), (SERIES, PATIENT, STUDY, MODALITY))
        if tags.get(SERIES):
            slices.setdefault(tags[SERIES], []).append((name, tags))
        else:
            others[f"DICOM that cannot be read{_syntax(os.path.join(folder, name))}"] += 1
    found = []
    for uid, files in slices.items():
        first, tags = files[0]
        patient = _hash(tags.get(PATIENT) or tags.get(STUDY) or uid)
        found.append(Series(os.path.join(folder, first), len(files), uid, patient, tags.get(MODALITY, "")))
    return found, others


def files_of(first: str) -> list[str]:
    """The files of the series of a file, in its folder, ordered along the slices' normal.

    Raises:
        Unusable: they cannot be read.
    """
    folder = os.path.dirname(first)
    uid = _tags(first, (SERIES,)).get(SERIES)
    if not uid:
        raise Unusable(f"DICOM that cannot be read{_syntax(first)}")
    return list(_of_series(folder, uid, os.stat(folder).st_mtime_ns))


@lru_cache(maxsize=8)
def _of_series(folder: str, uid: str, _changed: int) -> tuple[str, ...]:
    paths = (e.path for e in sorted(os.scandir(folder), key=lambda e: e.name) if e.is_file())
    return tuple(p for p in paths if is_dicom(p) and _tags(p, (SERIES,)).get(SERIES) == uid)


def read_series(first: str) -> tuple[np.ndarray, dict[str, Any]]:
    """``(1, I, J, K)`` float32 and properties as those of nnU-Net's SimpleITKIO: slices along the first axis, rescaled to
    Hounsfield units or whatever the files say.

    Raises:
        Unusable: slices are missing, doubled, of different grids or shifted; or they are packed in a way that is not read.
    """
    files = files_of(first)
    ordered = files if len(files) == 1 else check_slices(files)
    try:
        with _same_locale():
            image = sitk.ReadImage(ordered if len(ordered) > 1 else ordered[0])
    except RuntimeError as e:
        raise Unusable(f"DICOM that cannot be read{_syntax(first)}: {one_line(e)}") from None
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() > 1:
        raise Unusable(f"not a volume: {image.GetDimension()} dimensions, {image.GetNumberOfComponentsPerPixel()} values a voxel")
    spacing, array = image.GetSpacing(), sitk.GetArrayFromImage(image)[None].astype(np.float32)
    if len(ordered) > 1:  # from the positions: the thickness that headers state is another thing
        spacing = (*spacing[:2], _distance(ordered))
    stuff = {"spacing": spacing, "origin": image.GetOrigin(), "direction": image.GetDirection()}
    return array, {"sitk_stuff": stuff, "spacing": list(spacing[::-1])}


def check_slices(files: Sequence[str]) -> list[str]:
    """The files in the order of their positions.

    Raises:
        Unusable: they do not form one even stack.
    """
    tags = {f: _tags(f, (POSITION, ORIENTATION, SPACING, "0028|0010", "0028|0011", FRAMES)) for f in files}
    if any(int(t.get(FRAMES) or 1) > 1 for t in tags.values()):
        raise Unusable(f"{len(files)} files of several images each")
    lost = [f for f, t in tags.items() if (len(_numbers(t.get(POSITION, ""))), len(_numbers(t.get(ORIENTATION, "")))) != (3, 6)]
    if lost:
        raise Unusable(f"{len(lost)} of {len(files)} slices do not say where they lie")
    for tag, what in ((ORIENTATION, "directions"), (SPACING, "spacings"), ("0028|0010", "sizes"), ("0028|0011", "sizes")):
        values = [_numbers(t.get(tag, "")) for t in tags.values()]
        if any(len(v) != len(values[0]) or not np.allclose(v, values[0], atol=1e-3) for v in values):
            raise Unusable(f"slices of different {what}")
    row, column = np.reshape(_numbers(tags[files[0]][ORIENTATION]), (2, 3))
    normal = np.cross(row, column)
    positions = np.array([_numbers(tags[f][POSITION]) for f in files])
    along = positions @ normal
    order = np.argsort(along, kind="stable")
    steps = np.diff(along[order])
    usual = float(np.median(steps))
    allowed = max(UNEVEN * usual, ROUNDED_MM)
    if steps.min() < min(ROUNDED_MM, usual / 2):
        raise Unusable(f"{int((steps < ROUNDED_MM).sum()) + 1} slices at positions of others: several volumes in one series")
    if steps.max() - usual > allowed or usual - steps.min() > allowed:
        raise Unusable(f"slices missing or uneven: {steps.min():.4g} to {steps.max():.4g} mm apart, mostly {usual:.4g}")
    aside = positions - positions[order[0]] - np.outer(along - along[order[0]], normal)
    if np.linalg.norm(aside, axis=1).max() > 0.5 * max(allowed, ROUNDED_MM) + 0.01 * np.ptp(along):
        raise Unusable("slices shifted against each other (a tilted gantry)")
    return [files[i] for i in order]


def _distance(ordered: Sequence[str]) -> float:
    ends = [np.array(_numbers(_tags(f, (POSITION,))[POSITION])) for f in (ordered[0], ordered[-1])]
    return float(np.linalg.norm(ends[1] - ends[0]) / (len(ordered) - 1))


def _tags(file: str, wanted: Sequence[str]) -> dict[str, str]:
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(file)
    try:
        with _same_locale():
            reader.ReadImageInformation()
    except RuntimeError:
        return {}
    return {tag: reader.GetMetaData(tag).strip() for tag in wanted if reader.HasMetaDataKey(tag)}


@contextlib.contextmanager
def _same_locale() -> Iterator[None]:
    """GDCM sets the process's locale to C, in which Python reads and writes text as ASCII from then on."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)


def _numbers(text: str) -> list[float]:
    try:
        return [float(n) for n in text.split("\\") if n]
    except ValueError:
        return []


def _syntax(file: str) -> str:
    """The transfer syntax, which says how the voxels are packed."""
    with open(file, "rb") as f:
        found = re.search(rb"\x02\x00\x10\x00UI..([0-9.]+)", f.read(2048), re.DOTALL)
    return f" (transfer syntax {found.group(1).decode()})" if found else ""


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:10]
