"""Runs that ``benchmarks/verdicts.py`` recorded, with their epochs as ``metrics.jsonl`` has them."""

import json
from pathlib import Path


def read(line):
    run = json.loads(line)
    count = run["epochs"]
    lists = {k: v if isinstance(v, list) else [v] * count for k, v in run["metrics"].items()}
    return {**run, "epochs": [{"epoch": n, **{k: v[n] for k, v in lists.items()}} for n in range(count)]}


RECORDED = [read(line) for line in (Path(__file__).parents[1] / "recorded_runs.jsonl").read_text().splitlines()]
