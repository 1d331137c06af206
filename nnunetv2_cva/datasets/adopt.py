"""Data that is already preprocessed, by nnssl or by nnU-Net, used where it lies: read only, without a copy."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from nnunetv2_cva.datasets.findings import Finding, killed, looked_at
from nnunetv2_cva.datasets.formats import Unusable, not_finite, one_line
from nnunetv2_cva.datasets.inventory import Inventory, remembered, sorted_out
from nnunetv2_cva.datasets.nnunet_plans import volume_configuration
from nnunetv2_cva.datasets.parallel import Progress, for_each
from nnunetv2_cva.datasets.reading import MIN_AXIS
from nnunetv2_cva.datasets.sources import Candidate
from nnunetv2_cva.files import read_object
from nnunetv2_cva.sizes import by

NNSSL_PLANS = "nnsslPlans"
PREFERRED = "onemmiso"
LOOKING = "Looking at cases"


@dataclass(frozen=True)
class Adopted:
    """One preprocessed folder. ``names``: paths of the cases below it without ``.b2nd``, with their dataset and subject.

    ``spacing`` in mm, None if it differs from case to case; ``plans``: nnU-Net's, None for nnssl's.
    """

    folder: Path
    names: dict[str, tuple[str, str]]
    spacing: tuple[float, ...] | None
    plans: dict[str, Any] | None


def open_nnssl(path: Path) -> Adopted:
    """A dataset folder of nnssl, or one configuration's folder in it.

    Raises:
        ValueError: neither.
    """
    inside = path if path.name.startswith(f"{NNSSL_PLANS}_") else None
    base = path.parent if inside else path
    options = sorted(p for p in base.glob(f"{NNSSL_PLANS}_*") if p.is_dir())
    if inside is None:
        preferred = [p for p in options if p.name == f"{NNSSL_PLANS}_{PREFERRED}"]
        if len(preferred or options) != 1:
            raise ValueError(
                f"`adopt={path}`: expected a folder {NNSSL_PLANS}_{PREFERRED} in it, found "
                f"{', '.join(p.name for p in options) or 'none of the kind'}. Give the id of a preprocessed nnU-Net dataset or a "
                "folder of nnssl's data."
            )
        inside = (preferred or options)[0]
    names = {}
    for place, folders, files in os.walk(inside):
        folders.sort()
        for file in sorted(files):
            if file.endswith(".b2nd") and not file.endswith(("__anon.b2nd", "__anat.b2nd")):
                name = os.path.relpath(os.path.join(place, file), inside)[: -len(".b2nd")]
                folders_of = Path(name).parts[:-1]  # collection / dataset / subject / session
                names[name] = ("__".join(folders_of[:2]) or path.name, "__".join(folders_of[:3]) or name)
    return Adopted(inside, names, _nnssl_spacing(base, inside), None)


def _nnssl_spacing(base: Path, inside: Path) -> tuple[float, ...] | None:
    plans = base / f"{NNSSL_PLANS}.json"
    if not plans.is_file():
        return None
    configuration = read_object(plans)["configurations"].get(inside.name.removeprefix(f"{NNSSL_PLANS}_"), {})
    spacing = configuration.get("spacing")
    return tuple(float(s) for s in spacing) if spacing else None


def open_nnunet(folder: Path, plans_name: str, configuration: str) -> Adopted:
    """The cases of a configuration of a preprocessed nnU-Net dataset.

    Raises:
        ValueError: no such plans or no such data.
    """
    path = folder / f"{plans_name}.json"
    if not path.is_file():
        raise ValueError(f"`adopt={folder.name}`: {path} not found. Name its plans with `target_plans`.")
    plans = read_object(path)
    found = volume_configuration(plans, configuration)
    data = folder / found["data_identifier"]
    files = sorted(os.listdir(data)) if data.is_dir() else []
    keys = [f[: -len(".b2nd")] for f in files if f.endswith(".b2nd") and not f.endswith("_seg.b2nd")]
    names = {key: (folder.name, f"{folder.name}__{key}") for key in keys}
    if not names:
        raise ValueError(
            f"`adopt={folder.name}`: no preprocessed cases in {data}. Preprocess {configuration} of {plans_name} with nnU-Net, "
            "or pretrain from its raw images (`images`)."
        )
    return Adopted(data, names, tuple(found["spacing"]), plans)


def combined(parts: Sequence[Adopted]) -> tuple[str, list[Candidate]]:
    """The folder that all lie in, and the cases below it: named by their paths without ``.b2nd``, in the order of their names."""
    root = os.path.commonpath([p.folder for p in parts])
    found = {}
    for part in parts:
        prefix = os.path.relpath(part.folder, root)
        for name, (dataset, subject) in part.names.items():
            key = os.path.normpath(os.path.join(prefix, name))
            found[key] = Candidate(key, (os.path.join(root, f"{key}.b2nd"),), dataset, subject)
    return root, [found[key] for key in sorted(found)]


def usable_cases(cases: Sequence[Candidate], folder: Path, headers_only: bool, processes: int, progress: Progress) -> Inventory:
    """Which of the cases can be used. ``headers_only``: without a look at their voxels, so NaN and duplicates are not found.

    ``folder``: where it is remembered what was looked at.
    """
    if headers_only:
        found: list[Finding] = []
        for_each(header_of_case, cases, processes, found.append, killed, progress, LOOKING)
        return sorted_out(found, stacked=False)
    looked = remembered(voxels_of_case, cases, folder, processes, progress, LOOKING)
    return sorted_out([looked[c.files].of(c) for c in cases], stacked=False)


def voxels_of_case(candidate: Candidate) -> Finding:
    """Shape and content of a preprocessed case, or why it cannot be used; never raises for a bad file."""
    return looked_at(candidate, _voxels)


def header_of_case(candidate: Candidate) -> Finding:
    """The same without the voxels."""
    return looked_at(candidate, lambda c: {"shape": _opened(c).shape})


def _opened(candidate: Candidate) -> blosc2.NDArray:
    (file,) = candidate.files
    if not candidate.key.isprintable():  # a tab or a line break would tear the index
        raise Unusable("its name holds characters that cannot be printed")
    blosc2.set_nthreads(1)
    try:
        array = blosc2.open(file, mode="r")
        shape = tuple(int(n) for n in array.shape)
    except Exception as e:  # noqa: BLE001  blosc2 raises many kinds for a damaged file
        raise Unusable("empty file" if os.path.getsize(file) == 0 else f"unreadable: {one_line(e)}") from None
    if len(shape) != 4 or 0 in shape:
        raise Unusable(f"shape {shape}, expected (channels, i, j, k)")
    if min(shape[1:]) < MIN_AXIS:
        raise Unusable(f"{by(shape[1:])} voxels, at least {MIN_AXIS} each expected")
    return array


def _voxels(candidate: Candidate) -> dict[str, Any]:
    """Read slab by slab, so that large cases take little memory and the content does not depend on how they are chunked."""
    array = _opened(candidate)
    digest, bad = hashlib.sha256(repr(array.shape).encode()), 0
    for channel in range(array.shape[0]):
        low, high = np.inf, -np.inf
        for begin in range(0, array.shape[1], array.chunks[1]):
            try:
                slab = np.ascontiguousarray(array[channel, begin : begin + array.chunks[1]], dtype=np.float32)
            except RuntimeError as e:
                raise Unusable(f"damaged: {one_line(e)}") from None
            digest.update(slab.data)
            bad += slab.size - int(np.count_nonzero(np.isfinite(slab)))
            low, high = min(low, float(slab.min())), max(high, float(slab.max()))
        if low == high:
            raise Unusable(f"all voxels are {low:g}")
    if bad:
        raise Unusable(not_finite(bad))
    return {"shape": tuple(array.shape), "content": digest.hexdigest()}
