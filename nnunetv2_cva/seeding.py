"""Random streams: everything random follows from a purpose and a few numbers, so a resumed run draws what it would have drawn."""

from __future__ import annotations

import zlib

import numpy as np


def stream(purpose: str, *numbers: int) -> np.random.Generator:
    """An independent generator for this purpose ("cases", "views", ...) and these numbers (seed, step, rank, ...).

    The count of the numbers is part of the seed: NumPy pads short seeds with zeros, which would make (seed, step) and
    (seed, step, 0) the same stream.
    """
    return np.random.default_rng((zlib.crc32(purpose.encode()), len(numbers), *numbers))


def torch_seed(purpose: str, *numbers: int) -> int:
    """A seed for a torch generator, from the same streams."""
    return int(stream(purpose, *numbers).integers(2**62))
