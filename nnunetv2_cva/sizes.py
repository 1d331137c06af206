"""Sizes and spacings as messages, tables and file names show them."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral


def by(numbers: Iterable[float]) -> str:
    """``160x160x96`` of voxels, ``0.8594x0.8594x1.5`` of millimetres: whole numbers whole, others to four digits."""
    return "x".join(str(int(n)) if isinstance(n, Integral) or float(n).is_integer() else f"{n:.4g}" for n in numbers)
