"""Files of weights: opened without executing anything in them, and written whole or not at all."""

from __future__ import annotations

import contextlib
import importlib
import json
import pickle
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunetv2_cva.files import read_object, written_whole
from nnunetv2_cva.transfer.hub import DESCRIPTIONS, located
from nnunetv2_cva.transfer.safety import check_archive, check_calls, check_containers

# How files begin that torch.save has written: as zip archives, or before PyTorch 1.6 as pickles (of protocol 2 and later).
BEGINNINGS = (b"PK\x03\x04", b"\x80")


class NeedsOption(ValueError):
    """What the argument ``option`` of the function that was called would make possible; a command adds its own way to say it."""

    def __init__(self, reason: str, option: str) -> None:
        super().__init__(reason)
        self.reason, self.option = reason, option


def opened(path: str | Path, trust: bool = False, mapped: bool = True) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU. NumPy scalars, which nnU-Net's own checkpoints hold, are allowed.

    ``mapped``: tensors are read from the file when they are used; not where the file may be replaced before.

    Raises:
        ValueError: missing, damaged, no checkpoint; ``NeedsOption`` where code in it would be executed and it is not trusted.
    """
    path = located(path, trust)
    if not path.is_file():
        raise ValueError(f"{path} does not exist." if not path.exists() else f"{path} is not a file.")
    if path.suffix == ".safetensors":
        return _from_safetensors(path)
    if not _beginning(path).startswith(BEGINNINGS):
        raise ValueError(f"{path} is not a checkpoint: PyTorch finds no saved object in it.")
    check_archive(path)
    if not trust:
        check_calls(path)
    try:
        content = _load(path, trust, mapped)
    except pickle.UnpicklingError as e:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(e))
        if wanted is None and not zipfile.is_zipfile(path):
            raise ValueError(f"{path} is not a checkpoint: PyTorch finds no saved object in it.") from None
        what = f"{wanted.group(1)}, which is code and not only weights" if wanted else "more than PyTorch opens as weights"
        raise NeedsOption(f"{path} holds {what}; opening it may execute anything.", "trust") from None
    except Exception as e:  # the unpickler is a machine run by the file's bytes: damaged ones make it raise anything
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise ValueError(f"{path} cannot be read as a checkpoint (truncated, or another kind of file): {reason}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a checkpoint: expected a dictionary, found {type(content).__name__}.")
    check_containers(content, path)
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
        warnings.filterwarnings("ignore", "Validating sparse tensor invariants")  # refused by safety.py
        warnings.filterwarnings("ignore", "Detected pickle protocol")  # the error that follows says it
        return torch.load(path, weights_only=True, **options)


def _numpy_scalars() -> list[Any]:
    """What a pickled NumPy scalar consists of, under the names of NumPy 1 and 2."""
    module = importlib.import_module("numpy._core.multiarray" if np.__version__ >= "2" else "numpy.core.multiarray")
    kinds = {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}
    names = ("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar")
    return [*((module.scalar, name) for name in names), np.dtype, *kinds]


ALIASES = "aliases"  # in the header of a safetensors file: names of one tensor, as JSON


def to_safetensors(weights: dict[str, torch.Tensor], path: Path) -> None:
    """Write ``weights`` as safetensors. A tensor with several names is stored once; the header says what they are."""
    from safetensors.torch import save_file

    first: dict[tuple[int, torch.Size], str] = {}
    aliases = {}
    for name, value in weights.items():
        kept = first.setdefault((value.data_ptr(), value.shape), name)
        if kept != name:
            aliases[name] = kept
    unique = {name: weights[name].detach().contiguous() for name in first.values()}
    with written_whole(path) as partial:
        save_file(unique, partial, metadata={"format": "pt", ALIASES: json.dumps(aliases)})


def _from_safetensors(path: Path) -> dict[str, Any]:
    """Numbers from the file, everything else from the JSON files beside it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no dictionary
            aliases = json.loads((file.metadata() or {}).get(ALIASES, "{}"))
    except (SafetensorError, OSError, ValueError) as e:
        raise ValueError(f"{path} cannot be read as safetensors: {e}") from None
    for name, kept in aliases.items() if isinstance(aliases, dict) else ():
        if isinstance(kept, str) and kept in weights:
            weights.setdefault(str(name), weights[kept])
    content: dict[str, Any] = {"network_weights": weights}
    config, plan = (path.with_name(name) for name in DESCRIPTIONS)
    if config.is_file():
        content["pretraining"] = read_object(config).get("pretraining")
    if plan.is_file():
        content["nnssl_adaptation_plan"] = read_object(plan)
    return content


def save_whole(content: dict[str, Any], path: str | Path, check: Callable[[Path], None] = lambda file: None) -> None:
    """Save ``content`` so that ``path`` holds either what it held before or the new file, whole, whatever happens.

    ``check`` is given the new file before it gets its name; what it raises is passed on, and ``path`` stays as it was.

    Raises:
        OSError: it could not be written; says why, and how much space is free there.
    """
    path = Path(path)
    with _explained(path), written_whole(path) as partial:
        with _without_disguise(), open(partial, "wb") as f:
            torch.save(content, f)
        check(partial)


def check_writable(path: str | Path, source: str | Path) -> None:
    """That ``path`` can be written and is not the file ``source``, tried out before anything is computed; leaves nothing behind.

    Raises:
        ValueError: a folder, a device, the source itself, or a place where nothing can be written; says what to do.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder. Pass the name of the file to write, for example {path / 'weights.pth'}.")
    if path.exists() and Path(source).exists() and path.samefile(source):
        raise ValueError(
            f"{path} is the file that the weights come from, which may hold more than them (teacher, optimizer, history). Choose "
            "another name."
        )
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not an ordinary file. Choose another name.")
    try:
        with _explained(path), tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as e:
        raise ValueError(f"{e} Nothing was written.") from None


@contextlib.contextmanager
def _without_disguise() -> Iterator[None]:
    """On a full disk torch's zip writer fails while it closes the file, with "unexpected pos": the cause is its context."""
    try:
        yield
    except RuntimeError as e:
        cause: BaseException | None = e
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        raise (cause or OSError(str(e))) from e


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        free = ""
        if not isinstance(e, (FileNotFoundError, NotADirectoryError, PermissionError)):
            free = f" {shutil.disk_usage(path.parent).free / 2**30:.2f} GB are free there."
        raise OSError(f"{path} cannot be written: {e.strerror or e}.{free}") from e
