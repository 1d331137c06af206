"""What the documents say can be found where they say it."""

import re
from pathlib import Path

import pytest

from nnunetv2_cva.training.metrics import METRICS

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere_and_nothing_waits_to_be_filled_in(document):
    text = document.read_text(encoding="utf-8")
    links = [target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target]
    assert [target for target in links if not (document.parent / target).exists()] == []
    assert re.findall(r"^[A-Z][A-Z_]{4,}$", text, re.MULTILINE) == [], "a placeholder"


def test_the_readme_has_the_table_of_metrics():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [f"| `{m.name}` | {m.meaning} | {m.better} |" for m in METRICS.values()]
    assert "\n".join(rows) in text


def test_every_benchmark_is_described():
    text = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "benchmarks").glob("*.md"))
    parts = {"subjects.py", "timing.py", "made.py", "gpu_items.py", "gpu_report.py", "gpu_steps.py", "gpu_tables.py"}
    scripts = {p.name for p in (ROOT / "benchmarks").glob("*.py")} - parts
    assert {name for name in scripts if name not in text} == set()


def test_files_that_developing_names_are_there():
    text = (ROOT / "docs" / "developing.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+\.(?:py|md))`", text))
    assert len(named) > 25
    assert {name for name in named if not any((ROOT / place / name).exists() for place in ("", "nnunetv2_cva", "docs"))} == {
        "utils.py"
    }
