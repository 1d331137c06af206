"""The list of cases beside preprocessed data, so that nothing has to walk a tree of a hundred thousand files.

``index.tsv`` lies in the folder of a configuration's data. Its first line names the folder that the cases lie in, which may be
another one (data used in place); every further line is one case: name, channels, shape, dataset. The name is the case's path
below that folder without ``.b2nd``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from nnunetv2_cva.files import written_whole
from nnunetv2_cva.sizes import by

INDEX = "index.tsv"

Sampling = Literal["cases", "datasets", "sqrt"]


@dataclass(frozen=True)
class Entry:
    """One case. ``shape``: (C, I, J, K)."""

    key: str
    shape: tuple[int, ...]
    dataset: str


@dataclass(frozen=True)
class Index:
    """All cases, ordered by name, in few large arrays: loader processes share them and do not copy.

    ``root``: folder of the cases; ``keys`` (N,); ``shapes`` (N, 4); ``dataset_of`` (N,) into ``datasets``.
    """

    root: str
    keys: np.ndarray
    shapes: np.ndarray
    datasets: tuple[str, ...]
    dataset_of: np.ndarray

    def dataset_of_keys(self, keys: Sequence[str]) -> np.ndarray:
        """(len(keys),) number of each case's dataset."""
        return self.dataset_of[np.searchsorted(self.keys, np.asarray(keys, dtype=str))]


def write_index(folder: Path, entries: Iterable[Entry], root: str = "") -> None:
    """``root``: where the cases lie; empty for ``folder`` itself, which can then be moved."""
    folder.mkdir(parents=True, exist_ok=True)
    with written_whole(folder / INDEX) as partial, open(partial, "w", encoding="utf-8") as f:
        f.write(f"root\t{root}\n")
        for e in sorted(entries, key=lambda e: e.key):
            f.write(f"{e.key}\t{by(e.shape)}\t{e.dataset}\n")


def read_index(folder: str | Path) -> Index | None:
    """The index in ``folder``, or None where there is none (data that nnU-Net has preprocessed).

    Raises:
        ValueError: the file is no index.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        return None
    try:
        first, *lines = path.read_text(encoding="utf-8").splitlines()
        _, root = first.split("\t")
        keys, shapes, names = zip(*(line.split("\t") for line in lines), strict=True) if lines else ((), (), ())
        sizes = np.array(" ".join(shapes).replace("x", " ").split(), dtype=np.int32).reshape(len(keys), 4)
        if sizes.size and sizes.min() < 1:
            raise ValueError
    except (ValueError, OverflowError):
        raise ValueError(f"{path} is damaged. Delete it, then plan and preprocess the dataset again.") from None
    datasets = sorted(set(names))
    numbers = {name: number for number, name in enumerate(datasets)}
    codes = np.array([numbers[name] for name in names], dtype=np.int32)
    ordered = np.array(keys, dtype=str)
    order = np.argsort(ordered, kind="stable")  # numpy's order, whatever the file's
    return Index(root or str(folder), ordered[order], sizes[order], tuple(datasets), codes[order])


def sampling_weights(datasets: np.ndarray, sampling: Sampling) -> np.ndarray | None:
    """(N,) how likely each case is drawn, from the number of its dataset; None when all are equally likely.

    ``cases``: every case alike; ``datasets``: every dataset alike, whatever its size; ``sqrt``: datasets by the square root of
    their numbers of cases.
    """
    counts = np.bincount(datasets)
    if sampling == "cases" or np.count_nonzero(counts) < 2:
        return None
    per_case = 1 / counts[datasets] if sampling == "datasets" else 1 / np.sqrt(counts[datasets])
    return per_case / per_case.sum()
