"""Files that are written whole or not at all, and JSON.

Whatever is killed, full or written twice at a time: under its name a file holds the old content or the new one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HOST = re.sub(r"[^A-Za-z0-9-]+", "-", socket.gethostname())
PARTIAL = ".partial"
LONG_AGO = 24 * 3600  # seconds; no file takes so long to write


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """A path to write the new content of ``path`` to; it takes the name ``path``, on the disk, when the block ends well.

    The partial file's name carries host and process, so that two writers do not tear each other's; what an ended process has
    left of the same file is removed.

    Raises:
        OSError: it could not be written; ``path`` is as it was. Whatever the block raises is passed on, likewise.
    """
    path = Path(path)
    remove_abandoned(path.parent, path.name)
    partial = path.with_name(f"{path.name}.{HOST}.{os.getpid()}{PARTIAL}")
    try:
        yield partial
        with open(partial, "rb") as f:
            os.fsync(f.fileno())
        os.replace(partial, path)
        _settle(path.parent)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """UTF-8; names of files that are not are written as they are."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_json(path: str | Path, content: Any) -> None:
    """Indented, with a line end. ``content``: plain types."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: str | Path) -> Any:
    """What a JSON file holds; a byte order mark is no fault.

    Raises:
        ValueError: missing, unreadable or no JSON; names file and line.
    """
    path = Path(path)
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except json.JSONDecodeError as e:
        raise ValueError(
            f"{path}, line {e.lineno}: expected JSON, found something else ({e.msg}). Correct or restore it."
        ) from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected JSON in UTF-8, found another encoding. Save it as UTF-8.") from None
    except OSError as e:
        raise ValueError(f"{path} cannot be read: {e.strerror}.") from None
    except (RecursionError, ValueError):  # thousands of brackets, or of digits
        raise ValueError(f"{path}: expected JSON, found something that no program writes. Restore the file.") from None


def read_object(path: str | Path) -> dict[str, Any]:
    """What a JSON file holds that must be an object.

    Raises:
        ValueError: as ``read_json``; or it holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(content).__name__}.")
    return content


def remove_abandoned(folder: Path, name: str = "*") -> None:
    """Remove partial files of ``name`` (default: of all) whose process has ended."""
    pattern = name if name == "*" else _literal(name)
    for partial in folder.glob(f"{pattern}.*{PARTIAL}"):
        with contextlib.suppress(OSError):
            if _abandoned(partial):
                partial.unlink()


def _literal(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _abandoned(partial: Path) -> bool:
    """Whether the process that wrote a file has ended: ``<name>.<host>.<process>.partial``."""
    *_, host, pid, _ = ("", "", *partial.name.split("."))
    if host != HOST or os.name == "nt" or not pid.isdigit():  # Windows has no way to ask
        return time.time() - partial.stat().st_mtime > LONG_AGO
    if int(pid) == os.getpid():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it lives, and is another user's
    return False


def _settle(folder: Path) -> None:
    """That a new name survives a power cut; not every system can be asked."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
