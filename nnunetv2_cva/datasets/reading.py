"""Image files through nnU-Net's readers, and what those readers do not notice."""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import SimpleITK as sitk
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES

from nnunetv2_cva.datasets.dicom import is_dicom, read_series
from nnunetv2_cva.datasets.formats import Unusable, check_voxels, one_line, read_header, spacing_beside
from nnunetv2_cva.sizes import by

MAX_VOXELS = 2 * 10**9
MAX_AXIS = 8192
MIN_AXIS = 5  # fewer slices are a scout or a 2D image
SPACING_MM = (0.001, 50.0)
REMARK = 300  # characters of what a reader prints


def readers(ending: str) -> list[type[BaseReaderWriter]]:
    """nnU-Net's readers of volumes for a file ending, in nnU-Net's order of preference."""
    return [r for r in LIST_OF_IO_CLASSES if ending.lower() in r.supported_file_endings and r.__name__ != "NaturalImage2DIO"]


# .png and .bmp are read by nnU-Net, too, but hold no volumes. Longer endings first: .nii.gz before .gz's like.
ENDINGS = tuple(
    sorted({e for r in LIST_OF_IO_CLASSES for e in r.supported_file_endings if readers(e)}, key=lambda e: (-len(e), e))
)


def ending_of(path: str) -> str | None:
    """The ending by which nnU-Net would choose a reader, or None."""
    return next((e for e in ENDINGS if path.lower().endswith(e)), None)


def ending_for(path: str) -> str:
    """The ending of the format in which nnU-Net would get this image: of DICOM, which it does not read, a NIfTI's."""
    return ending_of(path) or ".nii.gz"


@dataclass(frozen=True)
class Read:
    """``images`` (C, I, J, K) float32, one channel per file; nnU-Net's ``properties`` (``spacing`` in array order); ``remark``:
    what is odd, in one line, else empty."""

    images: np.ndarray
    properties: dict[str, Any]
    remark: str = ""


def read_images(files: Sequence[str]) -> Read:
    """A case.

    Raises:
        Unusable: empty, truncated, damaged, no volume, absurd in size or spacing, unreadable, or channels that differ in shape
            or position.
    """
    if is_dicom(files[0]):
        return Read(*read_series(files[0]))
    for file in files:
        _check_file(file)
    ending, problem, printed = ending_of(files[0]) or "", "", io.StringIO()
    # SimpleITK refuses skewed NIfTI directions, nibabel reads them: nnU-Net's own fallback.
    for reader in readers(ending):
        try:
            with contextlib.redirect_stdout(printed):  # readers print what they also raise
                images, properties = reader().read_images(tuple(files))
        except MemoryError:
            raise
        except Exception as e:  # noqa: BLE001  every reader has errors of its own
            what = f"nnU-Net's {reader.__name__} cannot read it: {one_line(e)}"
            problem = problem or (what if str(e) else "channels differ in shape or spacing")
            continue
        if len(images) != len(files):
            raise Unusable(f"4D: {len(images)} volumes in {len(files)} file(s)")
        if len(files) > 1:
            check_aligned(files, images.shape[1:])
        return Read(images, *_as_it_should_be(files[0], ending, properties, printed.getvalue()))
    raise Unusable(problem)


def _as_it_should_be(file: str, ending: str, properties: dict[str, Any], printed: str) -> tuple[dict[str, Any], str]:
    """The reader's properties, with a TIFF's spacing, and what it has printed."""
    if ending in (".tif", ".tiff"):
        spacing = spacing_beside(file)
        if spacing is None:
            return properties, "no JSON file with its spacing beside it: taken for 1x1x1 mm"
        return {**properties, "spacing": list(spacing)}, ""
    warnings = [line for line in printed.splitlines() if "WARNING" in line]  # the lines after it differ from case to case
    return properties, " ".join((" ".join(warnings) or printed).split())[:REMARK]


def check_aligned(files: Sequence[str], shape: Sequence[int]) -> None:
    """Raise Unusable unless the corners of all channels lie where those of the first one lie, to a tenth of a voxel."""
    placed = [_affine(file) for file in files]
    if any(p is None for p in placed):  # TIFF has no position
        return
    corners = np.array([(i, j, k, 1) for i in (0, shape[2]) for j in (0, shape[1]) for k in (0, shape[0])], dtype=float)
    first = placed[0]
    voxel = np.linalg.norm(first[:3, :3], axis=0).min()
    for file, other in zip(files[1:], placed[1:]):
        apart = np.linalg.norm((corners @ first.T - corners @ other.T)[:, :3], axis=1).max()
        if apart > 0.1 * voxel:
            name = os.path.basename(file)
            what = "direction" if not np.allclose(first[:3, :3], other[:3, :3], atol=1e-3) else "origin"
            raise Unusable(f"channels differ in position: {name} lies up to {apart:.3g} mm from the first one ({what})")


def _affine(file: str) -> Any:
    """(4, 4), from voxel indices in the order of the file to mm; None for formats without a position."""
    if (ending_of(file) or "") in (".tif", ".tiff"):
        return None
    reader = sitk.ImageFileReader()
    reader.SetFileName(file)
    try:
        reader.ReadImageInformation()
    except RuntimeError:  # skewed directions, read by nibabel
        import nibabel

        return np.asarray(nibabel.load(file).affine)  # type: ignore[attr-defined]
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(reader.GetDirection(), (reader.GetDimension(),) * 2)[:3, :3] * np.array(reader.GetSpacing()[:3])
    matrix[:3, 3] = reader.GetOrigin()[:3]
    return matrix


def _check_file(file: str) -> None:
    """Raise Unusable for what can be seen before nnU-Net's readers see the file."""
    try:
        os.fsencode(file).decode("utf-8")
    except UnicodeDecodeError:  # SimpleITK ends the whole process
        raise Unusable("its name is not UTF-8: rename it") from None
    ending = ending_of(file)
    if ending is None:
        raise Unusable(f"not a format that nnU-Net reads as a volume ({', '.join(ENDINGS)}), and no DICOM")
    try:
        size = os.path.getsize(file)
    except OSError as e:
        raise Unusable(f"cannot be opened: {e.strerror}") from None
    if size == 0:
        raise Unusable("empty file")
    try:
        header = read_header(file, ending)
    except (Unusable, MemoryError):
        raise
    except Exception as e:  # noqa: BLE001  every library has errors of its own
        raise Unusable(f"unreadable header: {one_line(e)}") from None
    check_geometry(header.shape, header.spacing)
    check_voxels(file, header)


def check_geometry(shape: Sequence[int], spacing: Sequence[float]) -> None:
    """Raise Unusable unless this is one volume of sane size."""
    shape = tuple(shape)
    while len(shape) > 3 and shape[-1] == 1:  # a trailing axis of one is no fourth dimension
        shape = shape[:-1]
    listed = by(shape)
    if len(shape) > 3:
        raise Unusable(f"4D: shape {listed}")
    if len(shape) < 3 or min(shape) < MIN_AXIS:
        raise Unusable(f"not a volume: shape {listed}, at least {MIN_AXIS} voxels along every axis expected")
    if math.prod(shape) > MAX_VOXELS or max(shape) > MAX_AXIS:
        raise Unusable(f"absurd size: shape {listed}, at most {MAX_AXIS} per axis and {MAX_VOXELS:.0e} voxels expected")
    if not all(SPACING_MM[0] <= abs(s) <= SPACING_MM[1] for s in spacing):  # also false for NaN
        raise Unusable(f"absurd spacing: {by(spacing)} mm, {SPACING_MM[0]:g} to {SPACING_MM[1]:g} expected")
