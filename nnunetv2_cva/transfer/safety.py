"""What is looked at before memory is spent on a file of weights, and before its numbers are believed."""

from __future__ import annotations

import pickletools
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

DEPTH = 60  # containers within each other
ENTRIES = 2_000_000  # of all containers, each counted as often as it is mentioned
LEGACY = 5  # pickles at the beginning of a file from before PyTorch 1.6; what follows are numbers
# Called with a length, or with a tensor whose many numbers are one that is stored.
ALLOCATING = {"builtins.bytearray", "__builtin__.bytearray"} | {
    f"torch._utils._rebuild_device_tensor_from_{source}" for source in ("cpu_tensor", "numpy")
}
_KINDS: tuple[torch.dtype, ...] = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def check_archive(path: Path) -> None:
    """That an archive is as ``torch.save`` writes it and that every checksum in it is right. Does nothing for other files.

    Raises:
        ValueError: packed again with compression, entries larger than the file, or an entry whose checksum is wrong; names it.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(e.compress_type != zipfile.ZIP_STORED for e in entries):
                raise ValueError(
                    f"{path} was packed again with compression. PyTorch reads what torch.save has written: unpack it and pack it "
                    "without compression (zip -0), or get the file as it was."
                )
            stated = sum(e.file_size for e in entries)
            if stated > path.stat().st_size:
                raise ValueError(f"{path} states {stated:,} bytes of content and has {path.stat().st_size:,}: it is damaged.")
            unchecked = all(e.CRC == 0 for e in entries)  # torch.save without checksums
            wrong = None if unchecked else archive.testzip()
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError, struct.error, EOFError, OverflowError) as e:
        raise ValueError(f"{path} cannot be read as a checkpoint (truncated, or another kind of file): {e}") from None
    if wrong is not None:
        raise ValueError(f"{path} is damaged: {wrong} in it is not what was written. Get the file again.")


def check_calls(path: Path) -> None:
    """That opening the file calls nothing that PyTorch lets files call and that takes any amount of memory they ask for.

    Raises:
        ValueError: it does; names it.
    """
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as f:
            for _ in range(LEGACY):
                _look_through(f, path)
        return
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.rpartition("/")[2] == "data.pkl":
                with archive.open(name) as f:
                    _look_through(f, path)


def _look_through(stream: IO[bytes], path: Path) -> None:
    """The names in the pickle that begins here. One that is damaged is left to those who read it."""
    called = set()
    try:
        called = {str(arg).replace(" ", ".") for op, arg, _ in pickletools.genops(stream) if op.name in ("GLOBAL", "INST")}
    except Exception:  # the bytes decide what goes wrong
        return
    if found := sorted(called & ALLOCATING):
        raise ValueError(
            f"{path} calls {found[0]} when it is opened, which may take more memory than there is. Expected plain numbers, as a "
            "network's state dict has them."
        )


def check_containers(content: Any, path: Path) -> None:
    """That what was read is no more than it seems.

    Raises:
        ValueError: containers too deep, in a circle, or that mention each other so often that walking through takes forever.
    """
    sizes: dict[int, int] = {}
    stack: list[tuple[Any, bool]] = [(content, False)]
    open_now: set[int] = set()
    while stack:
        value, done = stack.pop()
        children = value.values() if isinstance(value, Mapping) else value
        if done:
            sizes[id(value)] = 1 + sum(sizes.get(id(c), 1) for c in children)
            open_now.discard(id(value))
            if sizes[id(value)] > ENTRIES:
                raise ValueError(f"{path} holds containers with more than {ENTRIES:,} entries: it is no checkpoint of a network.")
        elif isinstance(value, (Mapping, list, tuple, set, frozenset)) and id(value) not in sizes:
            if id(value) in open_now or len(open_now) > DEPTH:
                raise ValueError(f"{path} holds over {DEPTH} containers within each other: it is no checkpoint of a network.")
            open_now.add(id(value))
            stack.append((value, True))
            stack.extend((c, False) for c in children)


def check_tensors(weights: Mapping[Any, Any], path: Path) -> None:
    """That every tensor is a plain one that lies in the file as it is.

    Raises:
        ValueError: sparse, nested, quantised, without content (meta), of odd numbers, or larger than what is stored of it.
    """
    for key, value in weights.items():
        if not isinstance(value, Tensor):
            continue
        found = None
        if value.device.type == "meta":
            found = "a tensor without content (meta)"
        elif value.is_nested or value.layout != torch.strided:
            found = f"a {'nested' if value.is_nested else 'sparse'} tensor"
        elif value.is_quantized or value.dtype not in _KINDS:
            found = f"a tensor of {str(value.dtype).removeprefix('torch.')}"
        elif value.numel() * value.element_size() > value.untyped_storage().nbytes():
            found = f"a tensor of {value.numel():,} numbers of which {value.untyped_storage().nbytes():,} bytes are stored"
        if found is not None:
            raise ValueError(f"{path}: {key} is {found}. Expected plain numbers, as a network's state dict has them.")
