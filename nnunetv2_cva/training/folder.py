"""A run's folder: one training at a time writes to it, and no new run destroys an old one."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from nnunetv2_cva.files import write_text

LOCK = "training.lock"
BEAT, STILL = (10.0, 60.0)  # seconds: how often a holder shows that it lives; how long one on another host is listened for


def refuse_or_set_aside(folder: str | Path, own: Iterable[str], set_aside: bool) -> Path | None:
    """For a new run in ``folder``: that none lies there. With ``set_aside`` one that does is moved into a folder beside it, which
    is returned; files of this run, named in ``own``, stay.

    Raises:
        ValueError: a run lies there; names both ways out.
    """
    folder = Path(folder)
    found = sorted(p.name for p in folder.glob("checkpoint_*.pth"))
    if not found:
        return None
    if not set_aside:
        raise ValueError(
            f"{folder} holds a run ({', '.join(found)}), which a new one would overwrite. Continue it (--c), or have it moved "
            "aside: nnUNet_cva='{\"set_aside\": true}'."
        )
    aside = folder.with_name(f"{folder.name}_aside_{datetime.now():%Y%m%d_%H%M%S}_{os.getpid()}")
    aside.mkdir()
    kept = {LOCK, *own}
    for path in sorted(folder.iterdir()):
        if path.name not in kept:
            os.replace(path, aside / path.name)
    return aside


@contextmanager
def only_one(folder: str | Path, say: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Hold the folder: a file names host and process, and is touched while the block runs. That of a process that has ended is
    taken over: at once on this host, on another host when it has been silent for a minute.

    Raises:
        ValueError: another training holds it; names host and process.
    """
    path = Path(folder) / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    mine = _myself()
    _take(path, mine, say)
    done = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, done), name="training.lock", daemon=True)
    beating.start()
    try:
        yield
    finally:
        done.set()
        beating.join()
        if _read(path) == mine:
            with contextlib.suppress(OSError):
                path.unlink()


def _take(path: Path, mine: dict[str, Any], say: Callable[[str], None]) -> None:
    text = json.dumps(mine) + "\n"
    try:
        with open(path, "x", encoding="utf-8") as f:  # fails where it exists, on NFS, too
            f.write(text)
        return
    except FileExistsError:
        pass
    holder = _read(path)
    if holder is not None and _lives(path, holder, say):
        raise ValueError(
            f"{path.parent} is in use: process {holder.get('process')} on {holder.get('host')} trains there since "
            f"{holder.get('since')}. Wait for it, or end it. If it is certain that it is gone, delete {path.name} there."
        )
    say(f"The training that held {path.parent} has ended without saying so; its lock is taken over.")
    write_text(path, text)
    sleep(0.2)  # of several that take over at once the last one holds it
    if _read(path) != mine:
        raise ValueError(f"{path.parent} is in use: another training has just begun there.")


def _lives(path: Path, holder: dict[str, Any], say: Callable[[str], None]) -> bool:
    me = _myself()
    if holder.get("host") == me["host"] and holder.get("boot") == me["boot"]:
        return isinstance(holder.get("process"), int) and _started(holder["process"]) == holder.get("started")
    say(f"{path.parent} was in use on {holder.get('host')}: looking for {STILL:.0f} s whether it still is.")
    before, began = _changed(path), monotonic()
    while monotonic() - began < STILL:  # by the change and not by the age: clocks differ between hosts
        sleep(min(1.0, STILL / 10))
        if _changed(path) != before:
            return path.exists()
    return False


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _beat(path: Path, done: threading.Event) -> None:
    while not done.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)


def _read(path: Path) -> dict[str, Any] | None:
    """None: it is gone or is no lock."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _myself() -> dict[str, Any]:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
    process = os.getpid()
    return {"host": socket.gethostname(), "boot": boot, "process": process, "started": _started(process), "since": now}


def _started(process: int) -> str | None:
    """When a process of this host started, as the kernel counts; None: there is none. Tells it from a later one of its number."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        pass
    if os.name == "nt" or Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(process, 0)
    except OSError:
        return None
    return "unknown"
