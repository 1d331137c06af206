"""Image files through nnU-Net's readers, and what those readers do not notice.

SimpleITK returns uninitialised memory for the missing part of a truncated ``.nii.gz`` or ``.gipl``, and 0 for NaN and Inf in
a ``.nii.gz``, without an error. So the file is looked at first: its compressed stream is read to the end, it must hold as many
bytes as its header promises, and its voxels must be numbers.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import math
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import SimpleITK as sitk
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES

MAX_VOXELS = 2 * 10**9
MAX_AXIS = 8192
MIN_AXIS = 5  # fewer slices are a scout or a 2D image
GIPL_HEADER = 256  # bytes
SPACING_MM = (0.001, 50.0)


class Unusable(ValueError):
    """A file that cannot be pretrained on; the message is its reason in ``rejected.csv``."""


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


@dataclass(frozen=True)
class Header:
    """``shape`` and ``spacing`` as stored (order of the format), ``bytes`` of the file without compression. Of a NIfTI with
    floating-point voxels also their ``type`` and where they begin.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    bytes: int
    type: np.dtype | None = None
    offset: int = 0


def read_images(files: Sequence[str]) -> tuple[np.ndarray, dict[str, Any]]:
    """``(C, I, J, K)`` float32, one channel per file, and nnU-Net's properties (``spacing`` in array order).

    Raises:
        Unusable: empty, truncated, not a volume, absurd in size or spacing, unreadable, or channels that differ in shape.
    """
    for file in files:
        _check_file(file)
    ending = ending_of(files[0])
    assert ending is not None, f"{files[0]}: not one of {ENDINGS}"
    problem = ""
    for reader in readers(ending):  # SimpleITK refuses skewed NIfTI directions, nibabel reads them: nnU-Net's own fallback
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # readers print what they also raise
                images, properties = reader().read_images(tuple(files))
        except Exception as e:  # noqa: BLE001  every reader has errors of its own
            problem = problem or (one_line(e) if str(e) else "channels differ in shape or spacing")
            continue
        if len(images) != len(files):
            raise Unusable(f"4D: {len(images)} volumes in {len(files)} file(s)")
        return images, properties
    raise Unusable(problem)


def _check_file(file: str) -> None:
    """Raise Unusable for what can be seen without decoding voxels."""
    try:
        size = os.path.getsize(file)
    except OSError as e:
        raise Unusable(f"cannot be opened: {e.strerror}") from None
    if size == 0:
        raise Unusable("empty file")
    try:
        header = _read_header(file)
    except Exception as e:  # noqa: BLE001
        raise Unusable(f"unreadable header: {one_line(e)}") from None
    check_geometry(header.shape, header.spacing)
    payload = _unpacked_size(file, header) if file.lower().endswith(".gz") else size
    if not _may_be_compressed(file) and payload < header.bytes:
        raise Unusable(f"truncated: {payload} bytes, {header.bytes} expected")


def check_geometry(shape: Sequence[int], spacing: Sequence[float]) -> None:
    """Raise Unusable unless this is one volume of sane size."""
    shape = tuple(shape)
    while len(shape) > 3 and shape[-1] == 1:  # a trailing axis of one is no fourth dimension
        shape = shape[:-1]
    listed = "x".join(map(str, shape))
    if len(shape) > 3:
        raise Unusable(f"4D: shape {listed}")
    if len(shape) < 3 or min(shape) < MIN_AXIS:
        raise Unusable(f"not a volume: shape {listed}, at least {MIN_AXIS} voxels along every axis expected")
    if math.prod(shape) > MAX_VOXELS or max(shape) > MAX_AXIS:
        raise Unusable(f"absurd size: shape {listed}, at most {MAX_AXIS} per axis and {MAX_VOXELS:.0e} voxels expected")
    if not all(SPACING_MM[0] <= abs(s) <= SPACING_MM[1] for s in spacing):  # also false for NaN
        listed = "x".join(f"{s:g}" for s in spacing)
        raise Unusable(f"absurd spacing: {listed} mm, {SPACING_MM[0]:g} to {SPACING_MM[1]:g} expected")


def _read_header(file: str) -> Header:
    ending = ending_of(file)
    if ending in (".nii", ".nii.gz"):
        import nibabel

        image: Any = nibabel.load(file)
        shape = tuple(int(n) for n in image.shape)
        header = image.header
        offset, stored = int(image.dataobj.offset), header.get_data_dtype()
        size = offset + math.prod(shape) * stored.itemsize
        spacing = tuple(map(float, header.get_zooms()[:3]))
        return Header(shape, spacing, size, stored if stored.kind == "f" else None, offset)
    if ending in (".tif", ".tiff"):
        import tifffile

        with tifffile.TiffFile(file) as tif:
            shape = tuple(int(n) for n in tif.series[0].shape)
        return Header(shape, (1.0, 1.0, 1.0), 0)
    reader = sitk.ImageFileReader()
    reader.SetFileName(file)
    reader.ReadImageInformation()
    shape = reader.GetSize() + ((reader.GetNumberOfComponents(),) if reader.GetNumberOfComponents() > 1 else ())
    size = GIPL_HEADER + math.prod(shape) * _bytes_per_voxel(reader.GetPixelID())
    return Header(shape, reader.GetSpacing(), size)


def _bytes_per_voxel(pixel: int) -> int:
    for bits in (64, 32, 16, 8):
        if str(bits) in sitk.GetPixelIDValueAsString(pixel):
            return bits // 8
    return 1


def _may_be_compressed(file: str) -> bool:
    return ending_of(file) in (".nrrd", ".mha", ".tif", ".tiff")  # their readers notice a missing end themselves


def _unpacked_size(file: str, header: Header) -> int:
    """Bytes in a gzip file, whose checksum and voxels are verified on the way."""
    bad = 0
    try:
        with gzip.open(file, "rb") as f:
            total = len(f.read(header.offset))
            while block := f.read(1 << 22):
                total += len(block)
                if header.type is not None:
                    whole = len(block) // header.type.itemsize * header.type.itemsize
                    bad += int(np.count_nonzero(~np.isfinite(np.frombuffer(block[:whole], header.type))))
    except EOFError:
        raise Unusable("truncated: the compressed data ends early") from None
    except (OSError, zlib.error) as e:
        raise Unusable(f"damaged: {one_line(e)}") from None
    if bad:
        raise Unusable(not_finite(bad))
    return total


def not_finite(voxels: int) -> str:
    """The reason for a file with that many voxels that are no numbers."""
    return f"NaN or Inf in {voxels} voxels"


def one_line(error: Exception) -> str:
    """The end of a message, where the cause stands, without paths and without the addresses in memory that ITK adds."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"\(0x[0-9a-f]+\)|[\"']?(/[^ :\"']+)+[\"']?", "", text.split("ERROR: ")[-1])[-160:].strip()
