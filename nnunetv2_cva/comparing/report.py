"""What a comparison found: differences between arms that share splits, as a table, in one sentence each, as plain types."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nnunetv2_cva.comparing.design import SCRATCH, Design, Job
from nnunetv2_cva.comparing.statistics import Paired, paired

MEASURES = {
    "dice": "Dice at the end, mean over structures and test cases",
    "foreground": "Dice at the end of all foreground as one",
    "curve": "Dice, mean over the points of the learning curve",
}


@dataclass(frozen=True)
class Score:
    """Of one job. ``curve``: (iteration, Dice) per point; ``values``: by measure."""

    curve: tuple[tuple[int, float], ...]
    values: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """``arm`` minus ``against``, with this many labels (None: their mean, per split), in this measure."""

    arm: str
    against: str
    labels: int | None
    measure: str
    found: Paired


def score(points: Sequence[Mapping[str, Any]]) -> Score:
    """``points`` of a result (job.py). A structure that neither truth nor segmentation has does not count."""
    curve = tuple((int(p["iteration"]), _mean(_mean(each.values()) for each in p["dice"].values())) for p in points)
    values = {
        "dice": curve[-1][1],
        "foreground": _mean(points[-1]["foreground"].values()),
        "curve": float(np.mean([dice for _, dice in curve])),
    }
    return Score(curve, values)


def _mean(values: Iterable[float | None]) -> float:
    known = [v for v in values if v is not None and not np.isnan(v)]
    return float(np.mean(known)) if known else float("nan")


def compare(scores: Mapping[Job, Score], arms: Sequence[str], labels: Sequence[int], seeds: int) -> list[Comparison]:
    """Every arm against those before it (scratch is the first), as far as jobs that share a split are finished."""
    found = []
    for n, arm in enumerate(arms):
        for against in arms[:n]:
            for measure in MEASURES:
                by_labels = [_differences(scores, arm, against, k, seeds, measure) for k in labels]
                shared = [s for s in range(seeds) if all(s in d for d in by_labels)]
                rows: list[tuple[int | None, list[float]]] = [(k, [*d.values()]) for k, d in zip(labels, by_labels)]
                if len(labels) > 1:
                    rows.append((None, [float(np.mean([d[s] for d in by_labels])) for s in shared]))
                found += [Comparison(arm, against, k, measure, paired(d)) for k, d in rows if d]
    return found


def _differences(scores: Mapping[Job, Score], arm: str, against: str, labels: int, seeds: int, measure: str) -> dict[int, float]:
    pairs = {s: (scores.get(Job(arm, labels, s)), scores.get(Job(against, labels, s))) for s in range(seeds)}
    return {s: a.values[measure] - b.values[measure] for s, (a, b) in pairs.items() if a is not None and b is not None}


def main_comparisons(found: Sequence[Comparison], labels: Sequence[int]) -> list[Comparison]:
    """What the sentences are about: every pair of arms, Dice at the end, mean of all labels."""
    wanted = None if len(labels) > 1 else labels[0]
    return [c for c in found if c.measure == "dice" and c.labels == wanted]


def sentence(c: Comparison, scores: Mapping[Job, Score], labels: Sequence[int]) -> str:
    """What may be said; that no gain is shown, too."""
    mine = [s.values["dice"] for job, s in scores.items() if job.arm in (c.arm, c.against)]
    if mine and max(mine) == 0:
        return f"Neither {c.arm} nor {c.against} segments anything yet: train longer."
    p, few = c.found, f"{labels[0]} labelled case{'s' if labels[0] > 1 else ''}"
    by = f"mean of {', '.join(map(str, labels))} labelled cases" if len(labels) > 1 else few
    if p.low is None or p.high is None or p.detectable is None:
        return f"{c.arm} differs from {c.against} by {p.mean:+.3f} Dice in one split ({by}): one split says nothing about chance."
    facts = f"95 % interval {p.low:+.3f} to {p.high:+.3f}, ahead in {p.ahead} of {p.pairs} splits, {by}"
    if p.low > 0:
        return f"{c.arm} gains {p.mean:.3f} Dice over {c.against} ({facts})."
    seen = f"A gain of {p.detectable:.3f} would have been shown four times out of five by a comparison like this."
    if p.high < 0:
        return f"{c.arm} loses {-p.mean:.3f} Dice against {c.against} ({facts})."
    return f"No gain shown of {c.arm} over {c.against}: {p.mean:+.3f} Dice ({facts}). {seen}"


def table(found: Sequence[Comparison], scores: Mapping[Job, Score], arms: Sequence[str], labels: Sequence[int]) -> str:
    """Dice at the end per arm and number of labels, and the paired differences from training from scratch."""
    wide = max(12, *(len(a) for a in arms)) + 2
    head = f"{'labels':<8}{'arm':<{wide}}{'Dice':>7}{'foreground':>12}{'curve':>8}"
    lines = [head + f"{'- scratch':>11}{'95 % interval':>19}{'ahead':>9}{'shows from':>12}"]
    index = {(c.arm, c.labels): c.found for c in found if c.against == SCRATCH and c.measure == "dice"}
    for k in [*labels, *([None] if len(labels) > 1 else [])]:
        for arm in arms:
            mine = [s for job, s in scores.items() if job.arm == arm and k in (None, job.labels)]
            if not mine:
                continue
            means = [float(np.mean([s.values[m] for s in mine])) for m in MEASURES]
            row = f"{'mean' if k is None else k:<8}{arm:<{wide}}{means[0]:>7.3f}{means[1]:>12.3f}{means[2]:>8.3f}"
            lines.append(row + (_differs(index[arm, k]) if (arm, k) in index else ""))
    return "\n".join(lines)


def _differs(p: Paired) -> str:
    if p.low is None or p.high is None or p.detectable is None:
        return f"{p.mean:>+11.3f}{'one split':>19}{f'{p.ahead} of {p.pairs}':>9}"
    interval = f"{p.low:+.3f} to {p.high:+.3f}"
    return f"{p.mean:>+11.3f}{interval:>19}{f'{p.ahead} of {p.pairs}':>9}{p.detectable:>12.3f}"


def as_plain(
    design: Design,
    arms: Sequence[Mapping[str, Any]],
    scores: Mapping[Job, Score],
    found: Sequence[Comparison],
    sentences: Sequence[str],
    unfinished: int,
) -> dict[str, Any]:
    """The content of compare.json."""
    return {
        "sentences": list(sentences),
        "unfinished": unfinished,
        "comparisons": [{**asdict(c), "found": asdict(c.found)} for c in found],
        "measures": MEASURES,
        "arms": [dict(a) for a in arms],
        "scores": [{**asdict(job), **s.values, "learning_curve": [list(p) for p in s.curve]} for job, s in scores.items()],
        "design": asdict(design),
    }
