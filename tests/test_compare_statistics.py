"""Paired differences against slow references: Student's interval by the textbook, the detectable gain by trying it."""

import math

import numpy as np
import pytest
from scipy import stats

from nnunetv2_cva.comparing.statistics import detectable, paired


def reference_interval(differences):
    n = len(differences)
    mean = sum(differences) / n
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1))
    # Two-sided 95 % points of Student's t, from tables.
    t = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 9: 2.2622}[n - 1]
    return mean, mean - t * spread / math.sqrt(n), mean + t * spread / math.sqrt(n)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6, 10])
def test_the_interval_is_that_of_the_textbook(count):
    differences = np.random.default_rng(count).normal(0.05, 0.1, count)
    found = paired(differences)
    mean, low, high = reference_interval(differences.tolist())
    assert found.mean == pytest.approx(mean)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-5), pytest.approx(high, abs=1e-5))
    assert (found.pairs, found.ahead) == (count, sum(d > 0 for d in differences))


def test_the_interval_covers_the_true_difference_19_times_of_20():
    rng = np.random.default_rng(0)
    found = [paired(rng.normal(0.03, 0.1, 5)) for _ in range(2000)]
    covered = np.mean([f.low <= 0.03 <= f.high for f in found])
    assert covered == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(("spread", "pairs"), [(0.1, 3), (0.1, 5), (0.02, 10)])
def test_a_detectable_gain_is_shown_four_times_of_five(spread, pairs):
    gain = detectable(spread, pairs)
    differences = np.random.default_rng(1).normal(gain, spread, (20000, pairs))
    t = differences.mean(1) / differences.std(1, ddof=1) * math.sqrt(pairs)
    shown = np.mean(t > stats.t.ppf(0.975, pairs - 1))
    assert shown == pytest.approx(0.8, abs=0.015)


def test_more_splits_see_smaller_gains():
    assert detectable(0.1, 20) < detectable(0.1, 5) < detectable(0.1, 3)


def test_one_split_says_nothing_about_chance():
    found = paired([0.3])
    assert (found.mean, found.ahead, found.low, found.detectable) == (0.3, 1, None, None)


def test_equal_differences_have_no_width():
    found = paired([0.0, 0.0, 0.0])
    assert (found.low, found.high, found.ahead) == (0.0, 0.0, 0)


def test_no_split_is_refused():
    with pytest.raises(ValueError, match="No split in which both arms are finished"):
        paired([])
