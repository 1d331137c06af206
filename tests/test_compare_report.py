"""What a comparison says, on numbers that are made up."""

import re

import numpy as np
import pytest

from nnunetv2_cva.comparing.design import SCRATCH, CompareRequest, Design, Job, curve_epochs, epochs_of, jobs
from nnunetv2_cva.comparing.picture import write_curves
from nnunetv2_cva.comparing.report import as_plain, compare, main_comparisons, score, sentence, table

LABELS, SEEDS = (1, 4), 5
ARMS = [SCRATCH, "a", "b"]
DESIGN = Design("Dataset004_X", "3d", "P", "T", "hash", 100, 2, 0, tuple(f"case_{n}" for n in range(9)), ("t1", "t2"))


def points(*dice):
    return [
        {"iteration": 10 * (n + 1), "dice": {"t1": {"x": d, "y": None}, "t2": {"x": d, "y": d}}, "foreground": {"t1": d, "t2": d}}
        for n, d in enumerate(dice)
    ]


def scores(gain_of_a, spread=0.02):
    """Scratch reaches about 0.3 with 1 label and 0.5 with 4; every split is harder or easier for all arms alike."""
    rng = np.random.default_rng(0)
    found = {}
    for labels, level in zip(LABELS, (0.3, 0.5)):
        for seed in range(SEEDS):
            split = rng.normal(0, 0.1)
            for arm, gain in zip(ARMS, (0.0, gain_of_a, -0.1)):
                end = level + split + gain + (rng.normal(0, spread) if arm != SCRATCH else 0)
                found[Job(arm, labels, seed)] = score(points(end / 2, end))
    return found


def the_sentence(found, arm="a", against=SCRATCH):
    (c,) = [c for c in main_comparisons(compare(found, ARMS, LABELS, SEEDS), LABELS) if (c.arm, c.against) == (arm, against)]
    return sentence(c, found, LABELS)


def test_a_structure_that_is_nowhere_does_not_count():
    found = score(
        [{"iteration": 5, "dice": {"p": {"x": 0.4, "y": None}, "q": {"x": 0.2, "y": 0.6}}, "foreground": {"p": 0.5, "q": None}}]
    )
    assert found.values == {"dice": pytest.approx(0.4), "foreground": 0.5, "curve": pytest.approx(0.4)}


def test_a_gain_is_called_one_although_splits_scatter_by_more():
    """Splits scatter by 0.1, the gain is 0.08: only pairs can show it."""
    said = the_sentence(scores(0.08))
    assert re.match(r"a gains 0\.0[78]\d Dice over scratch \(95 % interval \+0\.0", said)
    assert "ahead in 5 of 5 splits, mean of 1, 4 labelled cases" in said


def test_no_gain_is_called_so_and_says_what_could_have_been_seen():
    said = the_sentence(scores(0.0, spread=0.05))
    assert said.startswith("No gain shown of a over scratch:")
    assert re.search(r"A gain of 0\.\d+ would have been shown four times out of five", said)


def test_a_loss_is_called_a_loss():
    assert re.match(r"b loses 0\.\d+ Dice against scratch", the_sentence(scores(0.0), "b"))


def test_files_are_compared_with_each_other_too():
    assert re.match(r"b loses 0\.1\d+ Dice against a \(", the_sentence(scores(0.08), "b", "a"))


def test_nothing_segmented_is_no_result():
    found = {Job(arm, k, s): score(points(0.0, 0.0)) for arm in ARMS for k in LABELS for s in range(SEEDS)}
    assert the_sentence(found) == "Neither a nor scratch segments anything yet: train longer."


def test_one_split_claims_nothing():
    found = {job: s for job, s in scores(0.1).items() if job.seed == 0}
    assert "one split says nothing about chance" in the_sentence(found)


def test_only_shared_splits_are_paired():
    found = scores(0.08)
    del found[Job("a", 1, 3)], found[Job(SCRATCH, 4, 2)]
    by_labels = {c.labels: c.found.pairs for c in compare(found, ARMS, LABELS, SEEDS) if (c.arm, c.measure) == ("a", "dice")}
    assert by_labels == {1: 4, 4: 4, None: 3}


def test_the_pooled_difference_is_the_mean_over_labels_of_each_split():
    found = scores(0.08)
    (pooled,) = [
        c.found
        for c in compare(found, ARMS, LABELS, SEEDS)
        if (c.arm, c.against, c.labels, c.measure) == ("a", SCRATCH, None, "curve")
    ]
    by_hand = []
    for seed in range(SEEDS):
        each = [found[Job("a", k, seed)].values["curve"] - found[Job(SCRATCH, k, seed)].values["curve"] for k in LABELS]
        by_hand.append(sum(each) / len(each))
    assert (pooled.mean, pooled.pairs) == (pytest.approx(sum(by_hand) / SEEDS), SEEDS)


def test_the_table_has_a_row_per_arm_and_number_of_labels():
    found = scores(0.08)
    lines = table(compare(found, ARMS, LABELS, SEEDS), found, ARMS, LABELS).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [[k, arm] for k in ("1", "4", "mean") for arm in ARMS]
    assert "5 of 5" in lines[-2] and "0 of 5" in lines[-1] and "of" not in lines[-3]


def test_what_is_written_is_plain_and_complete(tmp_path):
    import json

    found = scores(0.08)
    compared = compare(found, ARMS, LABELS, SEEDS)
    content = json.loads(json.dumps(as_plain(DESIGN, [{"name": "a"}], found, compared, ["said"], 3)))
    assert content["unfinished"] == 3 and content["sentences"] == ["said"]
    assert len(content["scores"]) == len(ARMS) * len(LABELS) * SEEDS
    assert content["comparisons"][0]["found"].keys() >= {"mean", "low", "high", "ahead", "pairs", "detectable"}
    write_curves(tmp_path / "curves.png", found, compared, ARMS, LABELS)
    assert (tmp_path / "curves.png").read_bytes()[1:4] == b"PNG"


def test_parts_are_everything_once():
    every = jobs(ARMS, LABELS, SEEDS)
    parts = [jobs(ARMS, LABELS, SEEDS, part, 4) for part in range(4)]
    assert len(every) == 30 == len(set(every))
    assert sorted(map(str, every)) == sorted(str(job) for part in parts for job in part)


def test_labelled_cases_of_a_split_are_nested_and_differ_between_splits():
    few, many = DESIGN.cases(2, seed=3), DESIGN.cases(5, seed=3)
    assert many[:2] == few and len(set(many)) == 5 and set(many) <= set(DESIGN.training)
    assert len({tuple(DESIGN.cases(5, seed)) for seed in range(5)}) == 5


def test_results_of_another_design_are_refused(tmp_path):
    from dataclasses import replace

    DESIGN.keep(tmp_path)
    DESIGN.keep(tmp_path)
    with pytest.raises(
        ValueError, match=r"another comparison \(iterations: 100 there, 250 now; test: 2 cases there, 1 cases now\)"
    ):
        replace(DESIGN, iterations=250, test=("t1",)).keep(tmp_path)


@pytest.mark.parametrize(("iterations", "epochs"), [(10, 10), (250, 50), (800, 50), (1000, 50), (130, 26), (250000, 1000)])
def test_a_length_is_cut_into_epochs(iterations, epochs):
    assert epochs_of(iterations) == epochs and iterations % epochs == 0


@pytest.mark.parametrize(
    ("epochs", "points", "expected"), [(50, 5, [10, 20, 30, 40, 50]), (10, 4, [2, 5, 8, 10]), (3, 9, [1, 2, 3])]
)
def test_the_curve_ends_with_the_training(epochs, points, expected):
    assert curve_epochs(epochs, points) == expected


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"test": 0}, "`test`: expected 1 or more, found 0"),
        ({"labels": (1, 1)}, "`labels`: expected different positive numbers, found 1 1"),
        ({"labels": (0, 4)}, "`labels`: expected different positive numbers, found 0 4"),
        ({"seeds": 0}, "`seeds`: expected 1 or more, found 0"),
        ({"part": 2, "parts": 2}, "`part`: expected 0 to 1 of 2 parts, found 2"),
        ({"iterations": 25}, "`iterations`: expected a multiple of 10, found 25"),
    ],
)
def test_a_request_that_cannot_be_meant_is_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        CompareRequest(**{"dataset": "4", "configuration": "3d", "weights": ("a.pth",), **changes}).check()
