"""The folder of preprocessed cases: what is there, what the rest takes, and what is written when all are there."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import blosc2
import numpy as np
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_cva.datasets.findings import Finding
from nnunetv2_cva.datasets.formats import one_line
from nnunetv2_cva.datasets.inventory import read_accepted, read_rejected, write_rejected
from nnunetv2_cva.datasets.user_changes import save_splits
from nnunetv2_cva.files import read_object, remove_abandoned, write_json
from nnunetv2_cva.views.index import INDEX, Entry, read_index, write_index

SETTINGS = "settings.json"
FAILED = ".failed"  # <case>.failed holds why a case could not be preprocessed
PREFIX = "preprocessing: "
NOTE = "nnunetv2_cva"  # what the blosc2 file notes: the content of the images that it was made of
ROOM = "Make room, point nnUNet_preprocessed to a larger disk, or store half the bytes with `storage=float16`."
# What decides about the voxels; a folder holds cases of one such setting only.
DECISIVE = (
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "preprocessor_name",
)
TYPICAL_RATIO = 0.8  # compressed / raw; measured on MR and CT: 0.3 to 0.9, the more the less background

Storage = Literal["float32", "float16"]

NO_RESAMPLING = "no_resampling_hack"  # nnU-Net's name for leaving images at their spacing


@dataclass(frozen=True)
class Destination:
    """Where the cases go and how they are made. ``folder``: of the configuration's data."""

    dataset: Path
    plans: dict[str, Any]
    configuration: str
    storage: Storage = "float32"

    @property
    def manager(self) -> ConfigurationManager:
        return PlansManager(self.plans).get_configuration(self.configuration)

    @property
    def folder(self) -> Path:
        return self.dataset / self.manager.data_identifier


def shape_after(case: Finding, plans: dict[str, Any], spacing: Sequence[float]) -> tuple[int, ...]:
    """Voxels of a case after cropping, transposing and resampling, as nnU-Net computes them."""
    order = plans["transpose_forward"]
    if any(c.get("resampling_fn_data") == NO_RESAMPLING for c in plans["configurations"].values()):
        return tuple(int(case.cropped[a]) for a in order)
    shape = compute_new_shape([case.cropped[a] for a in order], [case.spacing[a] for a in order], spacing)
    return tuple(int(n) for n in shape)


def missing(to: Destination, cases: Sequence[Finding]) -> list[Finding]:
    """The cases that are not there yet, or were made of images that have changed since."""
    return [c for c in cases if shape_of(to, c) is None]


def shape_of(to: Destination, case: Finding) -> tuple[int, ...] | None:
    """(C, I, J, K) of a preprocessed case; None where there is none, or one of other images than the case has now."""
    path = to.folder / f"{case.key}.b2nd"
    if not path.is_file():
        return None
    try:
        array = blosc2.open(str(path), mode="r")
        return tuple(int(n) for n in array.shape) if array.schunk.meta[NOTE] == case.content else None
    except Exception:  # noqa: BLE001  damaged, or made by something else: blosc2 raises many kinds
        return None


def needed_bytes(to: Destination, cases: Sequence[Finding]) -> int:
    """About how much the cases will take on disk."""
    spacing, size = to.manager.spacing, np.dtype(to.storage).itemsize
    voxels = sum(int(np.prod(shape_after(c, to.plans, spacing))) * len(c.files) for c in cases)
    return int(voxels * size * TYPICAL_RATIO)


def prepare(to: Destination, cases: Sequence[Finding]) -> None:
    """Check and make the folder. ``cases``: of all parts, since these share the disk.

    Raises:
        ValueError: the folder holds cases made with other settings, or the disk is too small.
    """
    to.folder.mkdir(parents=True, exist_ok=True)
    path, now = to.folder / SETTINGS, {**_settings(to.plans, to.configuration), "storage": to.storage}
    _check_made_with(now, to.folder)
    todo = [c for c in cases if not (to.folder / f"{c.key}.b2nd").is_file()]
    need, free = needed_bytes(to, todo), shutil.disk_usage(to.folder).free
    if need > free:
        raise ValueError(
            f"{len(todo)} cases need about {need / 2**30:.1f} GB in {to.folder}, {free / 2**30:.1f} GB are free there. {ROOM}"
        )
    write_json(path, now)


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Raise ValueError, with one sentence, when writing into the folder fails: blosc2 and the system say little."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        free = shutil.disk_usage(folder).free / 2**30
        raise ValueError(
            f"{folder} cannot be written to ({one_line(e)}); {free:.1f} GB are free there. {ROOM} Then run again: what is "
            "finished is kept."
        ) from None


@dataclass(frozen=True)
class Finished:
    """Numbers of cases; ``splits_kept``: where the user's own splits are, if they had to be replaced."""

    ready: int
    failed: int
    splits_kept: Path | None


def finish(to: Destination) -> Finished | None:
    """When every case is there or has failed: write the index, the splits and ``rejected.csv``.

    None while cases are missing: other parts are still running.
    """
    cases = read_accepted(to.dataset)
    shapes = {c.key: shape_of(to, c) for c in cases}
    failed = {c.key: to.folder / f"{c.key}{FAILED}" for c in cases if shapes[c.key] is None}
    if not all(path.is_file() for path in failed.values()):
        return None
    done = [c for c in cases if c.key not in failed]
    with writable(to.folder):
        write_index(to.folder, (Entry(c.key, shapes[c.key] or (), c.dataset) for c in done))
        kept = save_splits(to.dataset, [(c.key, c.subject) for c in done])
        _list_failures(to.dataset, {c.key: c for c in cases}, failed)
        remove_abandoned(to.folder)
    return Finished(len(done), len(failed), kept)


def _list_failures(dataset: Path, cases: dict[str, Finding], failed: dict[str, Path]) -> None:
    earlier = [row for row in read_rejected(dataset) if not row[1].startswith(PREFIX)]
    new = [(key, PREFIX + path.read_text(encoding="utf-8"), ";".join(cases[key].files)) for key, path in failed.items()]
    write_rejected(dataset, earlier + new)


def without_left_out(dataset: Path, keys: Collection[str]) -> list[Path]:
    """Leave cases other than ``keys`` out of the indices of the dataset's preprocessed cases, so that no training draws them
    before the next ``preprocess``. Returns the indices that have changed."""
    changed = []
    for path in sorted(dataset.glob(f"*/{INDEX}")):
        index = read_index(path.parent)
        if index is None or index.root != str(path.parent):
            continue
        entries = [
            Entry(str(key), tuple(map(int, shape)), index.datasets[code])
            for key, shape, code in zip(index.keys, index.shapes, index.dataset_of)
        ]
        kept = [e for e in entries if e.key in keys]
        if len(kept) < len(entries):
            write_index(path.parent, kept)
            changed.append(path)
    return changed


def check_made_for(folder: Path, plans: dict[str, Any], configuration: str) -> None:
    """That our preprocessing made the cases in ``folder`` as these plans say; of others nothing is known.

    Raises:
        ValueError: as other plans said; names what has changed.
    """
    if (folder / SETTINGS).is_file():
        _check_made_with(_settings(plans, configuration), folder)


def _check_made_with(now: dict[str, Any], folder: Path) -> None:
    path = folder / SETTINGS
    before = read_object(path) if path.is_file() else now
    if changed := [k for k in now if before.get(k) != now[k]]:
        listing = "; ".join(f"{k}: {before.get(k)}, now {now[k]}" for k in changed)
        raise ValueError(
            f"{folder} holds cases made with other settings ({listing}). Delete "
            "the folder to preprocess again, or plan under another name (`plans`)."
        )


def _settings(plans: dict[str, Any], name: str) -> dict[str, Any]:
    configuration = PlansManager(plans).get_configuration(name).configuration
    clipped = "CTNormalization" in configuration["normalization_schemes"]
    return {
        **{k: configuration[k] for k in DECISIVE},
        "transpose_forward": plans["transpose_forward"],
        "foreground_intensity_properties_per_channel": plans["foreground_intensity_properties_per_channel"] if clipped else None,
    }
