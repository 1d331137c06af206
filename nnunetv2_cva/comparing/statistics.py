"""What paired differences say: how large, how sure, and how large a gain would have to be for so few of them to show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

LEVEL, POWER = 0.95, 0.8


@dataclass(frozen=True)
class Paired:
    """Of ``pairs`` differences: their mean, its 95 % interval, how many are above 0, and the true mean difference that such a
    comparison shows (an interval above 0) four times out of five. None where one pair says nothing."""

    mean: float
    low: float | None
    high: float | None
    ahead: int
    pairs: int
    detectable: float | None


def paired(differences: Sequence[float]) -> Paired:
    """Student's t for paired samples. ``differences``: one per split, which the two arms share.

    Raises:
        ValueError: there are none.
    """
    found = np.asarray(differences, dtype=float)
    if found.size == 0:
        raise ValueError("No split in which both arms are finished.")
    mean, n, ahead = float(found.mean()), found.size, int((found > 0).sum())
    if n == 1:
        return Paired(mean, None, None, ahead, n, None)
    spread = float(found.std(ddof=1))
    if spread == 0:
        return Paired(mean, mean, mean, ahead, n, 0.0)
    interval = stats.ttest_1samp(found, 0.0).confidence_interval(LEVEL)
    return Paired(mean, float(interval.low), float(interval.high), ahead, n, detectable(spread, n))


def detectable(spread: float, pairs: int) -> float:
    """The true mean difference at which ``pairs`` pairs whose differences have the standard deviation ``spread`` have an interval
    above 0 with probability 0.8: by the noncentral t distribution."""
    freedom = pairs - 1
    limit = stats.t.ppf((1 + LEVEL) / 2, freedom)

    def missed(shift: float) -> float:
        return float(stats.nct.cdf(limit, freedom, shift)) - (1 - POWER)

    shift = optimize.brentq(missed, 0.0, 10 * limit + 10)
    return float(shift * spread / np.sqrt(pairs))
