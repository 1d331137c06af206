"""The files that are compared: their names, weights made for the target, and whether they have seen the test cases."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_cva.comparing.design import SCRATCH
from nnunetv2_cva.transfer.hub import located, name_of


@dataclass(frozen=True)
class Arm:
    """``weights``: the file that is fine-tuned from, as nnU-Net's own loader takes it; ``given``: the file it was made of;
    ``seen``: what is known about the pretraining and the test cases."""

    name: str
    given: str | None = None
    digest: str = ""
    weights: Path | None = None
    seen: str = ""


def named(files: Sequence[str]) -> list[str]:
    """Short names: the files' own, with as many folders before them as tell them apart.

    Raises:
        ValueError: a file is missing or given twice, or a name cannot be used.
    """
    paths = [name_of(f) for f in files]
    for path, file in zip(paths, files):
        if not located(file).is_file():
            raise ValueError(f"`weights`: no file {path}.")
    if len(set(paths)) < len(paths):
        raise ValueError("`weights`: a file is given twice.")
    found = [_distinguishing(path, [p for p in paths if p != path]) for path in paths]
    names = [re.sub(r"[^A-Za-z0-9.+-]+", "_", name) for name in found]
    if SCRATCH in names or len(set(names)) < len(names):
        raise ValueError(f"`weights`: the files would be called {', '.join(names)} in tables. Rename them.")
    return names


def _distinguishing(path: Path, others: Sequence[Path]) -> str:
    """``a`` for a.pth, the recipe for nnU-Net's checkpoint_final.pth, unless another file is called so; then the folders that no
    other has in this place."""
    if all(_own(path) != _own(o) for o in others):
        return _own(path)
    parts = [*path.parts[1:-1], path.stem]
    rest = [[*o.parts[1:-1], o.stem] for o in others]
    same_depth = [o for o in rest if len(o) == len(parts)]
    differing = [p for n, p in enumerate(parts) if any(o[n] != p for o in same_depth)]
    return "_".join(differing) if differing and len(same_depth) == len(rest) else "_".join(parts)


def _own(path: Path) -> str:
    folder = path.parent.parent.name  # nnU-Net's: trainer__plans__configuration/fold_x/checkpoint_final.pth
    return folder.split("__")[0] if path.stem.startswith("checkpoint_") and "__" in folder else path.stem


def digest(path: str | Path) -> str:
    """Of a file's content."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16] if hasattr(hashlib, "file_digest") else _hash(f.read())


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
