"""Names that say nothing of a patient, for cases and subjects; what they stand for is in a key file that is not passed on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from nnunetv2_cva.datasets.sources import Candidate
from nnunetv2_cva.datasets.tables import read_table, write_table

KEY = "cva_key.csv"
COLUMNS = ("case", "subject", "known_as", "path")


def neutral(cases: Sequence[Candidate], folder: Path) -> list[Candidate]:
    """The cases as ``case_0001`` ... of ``subject_0001`` ..., in the order of the new names; written into the key file in
    ``folder``. Cases and subjects that it holds keep their names.

    Raises:
        ValueError: the key file is no table of ours any more.
    """
    rows = [row for _, row in read_table(folder / KEY, COLUMNS)]
    named = {row["path"]: row["case"] for row in rows}
    subjects = {row["known_as"]: row["subject"] for row in rows}
    of_paths = {row["path"]: row["known_as"] for row in rows}
    next_case, next_subject = _beyond(named.values()), _beyond(subjects.values())
    found = []
    for case in sorted(cases, key=lambda c: c.files):
        path = ";".join(case.files)
        if path not in named:
            named[path], next_case = f"case_{next_case:04d}", next_case + 1
        known_as = of_paths.setdefault(path, case.subject)
        if known_as not in subjects:
            subjects[known_as], next_subject = f"subject_{next_subject:04d}", next_subject + 1
        found.append(replace(case, key=named[path], subject=subjects[known_as]))
    folder.mkdir(parents=True, exist_ok=True)
    write_table(folder / KEY, COLUMNS, sorted((n, subjects[of_paths[path]], of_paths[path], path) for path, n in named.items()))
    return sorted(found, key=lambda c: c.key)


def _beyond(names: Iterable[str]) -> int:
    numbers = [int(n) for name in names for n in re.findall(r"_(\d+)$", name)]
    return max(numbers, default=0) + 1
