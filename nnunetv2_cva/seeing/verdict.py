"""Is it learning? One word from the recorded metrics of the epochs, with its reason in numbers.

Where the thresholds come from: the runs that ``benchmarks/verdicts.py`` records, of objectives that learn and of some that are
made to collapse. Seed 0 set the thresholds; where seeds 1 and 2 disagreed they were moved, so no run is left to test them. In
runs that learn the effective rank of the features kept at least 0.66 of the highest it had; in runs that collapse it falls to
0.46 or less of what the untrained network has, or what the losses compare tells nothing apart, or the student parts from its
teacher, or the views show nothing. The thresholds stand between. Runs of large networks were not recorded: there they are a
guess. ``alignment_null`` of these recordings compared bins of the same number and not of the same place; of seed 0 the runs were
repeated with today's, and again what collapses was called so and nothing else. How alike unrelated bins are in the *encoder's*
features is not read: of runs that learn, those of one seed have them more alike than the corresponding ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

State = Literal["TOO EARLY", "LEARNING", "PLATEAU", "COLLAPSING", "COLLAPSED"]

ENOUGH = 4  # epochs before anything but collapse is said
FALLEN, GONE = 0.5, 0.1  # of the highest effective rank or spread so far, or before the first step: collapsing, collapsed
# What the losses compare agrees: the consistency loss is less than this share of the first epoch's (recorded: below 0.002;
# healthy: above 0.23), or unrelated bins (the same place in another case) have a cosine near 1 (healthy: up to 0.52) ...
VANISHED, ALIKE = 0.05, 0.9
# ... while it tells nothing apart: retrieval is less than so many times chance (recorded: 0.5 to 1.5; healthy: from 0.2, after 8
# short epochs of Gram, to 21), and corresponding bins' cosine at most so much above that of unrelated ones (recorded: 0.01).
GUESSES, CLOSER = 2.0, 0.05
# Student minus teacher, in lengths of the teacher's weights: the teacher is no mean of this student any more. Recorded: up to
# 0.18 with AdamW, 0.50 with SGD as in the paper; 2.2 to 14 with a learning rate of 0.3, 0.9 to 1 where the weights decay to 0.
PARTED = 1.0
NOTHING = 1e-3  # loss of predicting every view's mean: constant images 1e-4 to 4e-4, real ones 0.3 to 0.44, scaled to 0..1 0.01
LEAST_RANK, LEAST_SPREAD = 2.0, 0.02  # all features on a line, or of one direction: collapsed, however it began
STILL = 10  # epochs, or a fifth of the run where that is more, without a move: a plateau ...
STEADY = 3  # ... when it is so for so many epochs in a row: the noise is estimated anew in each
NOISES = 3.0  # a move is a change of more than so many standard deviations of the noise between epochs
# What may show that something is still learned, and which direction is better.
MOVES = {"retrieval": 1, "feature_retrieval": 1, "alignment": 1, "feature_alignment": 1, "watched_loss": -1, "total_loss": -1}


@dataclass(frozen=True)
class Verdict:
    """``state`` in one word, and why."""

    state: State
    reason: str

    def __str__(self) -> str:
        return f"{self.state}: {self.reason}"


def verdict(epochs: Sequence[Mapping[str, Any]]) -> Verdict:
    """What the metrics of all epochs so far (``metrics.jsonl``) say. A pure function of them.

    COLLAPSED, COLLAPSING: features lose their directions or lie closer together than they did. PLATEAU: nothing that is
    watched has moved by more than its noise for long. LEARNING: something has. TOO EARLY: fewer than 4 epochs, or nothing has
    moved yet.
    """
    if not epochs:
        return Verdict("TOO EARLY", "no epoch has ended yet.")
    return _collapse(epochs) or _progress(epochs)


def _collapse(epochs: Sequence[Mapping[str, Any]]) -> Verdict | None:
    now = epochs[-1]
    worst: Verdict | None = None
    for name, least in (("effective_rank", LEAST_RANK), ("spread", LEAST_SPREAD)):
        values = [float(e[name]) for e in epochs if name in e]
        if not values:
            continue
        highest = max(*values, float(now.get(f"{name}_start", 0.0)))
        share = values[-1] / highest if highest > 0 else 0.0
        words = f"{name.replace('_', ' ')} of the features is {values[-1]:.3g}, the highest was {highest:.3g}"
        if values[-1] < least or share < GONE:
            gone = f"at least {least:g} and {GONE:g} of the highest is expected"
            return Verdict("COLLAPSED", f"{words} ({gone}). {_advice(now)}")
        if share < FALLEN:
            worst = worst or Verdict("COLLAPSING", f"{words}: less than {FALLEN:g} of it. {_advice(now)}")
    return worst or _says_nothing(epochs) or _parted(now) or _shows_nothing(now)


def _parted(now: Mapping[str, Any]) -> Verdict | None:
    """Where the student runs away from the teacher that it is to agree with."""
    distance = float(now.get("teacher_distance", 0.0))
    if distance <= PARTED:
        return None
    words = f"the student is {distance:.2g} lengths of its teacher's weights away from it (expected: at most {PARTED:g})"
    return Verdict("COLLAPSING", f"{words}. Lower learning_rate or weight_decay.")


def _shows_nothing(now: Mapping[str, Any]) -> Verdict | None:
    """Where there is nothing to reconstruct: features of such views need not collapse, but nothing is learned from them."""
    left = now.get("reconstruction_null")
    if left is None or left >= NOTHING:
        return None
    words = f"the mean of a view is all that it shows (predicting it leaves a loss of {left:.2g}; expected: at least {NOTHING:g})"
    return Verdict("COLLAPSING", f"{words}. Look at views.png, and at the images and their normalisation.")


def _says_nothing(epochs: Sequence[Mapping[str, Any]]) -> Verdict | None:
    """Where what the losses compare agrees nearly perfectly, and yet corresponding bins are told from others no better than by
    chance and are no more alike than unrelated ones, two epochs in a row. Gram, which compares no bins one by one,
    keeps a loss."""
    if len(epochs) < 2 or not all(_at_chance(e, epochs[0]) for e in epochs[-2:]):
        return None
    now = epochs[-1]
    words = (
        f"consistency loss is {now['consistency_loss']:.2g}, in the first epoch {epochs[0]['consistency_loss']:.2g}, but "
        f"retrieval {now['retrieval']:.2g} (chance {now['retrieval_chance']:.2g})"
    )
    if "alignment_null" in now:
        words += f" and alignment {now['alignment']:.2g} (of unrelated bins {now['alignment_null']:.2g})"
    return Verdict("COLLAPSING", f"{words}: what the losses compare tells nothing apart. {_advice(now)}")


def _at_chance(epoch: Mapping[str, Any], first: Mapping[str, Any]) -> bool:
    if not {"consistency_loss", "retrieval", "retrieval_chance"} <= epoch.keys():
        return False
    unrelated = float(epoch.get("alignment_null", -1.0))  # a single watched case has none
    agrees = float(epoch["consistency_loss"]) < VANISHED * float(first.get("consistency_loss", 0.0)) or unrelated > ALIKE
    guessed = float(epoch["retrieval"]) < GUESSES * float(epoch["retrieval_chance"])
    return agrees and guessed and ("alignment_null" not in epoch or float(epoch["alignment"]) - unrelated < CLOSER)


def _advice(now: Mapping[str, Any]) -> str:
    distance = now.get("teacher_distance")
    if distance is not None and distance < 1e-6:
        return "The teacher equals the student: raise teacher_momentum."
    return "Lower learning_rate or raise teacher_momentum, and look at views.png: views that show nothing teach nothing."


def _progress(epochs: Sequence[Mapping[str, Any]]) -> Verdict:
    if len(epochs) < ENOUGH:
        return Verdict("TOO EARLY", f"{len(epochs)} of at least {ENOUGH} epochs.")
    latest = _latest_move(epochs)
    still = all(_stands_still(epochs[: len(epochs) - n]) for n in range(STEADY))
    if latest is None:
        names = ", ".join(n for n in MOVES if any(n in e for e in epochs)) or "the metrics"
        state: State = "PLATEAU" if still else "TOO EARLY"
        return Verdict(state, f"in {len(epochs)} epochs none of {names} has moved by more than its noise.")
    ago, name, change, noise = latest
    when = f"{ago} epoch{'s' * (ago != 1)} ago"
    if still:
        what = f"{name} last moved by more than its noise {when} ({change:+.3g}, noise {noise:.2g})"
        return Verdict("PLATEAU", f"{what}. More epochs of this kind change little.")
    recent = f"{name} has changed by {change:+.3g} since epoch {_first(epochs)}, noise {noise:.2g}"
    return Verdict("LEARNING", f"{recent}; last move {when}.")


def _stands_still(epochs: Sequence[Mapping[str, Any]]) -> bool:
    latest = _latest_move(epochs)
    return (len(epochs) if latest is None else latest[0]) >= _patience(epochs)


def _latest_move(epochs: Sequence[Mapping[str, Any]]) -> tuple[int, str, float, float] | None:
    """Of all metrics that may show that something is learned."""
    return min((found for name, sign in MOVES.items() if (found := _last_move(epochs, name, sign)) is not None), default=None)


def _patience(epochs: Sequence[Mapping[str, Any]]) -> int:
    return max(STILL, len(epochs) // 5)


def _first(epochs: Sequence[Mapping[str, Any]]) -> Any:
    return epochs[0].get("epoch", 0)


def _last_move(epochs: Sequence[Mapping[str, Any]], name: str, sign: int) -> tuple[int, str, float, float] | None:
    """How many epochs ago a metric last moved for the better by more than its noise, its change since the first epoch, and the
    noise; None where it never did.

    The noise is the standard deviation of the differences from each epoch to the next, by their median and over the root of
    two, which a trend hardly changes. A move is a new best of two epochs in a row, better by three of these than where the
    last move led, at first than the first epochs: one lucky epoch is none.
    """
    values = np.array([sign * float(e[name]) for e in epochs if name in e])
    if len(values) < ENOUGH:
        return None
    steps = np.diff(values)
    noise = float(1.4826 * np.median(np.abs(steps - np.median(steps))) / np.sqrt(2))
    least = max(1e-4 * float(np.abs(values).max()), 1e-9)
    if noise < least:  # most steps alike: a count that seldom changes
        noise = float(np.std(steps) / np.sqrt(2))
    noise = max(noise, least)
    lasting = np.minimum(values[:-1], values[1:])  # of two epochs in a row
    anchor, at = float(max(values[0], np.median(values[:3]))), None
    for n, value in enumerate(lasting, 1):
        if value > anchor + NOISES * noise:
            anchor, at = float(value), n
    return None if at is None else (len(values) - 1 - at, name, sign * float(values[at] - values[0]), noise)
