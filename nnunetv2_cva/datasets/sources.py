"""Which files are the images of a pretraining dataset, and how their cases are called.

A case's name follows from where its files lie below the given folder, so it does not change when other folders are added.
"""

from __future__ import annotations

import csv
import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from nnunetv2_cva.datasets.reading import ENDINGS, ending_of

IMAGE_FOLDERS = ("imagesTr", "imagesTs")  # where one of these stands, only these are read: labels lie beside them
CHANNEL = re.compile(r"_(\d{4})$")
LONGEST_KEY = 180


@dataclass(frozen=True)
class Sources:
    """Where the images of a pretraining dataset come from, as given by the user. Paths are absolute.

    ``adopt``: folders and names of datasets that are preprocessed already, instead of images. ``held_out``: identities of the
    cases that were held out, which stay out until sources are given anew.
    """

    images: tuple[str, ...] = ()
    table: str | None = None
    exclude: tuple[str, ...] = ()
    channels: Literal["split", "stack"] = "split"
    modality: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    adopt: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Sources:
        tuples = {k: tuple(values.get(k, ())) for k in ("images", "exclude", "modality", "held_out", "adopt")}
        return Sources(table=values["table"], channels=values["channels"], **tuples)


@dataclass(frozen=True)
class Candidate:
    """A case before its files were opened. ``files``: one per channel. ``modality``: as the table or nnU-Net's dataset.json
    says, one per channel with ";" between; else empty."""

    key: str
    files: tuple[str, ...]
    dataset: str
    subject: str
    modality: str = ""


@dataclass(frozen=True)
class _File:
    path: str
    parts: tuple[str, ...]  # name parts of the case: folders, then the file's name without its ending
    dataset: str
    prefix: str
    subject: str
    modality: str
    numbered: bool  # its name ends with nnU-Net's channel number


def candidates(sources: Sources, own: str, known: dict[tuple[str, ...], str]) -> list[Candidate]:
    """All cases of the sources, in the order of their names.

    ``own``: name of the dataset that is planned; cases from its own raw folder carry no prefix. ``known``: names already given.

    Raises:
        ValueError: a folder or table that does not exist or holds no images, or a row without a path.
    """
    files: dict[str, _File] = {}
    if sources.table is not None:
        files.update((f.path, f) for f in _from_table(Path(sources.table), sources.exclude))
    folders = [Path(folder) for folder in sources.images]
    for folder, label in zip(folders, _labels(folders)):
        found = list(_from_folder(folder, label, own, sources.exclude))
        if not found:
            raise ValueError(f"No images in {folder}: expected files that nnU-Net reads as volumes ({', '.join(ENDINGS)}).")
        for file in found:
            files.setdefault(file.path, file)
    groups = _stacked(files.values()) if sources.channels == "stack" else [[f] for f in files.values()]
    return _named(groups, sources.channels == "split", known)


def _labels(folders: Sequence[Path]) -> list[str]:
    """The dataset that each folder is: its name, with as many folders above it as tell it from those given earlier."""
    of: dict[Path, str] = {}
    for folder in folders:
        base = folder.parent if folder.name in IMAGE_FOLDERS else folder
        names = [_clean(n) for n in base.parts if n != base.anchor]
        choices = ("_".join(names[-n:]) for n in range(1, len(names) + 1))
        label = next((c for c in choices if c not in of.values()), f"{names[-1] if names else 'images'}_{len(of)}")
        of.setdefault(base, label)
    return [of[f.parent if f.name in IMAGE_FOLDERS else f] for f in folders]


def _from_folder(folder: Path, label: str, own: str, exclude: Sequence[str]) -> Iterator[_File]:
    """Every image below a folder; where imagesTr or imagesTs stand, only what is in them."""
    if not folder.is_dir():
        raise ValueError(f"`images={folder}`: expected a folder or the id of a dataset in nnUNet_raw, found neither.")
    prefix = "" if label == own else label
    modalities = _channel_names(folder)
    for place, names in _folders_below(folder):
        for name in names:
            path = os.path.join(place, name)
            ending = None if name.startswith(".") else ending_of(name)
            relative = os.path.relpath(path, folder)
            if ending is None or _excluded(relative, exclude):
                continue
            below = [p for p in Path(relative).parts[:-1] if p not in IMAGE_FOLDERS]
            parts = (*below, name[: -len(ending)])
            number = CHANNEL.search(parts[-1])
            modality = modalities.get(int(number[1]), "") if number else ""
            in_layout = os.path.basename(place) in IMAGE_FOLDERS
            subject = next((p for p in re.findall(r"sub-[A-Za-z0-9]+", relative)), "")
            yield _File(path, parts, label, prefix, subject, modality, in_layout)


def _folders_below(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(folder, names of its files) for ``folder`` and those below it, links followed, each once, all in order."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to a folder above it would be followed for ever
            folders.clear()
            continue
        seen.add(real)
        if set(IMAGE_FOLDERS) & set(folders):
            folders[:] = [f for f in IMAGE_FOLDERS if f in folders]
            names = []
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        yield place, sorted(names)


def _channel_names(folder: Path) -> dict[int, str]:
    """Of nnU-Net's dataset.json, where the folder is a raw dataset or imagesTr or imagesTs of one."""
    path = next((p for p in (folder / "dataset.json", folder.parent / "dataset.json") if p.is_file()), None)
    names = json.loads(path.read_text()).get("channel_names", {}) if path is not None else {}
    return {int(number): str(name) for number, name in names.items()}


def _from_table(table: Path, exclude: Sequence[str]) -> Iterator[_File]:
    """Every row: ``path`` and optionally ``dataset``, ``subject``, ``modality``; paths relative to the table's folder.

    Rows that name no image of nnU-Net's are cases, too: they are rejected with the other unusable ones.
    """
    if not table.is_file():
        raise ValueError(f"`table={table}`: no such file.")
    with open(table, newline="", encoding="utf-8-sig") as f:
        rows = csv.DictReader(f)
        if "path" not in (rows.fieldnames or ()):
            raise ValueError(f"`table={table}`: expected columns path[,dataset][,subject][,modality], found {rows.fieldnames}.")
        for line, row in enumerate(rows, 2):
            if not row["path"]:
                raise ValueError(f"`table={table}`, line {line}: expected a path in column path, found none.")
            path = os.path.abspath(table.parent / row["path"])
            ending = ending_of(path) or os.path.splitext(path)[1]
            if _excluded(row["path"], exclude):
                continue
            label = _clean(row.get("dataset") or table.stem)
            subject = row.get("subject") or ""
            name = os.path.basename(path)
            name = name[: len(name) - len(ending)]
            parts = (subject, name) if subject and subject not in name else (name,)
            yield _File(path, parts, label, label, subject, row.get("modality") or "", False)


def _excluded(relative: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(relative, p) or fnmatch.fnmatch(os.path.basename(relative), p) for p in patterns)


def channel_numbers(files: Sequence[str]) -> tuple[int, ...]:
    """The channels that the names of a case's files say; 0 for a name without a number."""
    names = (os.path.basename(f) for f in files)
    found = (CHANNEL.search(n[: -len(ending_of(n) or "") or None]) for n in names)
    return tuple(int(number[1]) if number else 0 for number in found)


def _stacked(files: Any) -> list[list[_File]]:
    """Files that differ only in their channel number, ordered by it."""
    groups: dict[tuple[str, str], list[_File]] = {}
    for file in files:
        stem = CHANNEL.sub("", file.parts[-1])
        groups.setdefault((os.path.dirname(file.path), stem), []).append(file)
    return [sorted(group, key=lambda f: (channel_numbers([f.path]), f.path)) for group in groups.values()]


def _named(groups: list[list[_File]], split: bool, known: dict[tuple[str, ...], str]) -> list[Candidate]:
    taken: dict[str, tuple[str, ...]] = {key: files for files, key in known.items()}
    cases = []
    for group in sorted(groups, key=lambda g: g[0].path):
        first, files = group[0], tuple(f.path for f in group)
        base = (*first.parts[:-1], CHANNEL.sub("", first.parts[-1]))
        # Split, channel 0 of nnU-Net's layout is called like the case, so names stay when a case gets more channels.
        channel_0 = first.numbered and first.parts[-1].endswith("_0000")
        parts = first.parts if split and not channel_0 else base
        key = known.get(files) or _key([first.prefix, *parts])
        if taken.setdefault(key, files) != files:
            key = f"{key[:LONGEST_KEY]}_{hashlib.sha256(os.fsencode(files[0])).hexdigest()[:8]}"
            taken[key] = files
        subject = _key([first.prefix, *([first.subject] if first.subject else base)])
        modality = ";".join(f.modality for f in group) if all(f.modality for f in group) else ""
        cases.append(Candidate(key, files, first.dataset, subject, modality))
    return sorted(cases, key=lambda c: c.key)


def _key(parts: Sequence[str]) -> str:
    """A file name from name parts."""
    key = "__".join(_clean(p) for p in parts if p)
    if len(key) > LONGEST_KEY:
        key = f"{key[: LONGEST_KEY - 9]}_{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    return key + "_" if key.endswith("_seg") else key  # nnU-Net takes *_seg.b2nd for a segmentation


def _clean(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", text)
