"""The cases of a pretraining dataset: looked at once, remembered, duplicates found.

``cva_sources.json``   where the images come from
``cva_inspection.jsonl``  one line per case looked at, appended as it happens; a killed run goes on from there
``cases.csv``          the cases that are used
``rejected.csv``       the others, each with its reason
``cva_key.csv``        what neutral names stand for, where they were asked for
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from nnunetv2_cva.datasets.anonymous import neutral
from nnunetv2_cva.datasets.findings import Finding, inspect_case, killed, stamp_of
from nnunetv2_cva.datasets.parallel import Progress, for_each
from nnunetv2_cva.datasets.sources import Candidate, Sources, candidates, channel_numbers
from nnunetv2_cva.datasets.tables import read_table, write_table
from nnunetv2_cva.files import read_object, write_json
from nnunetv2_cva.sizes import by

SOURCES, INSPECTION, CASES, REJECTED = "cva_sources.json", "cva_inspection.jsonl", "cases.csv", "rejected.csv"
BROKEN = (TypeError, ValueError, KeyError, AttributeError, RecursionError)  # of content that is not what was written
COLUMNS = ("case", "dataset", "subject", "modality", "shape", "spacing", "sha256", "path")


@dataclass(frozen=True)
class Inventory:
    """``accepted`` and ``rejected`` cases, ordered by name; ``unread``: other files by kind; ``remarks``: on the sources."""

    accepted: tuple[Finding, ...]
    rejected: tuple[Finding, ...]
    unread: dict[str, int] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        return self.accepted[0].channels

    def without(self, identities: Collection[str], reason: str) -> Inventory:
        """These cases rejected, too."""
        out = tuple(replace(f, reason=reason) for f in self.accepted if f.identity in identities)
        kept = tuple(f for f in self.accepted if f.identity not in identities)
        return replace(self, accepted=kept, rejected=tuple(sorted(self.rejected + out, key=lambda f: f.key)))


def take_inventory(folder: Path, sources: Sources, own: str, processes: int, progress: Progress) -> Inventory:
    """Look at every case of the sources that has not been looked at. The lists in ``folder`` stay as they are (``save_lists``).

    Raises:
        ValueError: a folder or table of the sources does not exist or holds no images.
    """
    known = {files: f.key for files, f in read_findings(folder).items() if f.key}
    found = candidates(sources, own, known)
    cases = neutral(found.cases, folder) if sources.anonymous else list(found.cases)
    looked = remembered(inspect_case, cases, folder, processes, progress, "Looking at images")
    used = {row["case"] for _, row in read_table(folder / CASES, ("case",))}
    inventory = sorted_out([looked[c.files].of(c) for c in cases], sources.channels == "stack", used)
    return replace(inventory, unread=found.unread, remarks=found.remarks)


def save_lists(folder: Path, sources: Sources, inventory: Inventory, cases: bool = True) -> None:
    """Write ``cases.csv`` (unless the cases are preprocessed already), ``rejected.csv`` and the sources.

    Raises:
        ValueError: not one case that can be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if inventory.accepted:
        write_json(folder / SOURCES, sources.as_dict())
        if cases:
            _write_cases(folder, inventory.accepted)
    write_rejected(folder, ((f.key, f.reason, ";".join(f.files)) for f in inventory.rejected))
    if not inventory.accepted:
        raise ValueError(f"None of {len(inventory.rejected)} cases can be used; {folder / REJECTED} has the reasons.")


def remembered(
    look: Callable[[Candidate], Finding], cases: Sequence[Candidate], folder: Path, processes: int, progress: Progress, what: str
) -> dict[tuple[str, ...], Finding]:
    """What is in these cases, by files; ``look`` reads those that have not been looked at or have changed since."""
    folder.mkdir(parents=True, exist_ok=True)
    known = read_findings(folder)
    todo = [c for c in cases if _outdated(known.get(c.files), c)]
    with open(folder / INSPECTION, "a", encoding="utf-8") as log:

        def note(finding: Finding) -> None:
            log.write(json.dumps(finding.as_dict()) + "\n")
            log.flush()
            known[finding.files] = finding

        for_each(look, todo, processes, note, killed, progress, what)
    return known


def read_findings(folder: Path) -> dict[tuple[str, ...], Finding]:
    """What was looked at so far, by files. The last line of a killed run may be torn and is dropped.

    Raises:
        ValueError: another line is no finding.
    """
    path = folder / INSPECTION
    findings: dict[tuple[str, ...], Finding] = {}
    if not path.is_file():
        return findings
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):  # else the next line would be glued to it
        os.truncate(path, len(whole))
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            finding = Finding.from_dict(json.loads(line))
            findings[finding.files] = finding
        except BROKEN:
            raise ValueError(f"{path}, line {number} is damaged. Delete the file: planning again makes it anew.") from None
    return findings


def read_sources(folder: Path) -> Sources | None:
    """The sources given before, or None.

    Raises:
        ValueError: the file holds something else.
    """
    path = folder / SOURCES
    if not path.is_file():
        return None
    content = read_object(path)
    try:
        return Sources.from_dict(content)
    except BROKEN:
        raise ValueError(f"{path} does not say where images come from. Delete it, and plan with images given anew.") from None


def read_accepted(folder: Path) -> list[Finding]:
    """The cases listed in ``cases.csv``, from which a user may delete lines.

    Raises:
        ValueError: there is no such list.
    """
    path = folder / CASES
    if not path.is_file():
        raise ValueError(f"{path} not found: plan {folder.name} first (nnUNetv2_cva plan).")
    findings = {";".join(files): finding for files, finding in read_findings(folder).items()}
    accepted = []
    for _, row in read_table(path, COLUMNS):
        finding = findings.get(row["path"])
        if finding is None:
            raise ValueError(f"{path}: {row['path']} was never looked at. Plan {folder.name} again (nnUNetv2_cva plan).")
        named = Candidate(row["case"], finding.files, row["dataset"], row["subject"], row["modality"])
        accepted.append(finding.of(named))
    return sorted(accepted, key=lambda f: f.key)


def reject(folder: Path, reasons: Mapping[str, str]) -> None:
    """Move these cases, by name, from ``cases.csv`` to ``rejected.csv``."""
    accepted = read_accepted(folder)
    _write_cases(folder, [f for f in accepted if f.key not in reasons])
    out = [(f.key, reasons[f.key], ";".join(f.files)) for f in accepted if f.key in reasons]
    write_rejected(folder, [*read_rejected(folder), *out])


def read_rejected(folder: Path) -> list[tuple[str, str, str]]:
    """(case, reason, path) of every line of ``rejected.csv``."""
    return [(row["case"], row["reason"], row["path"]) for _, row in read_table(folder / REJECTED, ("case", "reason", "path"))]


def write_rejected(folder: Path, rows: Iterable[tuple[str, str, str]]) -> None:
    """``rejected.csv``, from (case, reason, path)."""
    write_table(folder / REJECTED, ("case", "reason", "path"), sorted(rows))


def _outdated(finding: Finding | None, candidate: Candidate) -> bool:
    return finding is None or not finding.settled or finding.stamp != stamp_of(candidate.files)


def sorted_out(findings: Sequence[Finding], stacked: bool, used: Collection[str] = ()) -> Inventory:
    """Of cases with the same voxels one is kept: the one ``used`` before, else the first by name; of different channels those
    that most cases have. ``stacked``: whether the files of a case are its channels."""

    def channels(f: Finding) -> tuple[int, ...]:
        return channel_numbers(f.files) if stacked else tuple(range(f.channels))

    accepted, rejected, usable = [], [], []
    for f in findings:
        if f.reason:
            rejected.append(f)
        elif len(set(channels(f))) < len(channels(f)):
            rejected.append(replace(f, reason=f"several files for one channel: {_listed(channels(f))}"))
        else:
            usable.append(f)
    usual = max(sorted({channels(f) for f in usable}), key=Counter(map(channels, usable)).__getitem__, default=())
    first: dict[str, str] = {}
    for f in sorted(usable, key=lambda f: (f.key not in used, f.key)):
        if channels(f) != usual:
            rejected.append(replace(f, reason=f"channels {_listed(channels(f))}, most cases have channels {_listed(usual)}"))
        elif first.setdefault(f.identity, f.key) != f.key:
            rejected.append(replace(f, reason=f"duplicate of {first[f.identity]}"))
        else:
            accepted.append(f)
    return Inventory(tuple(sorted(accepted, key=lambda f: f.key)), tuple(sorted(rejected, key=lambda f: f.key)))


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _write_cases(folder: Path, accepted: Sequence[Finding]) -> None:
    rows = ((f.key, f.dataset, f.subject, f.modality, by(f.shape), by(f.spacing), f.content, ";".join(f.files)) for f in accepted)
    write_table(folder / CASES, COLUMNS, rows)
