"""What the formats that nnU-Net reads say about a file before it is read, and whether its voxels are whole.

SimpleITK returns uninitialised memory for the missing part of a truncated ``.nii.gz`` or ``.gipl``, whatever came out of a
damaged compressed ``.mha`` or ``.nrrd``, and 0 for NaN and Inf in a ``.nii.gz``, without an error. So the file is looked at
first: its compressed stream is read to the end, where its checksum stands, it must hold as many bytes as its header promises, and
its voxels must be numbers.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import math
import os
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import SimpleITK as sitk

from nnunetv2_cva.files import read_object

GIPL_HEADER = 256  # bytes
BLOCK = 1 << 22
GZIP = b"\x1f\x8b"
MILLIMETRES = {"micron": 1e-3, "meter": 1e3}  # in one of the unit
PACKINGS = {"raw": "", "gzip": "gzip", "gz": "gzip", "bzip2": "bzip2", "bz2": "bzip2"}  # of NRRD


class Unusable(ValueError):
    """A file that cannot be pretrained on; the message is its reason in ``rejected.csv``."""


@dataclass(frozen=True)
class Header:
    """``shape`` and ``spacing`` as stored, in the order of the format.

    The voxels take ``bytes`` from ``offset`` on in a stream that begins at byte ``begin`` of the file and is packed by
    ``packing`` ("": not at all). ``bytes`` is None where the header does not tell. ``floats``: type of the voxels of a NIfTI
    with floating-point voxels.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    bytes: int | None = None
    begin: int = 0
    packing: str = ""
    offset: int = 0
    floats: np.dtype | None = None


def read_header(file: str, ending: str) -> Header:
    """Raises Unusable for voxels that are complex numbers, and whatever the format's library raises for a bad header."""
    if ending in (".nii", ".nii.gz"):
        return _nifti(file, ending)
    if ending in (".tif", ".tiff"):
        return _tiff(file, ending)
    reader = sitk.ImageFileReader()
    reader.SetFileName(file)
    reader.ReadImageInformation()
    voxel = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    _refuse_complex("complex" in voxel)
    shape = reader.GetSize() + ((reader.GetNumberOfComponents(),) if reader.GetNumberOfComponents() > 1 else ())
    size = math.prod(shape) * max([int(bits) // 8 for bits in re.findall(r"\d+", voxel)], default=1)
    if ending == ".gipl":
        return Header(shape, reader.GetSpacing(), size, offset=GIPL_HEADER)
    place = (_metaimage_voxels if ending == ".mha" else _nrrd_voxels)(file)
    return Header(shape, reader.GetSpacing()) if place is None else Header(shape, reader.GetSpacing(), size, *place)


def _refuse_complex(found: bool) -> None:
    if found:
        raise Unusable("its voxels are complex numbers, of which only the real part would be used")


def _nifti(file: str, ending: str) -> Header:
    """SimpleITK and we take spacings in the unit that the header states. A ``.nii.gz`` need not be compressed."""
    import nibabel

    packing = "gzip" if ending == ".nii.gz" and _begins(file, GZIP) else ""
    with gzip.open(file) if packing else open(file, "rb") as f:
        start = f.read(540)  # bytes of the longer one of the two headers
    size = struct.unpack("<i", start[:4])[0]
    kind = nibabel.Nifti2Header if size in (540, struct.unpack(">i", struct.pack("<i", 540))[0]) else nibabel.Nifti1Header
    header: Any = kind(start[: kind.sizeof_hdr], check=False)
    if not bytes(header["magic"]).startswith((b"n+1", b"n+2")):
        raise ValueError("it is no NIfTI with header and voxels in one file")
    stored = header.get_data_dtype()
    _refuse_complex(stored.kind == "c")
    scale = MILLIMETRES.get(header.get_xyzt_units()[0], 1.0)
    # Of a spacing of 0 nibabel and SimpleITK make 1 mm: as it stands in the header it is found.
    spacing = tuple(float(s) * scale for s in header["pixdim"][1:4])
    shape = tuple(int(n) for n in header.get_data_shape())
    size, offset = math.prod(shape) * stored.itemsize, int(header.get_data_offset())
    return Header(shape, spacing, size, 0, packing, offset, stored if stored.kind == "f" else None)


def _begins(file: str, with_: bytes) -> bool:
    with open(file, "rb") as f:
        return f.read(len(with_)) == with_


def _tiff(file: str, ending: str) -> Header:
    """Its library reads it to the end. The spacing stands in a file of its own."""
    import tifffile

    with tifffile.TiffFile(file) as tif:
        shape = tuple(int(n) for n in tif.series[0].shape)
        _refuse_complex(tif.series[0].dtype.kind == "c")
    return Header(shape, spacing_beside(file) or (1.0, 1.0, 1.0))


def spacing_beside(file: str) -> tuple[float, float, float] | None:
    """What the JSON file beside a TIFF says, in mm; None without one. nnU-Net's reader takes the last five characters of every
    name for a channel number; here they are one only where they are ``_0000`` or the like.

    Raises:
        Unusable: the JSON file says something else.
    """
    stem = os.path.splitext(file)[0]
    beside = next((f for f in (f"{re.sub(r'_[0-9]{4}$', '', stem)}.json", f"{stem}.json") if os.path.isfile(f)), None)
    if beside is None:
        return None
    try:
        i, j, k = map(float, read_object(beside)["spacing"])
    except (ValueError, KeyError, TypeError):  # no JSON, no "spacing", not three numbers
        name = os.path.basename(beside)
        raise Unusable(f'the spacing beside it cannot be read: expected {{"spacing": [i, j, k]}} in {name}') from None
    return i, j, k


def _metaimage_voxels(file: str) -> tuple[int, str] | None:
    """Where the voxels of an ``.mha`` begin and how they are packed; None where they are text or in another file."""
    fields: dict[str, str] = {}
    with open(file, "rb") as f:
        for line in f:
            key, _, value = line.decode("latin-1").partition("=")
            fields[key.strip().lower()] = value.strip().lower()
            if "elementdatafile" in fields:
                break
        begin = f.tell()
    if fields.get("elementdatafile") != "local" or fields.get("binarydata", "true") != "true" or "headersize" in fields:
        return None
    return begin, "zlib" if fields.get("compresseddata") == "true" else ""


def _nrrd_voxels(file: str) -> tuple[int, str] | None:
    """Where the voxels of a ``.nrrd`` begin and how they are packed; None where they are text or in another file."""
    fields: dict[str, str] = {}
    with open(file, "rb") as f:
        for line in f:
            if not line.strip():
                break
            key, _, value = line.decode("latin-1").partition(":")
            fields[key.strip().lower().replace(" ", "")] = value.strip().lower()
        begin = f.tell()
    packing = PACKINGS.get(fields.get("encoding", ""))
    if packing is None or {"datafile", "byteskip", "lineskip"} & set(fields):
        return None
    return begin, packing


def check_voxels(file: str, header: Header) -> None:
    """Raise Unusable unless the file holds all the voxels that its header promises, undamaged where a checksum tells."""
    if header.bytes is None:
        return
    total, bad = os.path.getsize(file) - header.begin, 0
    if header.packing:
        try:
            with _unpacked(file, header) as stream:
                total = len(stream.read(header.offset))
                while block := stream.read(BLOCK):
                    total += len(block)
                    bad += _not_numbers(block, header.floats)
        except EOFError:
            raise Unusable("truncated: the compressed data ends early") from None
        except (OSError, zlib.error) as e:
            raise Unusable(f"damaged: {one_line(e)}") from None
    if bad:
        raise Unusable(not_finite(bad))
    if total < header.offset + header.bytes:
        raise Unusable(f"truncated: {total} bytes, {header.offset + header.bytes} expected")


def _not_numbers(block: bytes, floats: np.dtype | None) -> int:
    if floats is None:
        return 0
    whole = len(block) // floats.itemsize * floats.itemsize
    return int(np.count_nonzero(~np.isfinite(np.frombuffer(block[:whole], floats))))


@contextlib.contextmanager
def _unpacked(file: str, header: Header) -> Iterator[IO[bytes]]:
    """The unpacked stream; reading to its end verifies the checksum. Reading raises EOFError where it ends early."""
    with open(file, "rb") as f:
        f.seek(header.begin)
        stream: Any = f
        if header.packing in ("zlib", "gzip"):
            stream = io.BufferedReader(_Zlib(f))
        elif header.packing == "bzip2":
            stream = bz2.BZ2File(f)
        yield stream


class _Zlib(io.RawIOBase):
    """A zlib stream or gzip members in a file, which is not closed with it. As its readers, it ignores what follows them."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)  # either kind of header, as MetaIO reads them
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest and not self._ended():
            if self._rest:
                break  # of the next member
            packed = self._inflater.unconsumed_tail or self._file.read(1 << 16)
            if not packed:
                raise EOFError
            self._rest = self._inflater.decompress(packed, BLOCK)
        taken, self._rest = self._rest[: len(buffer)], self._rest[len(buffer) :]
        buffer[: len(taken)] = taken
        return len(taken)

    def _ended(self) -> bool:
        if not self._inflater.eof:
            return False
        behind = self._inflater.unused_data or self._file.read(1 << 16)
        if not behind.startswith(GZIP):
            return True
        self._inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)
        self._rest = self._inflater.decompress(behind, BLOCK)
        return False


def not_finite(voxels: int) -> str:
    """The reason for a file with that many voxels that are no numbers."""
    return f"NaN or Inf in {voxels} voxels"


def one_line(error: Exception) -> str:
    """The end of a message, where the cause stands, without paths and without the addresses in memory that ITK adds."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"\(0x[0-9a-f]+\)|[\"']?(/[^ :\"']+)+[\"']?", "", text.split("ERROR: ")[-1])[-160:].strip()
