"""The cases of a pretraining dataset: looked at once, remembered, duplicates found.

``cva_sources.json``   where the images come from
``cva_inspection.jsonl``  one line per case looked at, appended as it happens; a killed run goes on from there
``cases.csv``          the cases that are used
``rejected.csv``       the others, each with its reason
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunetv2_cva.datasets.inspect import Finding, inspect_case, stamp_of
from nnunetv2_cva.datasets.parallel import for_each
from nnunetv2_cva.datasets.sources import Candidate, Sources, candidates

SOURCES, INSPECTION, CASES, REJECTED = "cva_sources.json", "cva_inspection.jsonl", "cases.csv", "rejected.csv"


@dataclass(frozen=True)
class Inventory:
    """``accepted`` and ``rejected`` cases, ordered by name."""

    accepted: tuple[Finding, ...]
    rejected: tuple[Finding, ...]

    @property
    def channels(self) -> int:
        return len(self.accepted[0].files)


def take_inventory(
    folder: Path, sources: Sources, own: str, processes: int, started: Callable[[int], Any], tick: Callable[[], Any]
) -> Inventory:
    """Look at every case of the sources that has not been looked at, and write the lists into ``folder``.

    ``started(n)`` is told how many cases have to be read, ``tick()`` is called after each.

    Raises:
        ValueError: no sources, or not one case that can be used.
    """
    known = {files: f.key for files, f in read_findings(folder).items() if f.key}
    found = candidates(sources, own, known)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SOURCES, sources.as_dict())
    looked = look_at(found, folder, processes, started, tick)
    inventory = _sorted_out([looked[c.files].of(c) for c in found])
    _write_lists(folder, inventory)
    if not inventory.accepted:
        raise ValueError(f"None of {len(found)} cases can be used; {folder / REJECTED} has the reasons.")
    return inventory


def hold_out(folder: Path, sources: Sources, inventory: Inventory, keys: set[str]) -> Inventory:
    """The inventory without these cases, which are noted as rejected, and in the sources: they stay out."""
    out = tuple(replace(f, reason="held out: a target validates on it") for f in inventory.accepted if f.key in keys)
    kept = Inventory(
        tuple(f for f in inventory.accepted if f.key not in keys),
        tuple(sorted(inventory.rejected + out, key=lambda f: f.key)),
    )
    if not kept.accepted:
        raise ValueError("--hold-out leaves no image to pretrain on.")
    _write_lists(folder, kept)
    contents = tuple(sorted({f.content for f in out}))
    write_json(folder / SOURCES, replace(sources, held_out=contents).as_dict())
    return kept


def look_at(
    cases: Sequence[Candidate], folder: Path, processes: int, started: Callable[[int], Any], tick: Callable[[], Any]
) -> dict[tuple[str, ...], Finding]:
    """What is in these cases, by files; reads those that have not been looked at or have changed since."""
    folder.mkdir(parents=True, exist_ok=True)
    remembered = read_findings(folder)
    todo = [c for c in cases if _outdated(remembered.get(c.files), c)]
    started(len(todo))
    with open(folder / INSPECTION, "a", encoding="utf-8") as log:

        def note(finding: Finding) -> None:
            log.write(json.dumps(finding.as_dict()) + "\n")
            log.flush()
            remembered[finding.files] = finding
            tick()

        for_each(inspect_case, todo, processes, note)
    return remembered


def read_findings(folder: Path) -> dict[tuple[str, ...], Finding]:
    """What was looked at so far, by files. The last line of a killed run may be torn and is dropped."""
    path = folder / INSPECTION
    findings: dict[tuple[str, ...], Finding] = {}
    if not path.is_file():
        return findings
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):  # else the next line would be glued to it
        os.truncate(path, len(whole))
    for line in whole.splitlines():
        finding = Finding.from_dict(json.loads(line))
        findings[finding.files] = finding
    return findings


def read_sources(folder: Path) -> Sources | None:
    """The sources given before, or None."""
    path = folder / SOURCES
    return Sources.from_dict(json.loads(path.read_text())) if path.is_file() else None


def read_accepted(folder: Path) -> list[Finding]:
    """The cases listed in ``cases.csv``, from which a user may delete lines.

    Raises:
        ValueError: there is no such list.
    """
    path = folder / CASES
    if not path.is_file():
        raise ValueError(f"{path} not found: run `nnUNetv2_cva plan -d {folder.name}` first.")
    findings = read_findings(folder)
    accepted = []
    with open(path, newline="", encoding="utf-8") as f:
        for row in csv.DictReader(f):
            finding = findings.get(tuple(row["path"].split(";")))
            if finding is None:
                raise ValueError(f"{path}: {row['path']} was never looked at. Run `nnUNetv2_cva plan -d {folder.name}` again.")
            named = Candidate(row["case"], finding.files, row["dataset"], row["subject"], row["modality"])
            accepted.append(finding.of(named))
    return sorted(accepted, key=lambda f: f.key)


def read_rejected(folder: Path) -> list[tuple[str, str, str]]:
    """(case, reason, path) of every line of ``rejected.csv``."""
    path = folder / REJECTED
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as f:
        return [(row["case"], row["reason"], row["path"]) for row in csv.DictReader(f)]


def write_rejected(folder: Path, rows: Iterable[tuple[str, str, str]]) -> None:
    write_table(folder / REJECTED, ("case", "reason", "path"), sorted(rows))


def _outdated(finding: Finding | None, candidate: Candidate) -> bool:
    return finding is None or finding.stamp != stamp_of(candidate.files)


def _sorted_out(findings: Sequence[Finding]) -> Inventory:
    """Of cases with the same voxels the first by name is kept; of different numbers of channels the most frequent."""
    usable = [f for f in findings if not f.reason]
    counts = [len(f.files) for f in usable]
    channels = max(sorted(set(counts)), key=counts.count, default=1)
    first: dict[str, str] = {}
    accepted, rejected = [], [f for f in findings if f.reason]
    for f in usable:
        if len(f.files) != channels:
            rejected.append(replace(f, reason=f"{len(f.files)} channels, most cases have {channels}"))
        elif first.setdefault(f.content, f.key) != f.key:
            rejected.append(replace(f, reason=f"duplicate of {first[f.content]}"))
        else:
            accepted.append(f)
    return Inventory(tuple(accepted), tuple(sorted(rejected, key=lambda f: f.key)))


def _write_lists(folder: Path, inventory: Inventory) -> None:
    rows = (
        (f.key, f.dataset, f.subject, f.modality, _by(f.shape), _by(f.spacing), f.content, ";".join(f.files))
        for f in inventory.accepted
    )
    write_table(folder / CASES, ("case", "dataset", "subject", "modality", "shape", "spacing", "sha256", "path"), rows)
    write_rejected(folder, ((f.key, f.reason, ";".join(f.files)) for f in inventory.rejected))


def _by(numbers: Sequence[float]) -> str:
    return "x".join(f"{n:g}" for n in numbers)


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A csv file, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with open(partial, "w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    os.replace(partial, path)


def write_json(path: Path, content: Any) -> None:
    """A JSON file, whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
