"""What a comparison found: differences between arms that share splits, as tables, in sentences, as plain types."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.integrate import trapezoid

from nnunetv2_cva.comparing.design import SCRATCH, Design, Job
from nnunetv2_cva.comparing.statistics import Paired, paired

MEASURES = {
    "dice": "Dice at the end, mean over structures and test cases",
    "foreground": "Dice at the end of all foreground as one",
    "curve": "foreground Dice along the way: its mean over the training, from 0 at iteration 0",
}
END, WAY = "dice", "curve"  # what the tables and the sentences are about
Curve = tuple[tuple[int, float], ...]  # (iteration, Dice) per point


@dataclass(frozen=True)
class Score:
    """Of one job. ``curve``: mean over structures; ``foreground``: of all foreground as one; ``values``: by measure."""

    curve: Curve
    foreground: Curve
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
    foreground = tuple((int(p["iteration"]), _mean(p["foreground"].values())) for p in points)
    return Score(curve, foreground, {END: curve[-1][1], "foreground": foreground[-1][1], WAY: _along_the_way(foreground)})


def _along_the_way(curve: Curve) -> float:
    """The area under the curve, divided by its length: the mean Dice while training, from 0 and straight between points."""
    iterations, dice = zip((0, 0.0), *curve)
    return float(trapezoid(dice, iterations) / iterations[-1])


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


def sentences(found: Sequence[Comparison], scores: Mapping[Job, Score], labels: Sequence[int]) -> tuple[str, ...]:
    """What may be said of every pair of arms, mean of all labels: of the end, then of the way there; that no gain is shown, too.
    Of the way nothing is said where both have found nothing all along."""
    wanted = None if len(labels) > 1 else labels[0]
    said = []
    for c in found:
        if c.labels == wanted and c.measure in (END, WAY):
            mine = [s.values[c.measure] for job, s in scores.items() if job.arm in (c.arm, c.against)]
            if max(mine) != 0:
                said.append((_at_the_end if c.measure == END else _on_the_way)(c, labels))
            elif c.measure == END:
                said.append(f"Neither {c.arm} nor {c.against} segments anything yet: train longer.")
    return tuple(said)


def _at_the_end(c: Comparison, labels: Sequence[int]) -> str:
    p, by = c.found, _cases(labels)
    if p.low is None or p.high is None or p.detectable is None:
        return f"{c.arm} differs from {c.against} by {p.mean:+.3f} Dice in one split ({by}): one split says nothing about chance."
    facts = f"95 % interval {p.low:+.3f} to {p.high:+.3f}, ahead in {p.ahead} of {p.pairs} splits, {by}"
    if p.low > 0:
        return f"{c.arm} gains {p.mean:.3f} Dice over {c.against} ({facts})."
    if p.high < 0:
        return f"{c.arm} loses {-p.mean:.3f} Dice against {c.against} ({facts})."
    seen = f"A gain of {p.detectable:.3f} would have been shown four times out of five by a comparison like this."
    return f"No gain shown of {c.arm} over {c.against}: {p.mean:+.3f} Dice ({facts}). {seen}"


def _on_the_way(c: Comparison, labels: Sequence[int]) -> str:
    p, what = c.found, "mean foreground Dice over the training"
    if p.low is None or p.high is None:
        return f"Along the way {c.arm} differs from {c.against} by {p.mean:+.3f} in {what}, in one split ({_cases(labels)})."
    found = f"no gain of {c.arm} over {c.against} is shown"
    if p.low > 0 or p.high < 0:
        found = f"{c.arm} is {'ahead of' if p.low > 0 else 'behind'} {c.against}"
    facts = f"95 % interval {p.low:+.3f} to {p.high:+.3f}, ahead in {p.ahead} of {p.pairs} splits, {_cases(labels)}"
    return f"Along the way {found}: {what} {p.mean:+.3f} ({facts})."


def _cases(labels: Sequence[int]) -> str:
    if len(labels) > 1:
        return f"mean of {', '.join(map(str, labels))} labelled cases"
    return f"{labels[0]} labelled case{'s' if labels[0] > 1 else ''}"


def table(found: Sequence[Comparison], scores: Mapping[Job, Score], arms: Sequence[str], labels: Sequence[int]) -> str:
    """Two: Dice at the end per arm and number of labels, with the paired differences from training from scratch, and below it
    the differences along the way. The second is left out while there are none."""
    wide = max(12, *(len(a) for a in arms)) + 2
    head = f"{'labels':<8}{'arm':<{wide}}{'Dice':>7}{'foreground':>12}{'curve':>8}"
    differences = f"{'- scratch':>11}{'95 % interval':>19}{'ahead':>9}{'shows from':>12}"
    end = ["At the end: Dice (mean over structures), and its difference from scratch", head + differences]
    way = [
        "Along the way: curve (mean foreground Dice over the training), and its difference from scratch",
        f"{'labels':<8}{'arm':<{wide}}{'':>19}{'curve':>8}{differences}",
    ]
    index = {(c.arm, c.labels, c.measure): c.found for c in found if c.against == SCRATCH}
    for k in [*labels, *([None] if len(labels) > 1 else [])]:
        for arm in arms:
            mine = [s for job, s in scores.items() if job.arm == arm and k in (None, job.labels)]
            if not mine:
                continue
            dice, foreground, curve = (float(np.mean([s.values[m] for s in mine])) for m in MEASURES)
            row = f"{'mean' if k is None else k:<8}{arm:<{wide}}"
            differs = _differs(index[arm, k, END]) if (arm, k, END) in index else ""
            end.append(f"{row}{dice:>7.3f}{foreground:>12.3f}{curve:>8.3f}{differs}")
            if (arm, k, WAY) in index:
                way.append(f"{row}{'':>19}{curve:>8.3f}{_differs(index[arm, k, WAY])}")
    return "\n".join([*end, "", *way] if len(way) > 2 else end)


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
    said: Sequence[str],
    unfinished: int,
) -> dict[str, Any]:
    """The content of compare.json."""
    return {
        "sentences": list(said),
        "unfinished": unfinished,
        "comparisons": [{**asdict(c), "found": asdict(c.found)} for c in found],
        "measures": MEASURES,
        "arms": [dict(a) for a in arms],
        "scores": [
            {**asdict(job), **s.values, "learning_curve": [*map(list, s.curve)], "foreground_curve": [*map(list, s.foreground)]}
            for job, s in scores.items()
        ],
        "design": asdict(design),
    }
