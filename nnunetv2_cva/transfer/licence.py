"""Under which terms weights may be passed on: what files say, what is known of published ones, and how terms are inherited.

This is a help to keep what others ask for in sight, and no legal advice.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_cva.files import read_json

NOT_STATED = "not stated"
VARIABLE = "nnUNet_cva_known_weights"  # a JSON file: more entries like those below, which go before them
OPENMIND = (
    "Wald, T., Ulrich, C., Suprijadi, J., Ziegler, S., Nohel, M., Peretzke, R., et al. (2024). An OpenMind for 3D medical vision "
    "self-supervised learning. arXiv preprint arXiv:2412.17041."
)
# By the repository on the Hugging Face hub, or by the dataset of nnssl's plans in the file; * stands for any letters. The file's
# ``sha256`` counts, too.
KNOWN: tuple[dict[str, str], ...] = (
    {
        "repository": "MIC-DKFZ/nnFoundation*",
        "licence": "CC-BY-SA-4.0",
        "name": "nnFoundation",
        "citation": "nnFoundation. arXiv preprint arXiv:2609.26924.",
        "source": "https://huggingface.co/MIC-DKFZ/nnFoundationCNN",
    },
    {
        "repository": "*/*-OpenMind-*",
        "dataset": "Dataset745_*",
        "licence": "CC-BY-4.0",
        "name": "OpenMind",
        "citation": OPENMIND,
        "source": "https://huggingface.co/MIC-DKFZ",
    },
)
_TERMS = {
    "non-commercial": r"\bNC\b|non.?commercial",
    "share-alike": r"\bSA\b|share.?alike|\bA?GPL",
    "no-derivatives": r"\bND\b|no.?deriv",
}
_MEANING = {
    "non-commercial": "no commercial use",
    "share-alike": "what is made of them goes under the same licence",
    "no-derivatives": "what is made of them may not be passed on",
}


@dataclass(frozen=True)
class Known:
    """What is known of a published file."""

    licence: str
    name: str
    citation: str
    source: str


def known(origin: str, file: Path, card: Mapping[str, Any]) -> Known | None:
    """What is known of ``file``, which came from ``origin`` (as it was given: a path, or ``hf://...``).

    Raises:
        ValueError: the user's own table cannot be read.
    """
    repository = re.match(r"hf://([^/@]+/[^/@]+)", origin)
    plans = card.get("plans")
    theirs = isinstance(plans, Mapping) and str(plans.get("plans_name")).startswith("nnssl")
    dataset = plans.get("dataset_name") if isinstance(plans, Mapping) and theirs else None
    table = (*_own_table(), *KNOWN)
    digest = _sha256(file) if any("sha256" in found for found in table) else ""
    for entry in table:
        hits = [repository is not None and _like(entry.get("repository"), repository.group(1))]
        hits += [isinstance(dataset, str) and _like(entry.get("dataset"), dataset)]
        if any(hits) or (digest and digest == entry.get("sha256")):
            return Known(*(str(entry.get(k, "")) for k in ("licence", "name", "citation", "source")))
    return None


def terms(licence: str) -> set[str]:
    """What of the usual restrictions a licence's name says: non-commercial, share-alike, no-derivatives."""
    return {term for term, pattern in _TERMS.items() if re.search(pattern, licence, re.IGNORECASE)}


def chosen(given: str | None, stated: Any, path: Path) -> str:
    """The licence of what is made of weights under ``stated``: ``given``, if it keeps their terms, else theirs.

    Raises:
        ValueError: ``given`` would loosen what the weights were given under; names what would be lost.
    """
    before = stated if isinstance(stated, str) and stated != NOT_STATED else None
    if given is None:
        return before or NOT_STATED
    lost = terms(before or "") - terms(given)
    if lost:
        raise ValueError(
            f"{path} is under {before} ({', '.join(sorted(lost))}), which {given!r} would drop. What is made of them inherits "
            "these terms: state a licence that keeps them, or none."
        )
    return given


def reminders(licence: Any) -> list[str]:
    """What to think of before weights under ``licence`` are passed on, a line each."""
    found = terms(licence) if isinstance(licence, str) else set()
    return [f"the weights are under {licence}, {term}: {_MEANING[term]}" for term in _TERMS if term in found]


def _own_table() -> list[dict[str, Any]]:
    file = os.environ.get(VARIABLE)
    if not file:
        return []
    content = read_json(file)
    if not isinstance(content, list) or not all(isinstance(e, dict) and isinstance(e.get("licence"), str) for e in content):
        raise ValueError(f"{file} ({VARIABLE}): expected a list of objects with a licence and a repository, dataset or sha256.")
    return content


def _like(pattern: str | None, text: str) -> bool:
    return bool(pattern) and re.fullmatch(".*".join(map(re.escape, str(pattern).split("*"))), text, re.IGNORECASE) is not None


def _sha256(file: Path) -> str:
    found = hashlib.sha256()
    with open(file, "rb") as f:
        while part := f.read(2**20):
            found.update(part)
    return found.hexdigest()
