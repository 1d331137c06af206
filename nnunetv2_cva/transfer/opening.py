"""Checkpoint files, opened without executing anything in them."""

from __future__ import annotations

import importlib
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

# How files begin that torch.save has written: as zip archives, or before PyTorch 1.6 as pickles (of protocol 2 and later).
BEGINNINGS = (b"PK\x03\x04", b"\x80")


class NeedsOption(ValueError):
    """What an ``option`` of the commands would make possible; where there are no options, callers name another way.

    ``reason``: the message without the option.
    """

    def __init__(self, reason: str, option: str, advice: str) -> None:
        super().__init__(f"{reason} {advice}")
        self.reason, self.option = reason, option


def opened(path: str | Path, trust: bool = False, mapped: bool = True) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU. NumPy scalars, which nnU-Net's own checkpoints hold, are allowed.

    ``mapped``: tensors are read from the file when they are used; not where the file may be replaced before.

    Raises:
        ValueError: missing, truncated, no checkpoint; ``NeedsOption`` where code in it would be executed and it is not trusted.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist." if not path.exists() else f"{path} is not a file.")
    if not _beginning(path).startswith(BEGINNINGS):
        raise ValueError(f"{path} is not a checkpoint: PyTorch finds no saved object in it.")
    try:
        content = _load(path, trust, mapped)
    except pickle.UnpicklingError as e:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(e))
        if wanted is None and not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is not a checkpoint: PyTorch finds no saved object in it.") from None
        what = f"{wanted.group(1)}, which is code and not only weights" if wanted else "more than PyTorch opens as weights"
        raise NeedsOption(
            f"{path} holds {what}; opening it may execute anything.",
            "--trust",
            "If you trust where the file comes from, pass --trust.",
        ) from None
    except Exception as e:  # the unpickler is a machine run by the file's bytes: damaged ones make it raise anything
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise ValueError(f"{path} cannot be read as a checkpoint (truncated, or another kind of file): {reason}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a checkpoint: expected a dictionary, found {type(content).__name__}.")
    return content


def _beginning(path: Path) -> bytes:
    try:
        with open(path, "rb") as f:
            return f.read(4)
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e.strerror}.") from None


def _load(path: Path, trust: bool, mapped: bool) -> Any:
    options: dict[str, Any] = {"map_location": "cpu", "mmap": mapped and zipfile.is_zipfile(path)}
    if trust:
        return torch.load(path, weights_only=False, **options)
    with torch.serialization.safe_globals(_numpy_scalars()), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")  # the error that follows says it
        return torch.load(path, weights_only=True, **options)


def _numpy_scalars() -> list[Any]:
    """What a pickled NumPy scalar consists of, under the names of NumPy 1 and 2."""
    module = importlib.import_module("numpy._core.multiarray" if np.__version__ >= "2" else "numpy.core.multiarray")
    kinds = {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}
    names = ("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar")
    return [*((module.scalar, name) for name in names), np.dtype, *kinds]
