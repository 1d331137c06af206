"""One look at every case before anything is written: can it be used, what is in it, has it been seen before."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunetv2_cva.datasets.dicom import files_of, is_dicom
from nnunetv2_cva.datasets.formats import Unusable, not_finite, one_line
from nnunetv2_cva.datasets.reading import MIN_AXIS, check_geometry, ending_of, read_images
from nnunetv2_cva.datasets.sources import Candidate
from nnunetv2_cva.sizes import by

TOO_LARGE = "does not fit into memory"
KILLED = "reading it ended the process, most often because memory ran out"
LABEL_MAP_VALUES = 16  # an "image" with no more different values, all whole numbers, is a segmentation
FEW_VALUES = 64  # with so many it may be one
MANY_LABELS = 1024  # a segmentation has no more; it is known by areas of one value
ONE_AREA = 0.8  # of the neighbouring voxels that are not both 0 have the same value, in a segmentation
LEAST_BODY = 0.02  # of the voxels; fewer bright ones are metal or damage
DWARFED = 10  # a standard deviation so many times that of all but the most extreme thousandth: little is seen beside these
STATISTICS_SIZE = 64  # voxels per axis that intensity statistics are taken from
# Where the distribution of the body's intensities is noted: dense at the tails, which nnU-Net clips CT at.
QUANTILES = (
    0,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.3,
    0.4,
    0.5,
    0.6,
    0.7,
    0.8,
    0.9,
    0.95,
    0.98,
    0.99,
    0.995,
    0.9975,
    0.999,
    1,
)


@dataclass(frozen=True)
class Finding:
    """What was found in one case. ``reason`` is empty for a case that can be used; the rest is then filled in.

    ``stamp``: size and time of change of every file; ``shape``, ``cropped``: voxels in the reader's axis order, before and after
    cropping to what is not zero; ``content``: hash of the voxels; ``intensities``: one entry per channel, of the body;
    ``remark``: what is odd about a case that is used all the same. Of a case that is preprocessed already there are ``shape``,
    with its channels in front, and, if its voxels were read, ``content``.
    """

    key: str
    files: tuple[str, ...]
    dataset: str
    subject: str
    modality: str
    stamp: tuple[tuple[int, int], ...]
    reason: str = ""
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    cropped: tuple[int, ...] = ()
    content: str = ""
    intensities: tuple[dict[str, Any], ...] = field(default=())
    remark: str = ""

    @property
    def channels(self) -> int:
        return self.shape[0] if len(self.shape) == 4 else len(self.files)

    @property
    def identity(self) -> str:
        """By which a case is recognised under another name: its content, where that is known."""
        return self.content or self.key

    @property
    def settled(self) -> bool:
        """Whether looking again would find the same, as long as the files do not change."""
        return self.reason not in (TOO_LARGE, KILLED)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Finding:
        stamp = tuple(tuple(s) for s in values["stamp"])
        return Finding(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()} | {"stamp": stamp})

    def of(self, candidate: Candidate) -> Finding:
        """The same files under what the sources call them now."""
        return replace(self, key=candidate.key, dataset=candidate.dataset, subject=candidate.subject, modality=candidate.modality)


def stamp_of(files: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Size and time of change, to tell whether a file is the one that was looked at; (-1, -1) for a file that cannot be."""
    stamps = []
    for file in files:
        try:
            # A DICOM series is all files of its folder, whose own time changes when files come and go.
            several = not ending_of(file) and is_dicom(file)
            parts = [os.stat(f) for f in ((*files_of(file), os.path.dirname(file)) if several else (file,))]
            stamps.append((sum(s.st_size for s in parts), max(s.st_mtime_ns for s in parts)))
        except (OSError, Unusable):
            stamps.append((-1, -1))
    return tuple(stamps)


def looked_at(candidate: Candidate, describe: Callable[[Candidate], dict[str, Any]]) -> Finding:
    """The case with what ``describe`` says about it, or with the reason why it cannot be used; never raises for a bad file."""
    c = candidate
    finding = Finding(c.key, c.files, c.dataset, c.subject, c.modality, stamp_of(c.files))
    try:
        return replace(finding, **describe(candidate))
    except Unusable as e:
        return replace(finding, reason=str(e))
    except MemoryError:
        return replace(finding, reason=TOO_LARGE)
    except Exception as e:  # noqa: BLE001  whatever is odd about one case, the others go on
        return replace(finding, reason=f"{type(e).__name__}: {one_line(e)}")


def killed(candidate: Candidate) -> Finding:
    """The finding of a case whose reading ended the process."""
    c = candidate
    return Finding(c.key, c.files, c.dataset, c.subject, c.modality, stamp_of(c.files), KILLED)


def inspect_case(candidate: Candidate) -> Finding:
    """Read the images of the case and describe them; never raises for a bad file."""
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    return looked_at(candidate, _describe)


def _describe(candidate: Candidate) -> dict[str, Any]:
    read = read_images(candidate.files)
    images, remarks = read.images, [read.remark]
    spacing = tuple(float(s) for s in read.properties["spacing"])
    check_geometry(images.shape[1:], spacing)
    for image in images:
        remarks.append(_check_voxels(image))
    box = nonzero_box(images)
    cropped = tuple(b - a for a, b in box)
    if min(cropped) < MIN_AXIS:
        raise Unusable(f"next to nothing in it: what is not zero takes {by(cropped)} voxels, at least {MIN_AXIS} each expected")
    inner = images[(slice(None), *[slice(a, b) for a, b in box])]
    return {
        "shape": tuple(images.shape[1:]),
        "spacing": spacing,
        "cropped": cropped,
        "content": content_hash(images),
        "intensities": tuple(_intensities(image) for image in inner),
        "remark": "; ".join(dict.fromkeys(r for r in remarks if r)),
    }


def nonzero_box(images: np.ndarray) -> list[tuple[int, int]]:
    """What nnU-Net's ``crop_to_nonzero`` crops to (it also fills holes, which takes seconds and does not move the box)."""
    mask = images[0] != 0
    for image in images[1:]:
        mask |= image != 0
    hits = [np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    return [(int(h[0]), int(h[-1]) + 1) for h in hits]


def content_hash(images: np.ndarray) -> str:
    """Of the voxels as the reader gives them: the same image in another format or compression has the same hash."""
    digest = hashlib.sha256(repr(images.shape).encode())
    digest.update(np.ascontiguousarray(images).data)
    return digest.hexdigest()


def _check_voxels(image: np.ndarray) -> str:
    """What is odd about an image that can be used. Raises Unusable for one that cannot be."""
    low, high = float(image.min()), float(image.max())  # both NaN where there is a NaN
    if not (math.isfinite(low) and math.isfinite(high)):
        raise Unusable(not_finite(int(np.size(image) - np.count_nonzero(np.isfinite(image)))))
    if low == high:
        raise Unusable(f"all voxels are {low:g}")
    some = np.unique(coarse(image))
    if len(some) > MANY_LABELS or (some % 1).any() or (image % 1).any():
        return ""
    if len(some) <= FEW_VALUES:
        some = np.unique(image)
    if len(some) <= LABEL_MAP_VALUES:
        raise Unusable(f"looks like a segmentation: only {len(some)} different values, all whole numbers")
    if len(some) <= MANY_LABELS and _same_as_neighbours(image) >= ONE_AREA:
        raise Unusable(f"looks like a segmentation: {len(some)} different values, all whole numbers, each in areas of its own")
    if len(some) <= FEW_VALUES:
        return f"may be a segmentation: only {len(some)} different values, all whole numbers"
    return ""


def _same_as_neighbours(image: np.ndarray) -> float:
    """Of neighbours along each axis that are not both 0, how many have the same value; seen in every n-th row."""
    same = of = 0
    for axis in range(3):
        step = tuple(slice(None, None, 1 if a == axis else max(1, n // STATISTICS_SIZE)) for a, n in enumerate(image.shape))
        rows = np.moveaxis(image[step], axis, 0)
        seen = (rows[1:] != 0) | (rows[:-1] != 0)
        same += int(np.count_nonzero(seen & (rows[1:] == rows[:-1])))
        of += int(np.count_nonzero(seen))
    return same / of if of else 0.0


def coarse(image: np.ndarray) -> np.ndarray:
    """Every n-th voxel, at most ``STATISTICS_SIZE`` to twice that along an axis."""
    return image[tuple(slice(None, None, max(1, n // STATISTICS_SIZE)) for n in image.shape)]


def _intensities(image: np.ndarray) -> dict[str, Any]:
    """Of the body, seen on a coarse grid. ``image`` is cropped.

    Raises:
        Unusable: there is next to nothing to see.
    """
    voxels = coarse(image)
    if voxels.min() == voxels.max():
        raise Unusable(f"all or nearly all voxels that are not air are {float(voxels.flat[0]):g}")
    with np.errstate(over="ignore"):
        spread = float(image.std())  # in float32, as nnU-Net's z-score has it: it may be infinite
    low, high = (float(q) for q in np.quantile(voxels, (0.001, 0.999)))
    quantiles = np.quantile(voxels[body_mask(voxels)], QUANTILES)
    return {
        "min": float(image.min()),
        "max": float(image.max()),
        "spread": spread,
        "usual": [low, high, float(np.clip(voxels, low, high).std(dtype=np.float64))],
        "quantiles": [float(f"{q:.6g}") for q in quantiles],
    }


def dwarfed(intensities: dict[str, Any]) -> str:
    """Why nothing would be seen in a channel that is normalised by all of its voxels; empty if something would."""
    spread, (low, high, usual) = intensities["spread"], intensities["usual"]
    if math.isfinite(spread) and spread <= DWARFED * usual:
        return ""
    return (
        f"a few voxels dwarf the others: {intensities['min']:.4g} to {intensities['max']:.4g}, but 99.8 % within {low:.4g} to "
        f"{high:.4g}; normalised by all voxels, nothing would be seen beside them"
    )


def body_mask(voxels: np.ndarray) -> np.ndarray:
    """What is brighter than air and what that encloses; neither metal nor single bright voxels are taken for all of it."""
    seen = voxels
    for _ in range(8):
        threshold = otsu(seen)
        bright = voxels > threshold
        if bright.mean() >= LEAST_BODY or seen.min() == threshold:
            break
        seen = np.minimum(seen, threshold)
        if seen.min() == seen.max():
            break
    return enclosed(bright)


def enclosed(mask: np.ndarray) -> np.ndarray:
    """``mask`` and what lies between parts of it along two or three axes: the lungs of a thorax, the ventricles of a brain."""
    between = [
        np.logical_or.accumulate(mask, axis) & np.flip(np.logical_or.accumulate(np.flip(mask, axis), axis), axis)
        for axis in range(mask.ndim)
    ]
    return mask | (np.sum(between, axis=0) >= 2)


def otsu(image: np.ndarray) -> float:
    """The threshold with the largest variance between the two classes that it makes (Otsu 1979). ``image`` is not constant."""
    low, high = np.quantile(image, (0.001, 0.999))  # a few bright voxels would leave one bin for the rest
    if low == high:
        low, high = image.min(), image.max()
    counts, edges = np.histogram(np.clip(image, low, high), bins=256)
    centres = (edges[:-1] + edges[1:]) / 2
    below, total = np.cumsum(counts), counts.sum()
    mass = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (mass[-1] * below / total - mass) ** 2 / (below * (total - below))
    return float(edges[1 + int(np.nanargmax(between[:-1]))])
