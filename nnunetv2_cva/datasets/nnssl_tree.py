"""Data that is already preprocessed, by nnssl or by nnU-Net, used where it lies: read only, without a copy."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2

from nnunetv2_cva.datasets.parallel import for_each
from nnunetv2_cva.datasets.plan import resolved
from nnunetv2_cva.datasets.reading import one_line
from nnunetv2_cva.views.index import Entry

NNSSL_PLANS = "nnsslPlans"
PREFERRED = "onemmiso"
HEADERS_AT_ONCE = 200


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
                f"--adopt {path}: expected a folder {NNSSL_PLANS}_{PREFERRED} in it, found "
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
    configuration = json.loads(plans.read_text())["configurations"].get(inside.name.removeprefix(f"{NNSSL_PLANS}_"), {})
    spacing = configuration.get("spacing")
    return tuple(float(s) for s in spacing) if spacing else None


def open_nnunet(folder: Path, plans_name: str, configuration: str) -> Adopted:
    """The cases of a configuration of a preprocessed nnU-Net dataset.

    Raises:
        ValueError: no such plans or no such data.
    """
    path = folder / f"{plans_name}.json"
    if not path.is_file():
        raise ValueError(f"--adopt {folder.name}: {path} not found. Name its plans with --target-plans.")
    plans = json.loads(path.read_text())
    found = resolved(plans, configuration)
    data = folder / found["data_identifier"]
    files = sorted(os.listdir(data)) if data.is_dir() else []
    keys = [f[: -len(".b2nd")] for f in files if f.endswith(".b2nd") and not f.endswith("_seg.b2nd")]
    names = {key: (folder.name, f"{folder.name}__{key}") for key in keys}
    if not names:
        raise ValueError(
            f"--adopt {folder.name}: no preprocessed cases in {data}. Run nnUNetv2_preprocess -d {folder.name} "
            f"-plans_name {plans_name} -c {configuration}, or pretrain from its raw images (--images)."
        )
    return Adopted(data, names, tuple(found["spacing"]), plans)


def combined(parts: Sequence[Adopted]) -> tuple[str, dict[str, tuple[str, str]]]:
    """The folder that all lie in, and the names of all cases below it, without ``.b2nd``, with dataset and subject."""
    root = os.path.commonpath([p.folder for p in parts])
    prefixes = [os.path.relpath(p.folder, root) for p in parts]
    return root, {
        os.path.normpath(os.path.join(prefix, name)): labels
        for part, prefix in zip(parts, prefixes, strict=True)
        for name, labels in part.names.items()
    }


def read_entries(
    root: str, names: dict[str, tuple[str, str]], processes: int, tick: Callable[[int], Any]
) -> tuple[list[Entry], list[tuple[str, str, str]]]:
    """An entry for every case whose header can be read, and (case, reason, path) for the others. ``tick(n)`` after n cases."""
    entries: list[Entry] = []
    rejected: list[tuple[str, str, str]] = []

    def note(found: list[tuple[str, tuple[int, ...], str]]) -> None:
        for name, shape, reason in found:
            if reason:
                rejected.append((name, reason, os.path.join(root, f"{name}.b2nd")))
            else:
                entries.append(Entry(name, shape, names[name][0]))
        tick(len(found))

    for_each(_read_headers, _portions(root, sorted(names)), processes, note)
    channels = [e.shape[0] for e in entries]
    usual = max(sorted(set(channels)), key=channels.count, default=1)
    odd = [e for e in entries if e.shape[0] != usual]
    rejected += [(e.key, f"{e.shape[0]} channels, most cases have {usual}", os.path.join(root, f"{e.key}.b2nd")) for e in odd]
    return [e for e in entries if e.shape[0] == usual], rejected


def _portions(root: str, names: Sequence[str]) -> Iterator[tuple[str, Sequence[str]]]:
    for i in range(0, len(names), HEADERS_AT_ONCE):
        yield root, names[i : i + HEADERS_AT_ONCE]


def _read_headers(portion: tuple[str, Sequence[str]]) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, shape, why it cannot be used)."""
    root, names = portion
    found: list[tuple[str, tuple[int, ...], str]] = []
    for name in names:
        path = os.path.join(root, f"{name}.b2nd")
        if not name.isprintable():  # a tab or a line break would tear the index
            found.append((name, (), "its name holds characters that cannot be printed"))
            continue
        try:
            shape = tuple(int(n) for n in blosc2.open(path, mode="r").shape)
        except Exception as e:  # noqa: BLE001  blosc2 raises many kinds for a damaged file
            reason = "empty file" if os.path.getsize(path) == 0 else f"unreadable: {one_line(e)}"
            found.append((name, (), reason))
            continue
        found.append((name, shape, "" if len(shape) == 4 and 0 not in shape else f"shape {shape}, expected (channels, i, j, k)"))
    return found
