"""What may be asked of a network's features, field by field; and how far the work is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Progress = Callable[[str, int, int], object]  # what is done, how many of it, of how many


@dataclass(frozen=True, kw_only=True)
class OfWeights:
    """Of every command: where its files go, which of the weights it reads, whether it trusts their file, where it computes."""

    output: str
    branch: str = "student"
    trust: bool = False
    device: str | None = None


@dataclass(frozen=True, kw_only=True)
class EmbedRequest(OfWeights):
    """``level``, ``taps``, ``format`` and ``overlap``: see ``embedding.Wanted``; ``part`` of ``parts``, counted from 0."""

    weights: str
    images: tuple[str, ...]
    level: Literal["image", "windows", "dense"] = "image"
    taps: tuple[int, ...] | None = None
    format: Literal["npz", "b2nd", "nifti"] = "npz"
    overlap: float = 0.5
    part: int = 0
    parts: int = 1


@dataclass(frozen=True, kw_only=True)
class LookRequest(OfWeights):
    """``images``: files, or with ``target``, a labelled dataset, names of its cases; ``points``: a file of them, else ``count``
    are chosen; ``against``: a second file of weights."""

    weights: str
    images: tuple[str, ...]
    points: str | None = None
    count: int = 4
    target: str | None = None
    against: str | None = None
    pairs: int = 20


@dataclass(frozen=True, kw_only=True)
class ProbeRequest(OfWeights):
    """Of voxels of the labelled ``dataset``, or of the images that ``csv`` names."""

    weights: tuple[str, ...]
    dataset: str | None = None
    labelled: int = 4
    csv: str | None = None
    seeds: int = 5
    folds: int = 5


def device_of(asked: str | None) -> str:
    """The device that was asked for, else the best there is.

    Raises:
        ValueError: it is not there.
    """
    import torch

    there = ["cpu"]
    if torch.cuda.is_available():
        there += ["cuda", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there.append("mps")
    if asked is not None and asked not in there:
        raise ValueError(f"`device={asked}`: torch finds {', '.join(there)} here.")
    return asked or ("cuda" if "cuda" in there else "cpu")


def counting(progress: Progress, what: str, of: int) -> Callable[[], None]:
    """Say that nothing is done yet; and what says, when it is called, that one more is."""
    finished = 0

    def tick() -> None:
        nonlocal finished
        finished += 1
        progress(what, finished, of)

    progress(what, 0, of)
    return tick
