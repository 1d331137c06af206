"""Which files are the images of a pretraining dataset, and how their cases are called.

A case's name follows from where its files lie below the given folder, so it does not change when other folders are added.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from nnunetv2_cva.datasets.dicom import Series, is_dicom, series_in
from nnunetv2_cva.datasets.reading import ENDINGS, ending_of
from nnunetv2_cva.datasets.tables import read_table
from nnunetv2_cva.files import read_object

IMAGE_FOLDERS = ("imagesTr", "imagesTs")  # where one of these stands, only these are read: labels lie beside them
CHANNEL = re.compile(r"_(\d{4})$")
BIDS = re.compile(r"sub-[^_]+")
LONGEST_KEY = 180  # bytes; names of files have at most 255 with what is added to them


@dataclass(frozen=True)
class Sources:
    """Where the images of a pretraining dataset come from, as given by the user. Paths are absolute.

    ``adopt``: folders and names of datasets that are preprocessed already, instead of images. ``held_out``: identities of the
    cases that were held out, which stay out until sources are given anew. ``anonymous``: cases get
    names that say nothing.
    """

    images: tuple[str, ...] = ()
    table: str | None = None
    exclude: tuple[str, ...] = ()
    channels: Literal["split", "stack"] = "split"
    modality: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    adopt: tuple[str, ...] = ()
    anonymous: bool = False

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Sources:
        tuples = {k: tuple(values.get(k, ())) for k in ("images", "exclude", "modality", "held_out", "adopt")}
        anonymous = bool(values.get("anonymous", False))
        return Sources(table=values["table"], channels=values["channels"], anonymous=anonymous, **tuples)


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
class Found:
    """``cases``, in the order of their names; ``unread``: how many files of which kind were left; ``remarks``: what is odd."""

    cases: tuple[Candidate, ...]
    unread: dict[str, int]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class _File:
    path: str
    parts: tuple[str, ...]  # name parts of the case: folders, then the file's name without its ending
    dataset: str
    prefix: str
    subject: str
    modality: str
    numbered: bool  # its name ends with nnU-Net's channel number


def candidates(sources: Sources, own: str, known: dict[tuple[str, ...], str]) -> Found:
    """All cases of the sources.

    ``own``: name of the dataset that is planned; cases from its own raw folder carry no prefix. ``known``: names already given.

    Raises:
        ValueError: a folder or table that does not exist or holds no images, or a row without a path.
    """
    files: dict[str, _File] = {}
    unread: Counter[str] = Counter()
    remarks: list[str] = []
    if sources.table is not None:
        files.update((f.path, f) for f in _from_table(Path(sources.table), sources.exclude))
    folders = [Path(folder) for folder in sources.images]
    for folder, label in zip(folders, _labels(folders)):
        walk = _Walk(folder, label, "" if label == own else label, sources.exclude, sources.channels == "stack", unread, remarks)
        found = list(walk.files())
        if not found:
            left = f" There are {_listed(unread)}." if unread else ""
            expected = f"files that nnU-Net reads as volumes ({', '.join(ENDINGS)}), or DICOM series"
            raise ValueError(f"No images in {folder}: expected {expected}.{left}")
        for file in found:
            files.setdefault(file.path, file)
    groups = _stacked(files.values()) if sources.channels == "stack" else [[f] for f in files.values()]
    return Found(
        tuple(_named(groups, sources.channels == "split", known)), {kind: n for kind, n in unread.items() if n}, tuple(remarks)
    )


def _listed(unread: Counter[str]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in unread.most_common())


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


@dataclass(frozen=True)
class _Walk:
    """Through a folder and all below it, counting what is not read. Where imagesTr or imagesTs stand, only what is in them is."""

    folder: Path
    label: str
    prefix: str
    exclude: Sequence[str]
    stack: bool
    unread: Counter[str]
    remarks: list[str]

    def files(self) -> Iterator[_File]:
        if not self.folder.is_dir():
            raise ValueError(f"`images={self.folder}`: expected a folder or the id of a dataset in nnUNet_raw, found neither.")
        places = list(self._places())
        subjects = {s for place, _ in places for s in Path(os.path.relpath(place, self.folder)).parts if BIDS.fullmatch(s)}
        names_of_channels = self._channel_names()
        for place, names in places:
            images, dicom = self._sorted_out(place, names)
            series, others = series_in(place, dicom)
            self.unread.update(others)
            yield from (self._series(s) for s in series)
            channels = self._channels(place, images, names_of_channels)
            for name, ending in images:
                relative = Path(os.path.relpath(os.path.join(place, name), self.folder))
                below = [p for p in relative.parts[:-1] if p not in IMAGE_FOLDERS]
                stem = name[: -len(ending)]
                number = CHANNEL.search(stem)
                numbered = number is not None and int(number[1]) in channels
                modality = names_of_channels.get(int(number[1]), "") if number and numbered else ""
                subject = _bids(below, stem, len(subjects) > 1)
                yield _File(os.path.join(place, name), (*below, stem), self.label, self.prefix, subject, modality, numbered)

    def _series(self, series: Series) -> _File:
        name = (series.name,)
        return _File(series.first, name, self.label, self.prefix, f"patient_{series.patient}", series.modality, False)

    def _sorted_out(self, place: str, names: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
        """(name, ending) of the images and names of the DICOM files; the others are counted."""
        images, dicom = [], []
        for name in names:
            path = os.path.join(place, name)
            ending = ending_of(name)
            if _excluded(os.path.relpath(path, self.folder), self.exclude):
                self.unread["left out as asked"] += 1
            elif name.startswith("."):
                self.unread["hidden"] += 1
            elif ending is not None:
                images.append((name, ending))
            elif is_dicom(path) and name.upper() != "DICOMDIR":
                dicom.append(name)
            else:
                self.unread[os.path.splitext(name)[1].lower() or "without an ending"] += 1
        return images, dicom

    def _channels(self, place: str, images: Sequence[tuple[str, str]], named: dict[int, str]) -> frozenset[int]:
        """Numbers at the end of names that are channels: from 0 on, in nnU-Net's layout, or where channels are to be stacked."""
        if not (self.stack or named or os.path.basename(place) in IMAGE_FOLDERS):
            return frozenset()
        found = {int(number[1]) for name, ending in images if (number := CHANNEL.search(name[: -len(ending)]))}
        if not self.stack and (0 not in found or (named and max(found) >= len(named))):
            return frozenset({0}) & frozenset(found) if 0 in found else frozenset()
        return frozenset(found)

    def _places(self) -> Iterator[tuple[str, list[str]]]:
        """(folder, names of its files) for the folder and those below it, links followed, each once, all in order."""
        seen = set()
        for place, folders, names in os.walk(self.folder, followlinks=True):
            real = os.path.realpath(place)
            if real in seen:  # a link to a folder above it would be followed for ever
                folders.clear()
                continue
            seen.add(real)
            if set(IMAGE_FOLDERS) & set(folders):
                for other in (*names, *(f for f in folders if f not in IMAGE_FOLDERS)):
                    self.unread["beside imagesTr"] += _count(os.path.join(place, other))
                folders[:] = [f for f in IMAGE_FOLDERS if f in folders]
                names = []
            self.unread["hidden"] += sum(_count(os.path.join(place, f)) for f in folders if f.startswith("."))
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            yield place, sorted(names)

    def _channel_names(self) -> dict[int, str]:
        """Of nnU-Net's dataset.json, where the folder is a raw dataset or imagesTr or imagesTs of one: in its order, as nnU-Net
        takes them, whatever their keys are. Another program's file of this name is said and left."""
        path = next((p for p in (self.folder / "dataset.json", self.folder.parent / "dataset.json") if p.is_file()), None)
        if path is None:
            return {}
        try:
            content = read_object(path)
            names = content.get("channel_names", content.get("modality"))
            if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
                raise ValueError(f"{path}: expected channel_names as nnU-Net has them, {{number: name}}, found {names!r:.80}.")
        except ValueError as e:
            self.remarks.append(f"WARNING: names of channels are not known. {e}")
            return {}
        return dict(enumerate(names.values()))


def _count(path: str) -> int:
    """Files at or below a path."""
    return sum(len(names) for _, _, names in os.walk(path)) if os.path.isdir(path) else 1


def _bids(folders: Sequence[str], stem: str, several: bool) -> str:
    """The subject by BIDS: a whole folder's name ``sub-X``, where ``several`` subjects have one or the file is called so, too."""
    begin = BIDS.match(stem)
    named = begin.group() if begin and stem[begin.end() :][:1] in ("", "_") else ""
    folder = next((p for p in folders if BIDS.fullmatch(p)), "")
    return folder if folder and (several or named == folder) else named


def _from_table(table: Path, exclude: Sequence[str]) -> Iterator[_File]:
    """Every row: ``path`` and optionally ``dataset``, ``subject``, ``modality``; paths relative to the table's folder.

    Rows that name no image of nnU-Net's are cases, too: they are rejected with the other unusable ones.
    """
    if not table.is_file():
        raise ValueError(f"`table={table}`: no such file.")
    for line, row in read_table(table, ("path",)):
        if not row["path"]:
            raise ValueError(f"`table={table}`, line {line}: expected a path in column path, found none.")
        path = os.path.abspath(table.parent / row["path"])
        if _excluded(row["path"], exclude):
            continue
        label = _clean(row.get("dataset") or table.stem)
        subject = row.get("subject") or ""
        if ending_of(path) is None and (series := _series_at(path)):
            name, subject = series.name, subject or f"patient_{series.patient}"
            yield _File(series.first, (name,), label, label, subject, row.get("modality") or series.modality, False)
            continue
        ending = ending_of(path) or os.path.splitext(path)[1]
        name = os.path.basename(path)
        name = name[: len(name) - len(ending)]
        parts = (subject, name) if subject and subject not in name else (name,)
        yield _File(path, parts, label, label, subject, row.get("modality") or "", False)


def _series_at(path: str) -> Series | None:
    """The series in a folder, or the one that a DICOM file belongs to."""
    if os.path.isdir(path):
        found, _ = series_in(path, [e.name for e in os.scandir(path) if e.is_file() and is_dicom(e.path)])
        return found[0] if len(found) == 1 else None
    found = series_in(os.path.dirname(path), [os.path.basename(path)])[0] if is_dicom(path) else []
    return found[0] if found else None


def _excluded(relative: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(relative, p) or fnmatch.fnmatch(os.path.basename(relative), p) for p in patterns)


def channel_numbers(files: Sequence[str]) -> tuple[int, ...]:
    """The channels that the names of a case's files say; 0 for a name without a number."""
    names = (os.path.basename(f) for f in files)
    found = (CHANNEL.search(n[: -len(ending_of(n) or "") or None]) for n in names)
    return tuple(int(number[1]) if number else 0 for number in found)


def _stacked(files: Iterable[_File]) -> list[list[_File]]:
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
        numbered = first.numbered or not split
        base = (*first.parts[:-1], CHANNEL.sub("", first.parts[-1]) if numbered else first.parts[-1])
        # Split, channel 0 of nnU-Net's layout is called like the case, so names stay when a case gets more channels.
        channel_0 = first.numbered and first.parts[-1].endswith("_0000")
        parts = first.parts if split and not channel_0 else base
        key = known.get(files) or _key([first.prefix, *parts])
        if taken.setdefault(key, files) != files:
            key = _shortened(key, hashlib.sha256(os.fsencode(files[0])))
            taken[key] = files
        subject = "__".join(p for p in (first.prefix, *([first.subject] if first.subject else base)) if p)
        modality = ";".join(f.modality for f in group) if all(f.modality for f in group) else ""
        cases.append(Candidate(key, files, first.dataset, subject, modality))
    return sorted(cases, key=lambda c: c.key)


def _key(parts: Sequence[str]) -> str:
    """A file name from name parts."""
    key = "__".join(_clean(p) for p in parts if p)
    if len(os.fsencode(key)) > LONGEST_KEY:
        key = _shortened(key, hashlib.sha256(os.fsencode(key)))
    return key + "_" if key.endswith("_seg") else key  # nnU-Net takes *_seg.b2nd for a segmentation


def _shortened(key: str, digest: Any) -> str:
    """Short enough for a file's name, and still one of its own."""
    return f"{os.fsencode(key)[: LONGEST_KEY - 9].decode('utf-8', 'ignore')}_{digest.hexdigest()[:8]}"


def _clean(text: str) -> str:
    """What a file's name may hold everywhere: letters and digits of any script, and ``._+-``."""
    return re.sub(r"[^\w.+-]+", "_", unicodedata.normalize("NFC", text))
