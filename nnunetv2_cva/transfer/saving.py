"""Checkpoint files written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch


def save_whole(content: dict[str, Any], path: str | Path, check: Callable[[Path], None] = lambda file: None) -> None:
    """Save ``content`` so that ``path`` holds either what it held before or the new file, whole, whatever happens.

    ``check`` is given the new file before it gets its name; what it raises is passed on, and ``path`` stays as it was.

    Raises:
        OSError: it could not be written; says why, and how much space is free there.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")  # always the same: a killed process leaves one, the next overwrites it
    try:
        with _explained(path):
            with open(partial, "wb") as f:
                torch.save(content, f)
                f.flush()
                os.fsync(f.fileno())
        check(partial)
        with _explained(path):
            os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


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
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as e:
        # On a full disk torch's zip writer fails while it closes the file, with "unexpected pos": the cause is its context.
        cause: BaseException = e
        while not isinstance(cause, OSError) and cause.__context__ is not None:
            cause = cause.__context__
        reason = getattr(cause, "strerror", None) or str(cause)
        free = ""
        if not isinstance(cause, (FileNotFoundError, NotADirectoryError, PermissionError)):
            free = f" {shutil.disk_usage(path.parent).free / 2**30:.2f} GB are free there."
        raise OSError(f"{path} cannot be written: {reason}.{free}") from e
