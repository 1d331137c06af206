"""The tables of evidence.py: paired differences with intervals, and numbers beside their nulls."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import light
import numpy as np
from arms import COMPARED, EXPERIMENTS, RECIPES, SCRATCH
from nulls import with_nulls
from scipy import stats


def value(row: dict[str, Any], what: str) -> float:
    """``dice`` or ``foreground`` at the end of a fine-tuning, or ``area`` of its foreground."""
    return light.area(row["points"], row["foreground"]) if what == "area" else row[what][-1]


def matrix(rows: list[dict[str, Any]], recipe: str, labels: tuple[int, ...], what: str) -> dict[tuple[int, int], float]:
    """(seed, split) -> mean over the numbers of labels, where all of them are there."""
    found: dict[tuple[int, int], dict[int, float]] = {}
    for r in rows:
        if r["recipe"] == recipe and r["labels"] in labels:
            found.setdefault((r["seed"], r["split"]), {})[r["labels"]] = value(r, what)
    return {key: float(np.mean([*v.values()])) for key, v in found.items() if len(v) == len(labels)}


@dataclass(frozen=True)
class Difference:
    mean: float
    half: float  # of the 95 % interval; nan with a single seed and split
    ahead: int  # splits, mean over the seeds
    splits: int
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.half:.3f}, {self.ahead} of {self.splits}"


def difference(
    first: dict[tuple[int, int], float], second: dict[tuple[int, int], float], scratch: bool = False
) -> Difference | None:
    """first - second, paired by split and pretraining seed; ``scratch``: the second has no pretraining, paired by split.

    The interval counts seeds and splits as two samples, since another user has another of both: variance of the seeds' means
    over their number plus the same of the splits, Welch-Satterthwaite's degrees of freedom. With one seed it is that of the
    splits, and says nothing about other pretrainings.
    """
    partner = {key: (0 if scratch else key[0], key[1]) for key in first}
    pairs = {key: first[key] - second[partner[key]] for key in first if partner[key] in second}
    splits, seeds = sorted({s for _, s in pairs}), sorted({s for s, _ in pairs})
    if not pairs:
        return None
    by_split = [np.mean([d for (_, s), d in pairs.items() if s == split]) for split in splits]
    by_seed = [np.mean([d for (s, _), d in pairs.items() if s == seed]) for seed in seeds]
    samples = [s for s in (by_split, by_seed) if len(s) > 1]
    parts = [(np.var(s, ddof=1) / len(s), len(s) - 1) for s in samples]
    variance = sum(v for v, _ in parts)
    freedom = variance**2 / sum(v**2 / n for v, n in parts) if variance > 0 else 1
    half = float(stats.t.ppf(0.975, freedom) * variance**0.5) if parts else float("nan")
    return Difference(float(np.mean([*pairs.values()])), half, int(sum(m > 0 for m in by_split)), len(splits), len(seeds))


def rows_of(name: str, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fine-tunings of an experiment, whichever asked for them; scratch takes no part of anything."""
    e = EXPERIMENTS[name]
    wanted = {"data": e.data, **asdict(e.protocol)}
    ours = {"recipe": e.recipes, "seed": e.seeds, "split": e.splits, "labels": e.labels}
    rows = [r for r in results if r["kind"] == "fine-tune" and all(r[k] in v for k, v in ours.items())]
    return [r for r in rows if all(r.get(k) == v or (r["recipe"], k) == (SCRATCH, "part") for k, v in wanted.items())]


def comparisons(results: list[dict[str, Any]]) -> str:
    """Arms against each other, mean over the numbers of labels that both have."""
    lines = [
        "### arms against each other",
        "",
        "| first | second | labels | seeds | Dice | foreground | area |",
        "|---" * 7 + "|",
    ]
    for one, first, two, second in COMPARED:
        labels = tuple(n for n in EXPERIMENTS[one].labels if n in EXPERIMENTS[two].labels)
        rows = rows_of(one, results), rows_of(two, results)
        gaps = [
            difference(matrix(rows[0], first, labels, what), matrix(rows[1], second, labels, what))
            for what in ("dice", "foreground", "area")
        ]
        if gaps[0] is not None:
            cells = [f"{one}: {first}", f"{two}: {second}", ", ".join(map(str, labels)), gaps[0].seeds, *gaps]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def table(name: str, results: list[dict[str, Any]]) -> str:
    """One experiment: every recipe against scratch, and against the first other one."""
    e = EXPERIMENTS[name]
    rows = rows_of(name, results)
    against = e.against or SCRATCH
    lines = [
        f"### {name}", "", f"Expected: {e.expected}", "",
        f"{e.protocol}, labels {e.labels}, pretraining seeds {e.seeds}, splits {e.splits}", "",
        "| pretraining | labels | seeds | Dice | foreground | "
        f"Dice - {against} | foreground - {against} | area - {against} | per seed, Dice - {against} |", "|---" * 9 + "|",
    ]  # fmt: skip
    for recipe in e.recipes:
        for labels in [(n,) for n in e.labels] + ([e.labels] if len(e.labels) > 1 else []):
            own = {what: matrix(rows, recipe, labels, what) for what in ("dice", "foreground", "area")}
            if not own["dice"]:
                continue
            means = [f"{np.mean([*own[what].values()]):.3f}" for what in ("dice", "foreground")]
            other = {what: matrix(rows, against, labels, what) for what in own}
            gaps = [str(difference(own[w], other[w], against == SCRATCH)) if recipe != against else "" for w in own]
            seeds = sorted({s for s, _ in own["dice"]})
            each = [
                difference({k: v for k, v in own["dice"].items() if k[0] == s}, other["dice"], against == SCRATCH) for s in seeds
            ]
            per_seed = " ".join(f"{d.mean:+.3f}" for d in each if d) if recipe != against else ""
            cells = [recipe, ", ".join(map(str, labels)), "" if recipe == SCRATCH else str(len(seeds)), *means, *gaps, per_seed]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def null_table(results: list[dict[str, Any]], data: str) -> str:
    """Every number of a pretraining and behind it its nulls, mean over the seeds."""
    shown = ("alignment", "retrieval", "contrastive", "reconstruction", "features alignment")
    lines = [f"### nulls, {data}", "", "| pretraining | seeds | " + " | ".join(shown) + " |", "|---" * (len(shown) + 2) + "|"]
    for recipe in RECIPES:
        rows = [r for r in results if (r["kind"], r["data"], r["recipe"]) == ("nulls", data, recipe)]
        rows.sort(key=len, reverse=True)
        if rows:
            keys = [k for k in rows[0] if isinstance(rows[0][k], float)]
            means = {k: float(np.mean([r[k] for r in rows if k in r])) for k in keys}
            cells = [with_nulls(means, name) if name in means else "" for name in shown]
            lines.append(f"| {recipe} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
