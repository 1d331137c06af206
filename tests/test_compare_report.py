"""What a comparison says, on numbers that are made up."""

import re

import numpy as np
import pytest

from nnunetv2_cva.comparing.design import SCRATCH, CompareRequest, Design, Job, curve_epochs, epochs_of, jobs
from nnunetv2_cva.comparing.picture import write_curves
from nnunetv2_cva.comparing.report import as_plain, compare, score, sentences, table

LABELS, SEEDS = (1, 4), 5
ARMS = [SCRATCH, "a", "b"]
DESIGN = Design("Dataset004_X", "3d", "P", "T", "hash", 100, 2, 0, tuple(f"case_{n}" for n in range(9)), ("t1", "t2"))


def points(*dice, foreground=None):
    """Dice of both structures at iterations 10, 20, ...; that of the foreground is the same where it is not given."""
    return [
        {"iteration": 10 * (n + 1), "dice": {"t1": {"x": d, "y": None}, "t2": {"x": d, "y": d}}, "foreground": {"t1": f, "t2": f}}
        for n, (d, f) in enumerate(zip(dice, foreground or dice))
    ]


def scores(gain_of_a, spread=0.02, sooner=0.0):
    """Scratch reaches about 0.3 with 1 label and 0.5 with 4; every split is harder or easier for all arms alike. Halfway the
    foreground of ``a`` is ahead by ``sooner`` besides."""
    rng = np.random.default_rng(0)
    found = {}
    for labels, level in zip(LABELS, (0.3, 0.5)):
        for seed in range(SEEDS):
            split = rng.normal(0, 0.1)
            for arm, gain in zip(ARMS, (0.0, gain_of_a, -0.1)):
                end = level + split + gain + (rng.normal(0, spread) if arm != SCRATCH else 0)
                half = end / 2 + (sooner if arm == "a" else 0)
                found[Job(arm, labels, seed)] = score(points(end / 2, end, foreground=(half, end)))
    return found


def said(found, arm="a", against=SCRATCH, labels=LABELS):
    """Of these two arms alone: what is said of the end, and, if anything, of the way there."""
    pair = [against, arm]
    return sentences(compare(found, pair, labels, SEEDS), {j: s for j, s in found.items() if j.labels in labels}, labels)


def test_a_structure_that_is_nowhere_does_not_count():
    found = score(
        [{"iteration": 5, "dice": {"p": {"x": 0.4, "y": None}, "q": {"x": 0.2, "y": 0.6}}, "foreground": {"p": 0.5, "q": None}}]
    )
    assert found.values == {"dice": pytest.approx(0.4), "foreground": 0.5, "curve": pytest.approx(0.25)}


def test_the_curve_is_the_mean_foreground_dice_of_all_iterations():
    """Reference: the foreground's Dice at the middle of every iteration, on straight lines between the points and from 0."""
    at, foreground = (7, 10, 40), (0.1, 0.5, 0.2)
    found = score([{"iteration": n, "dice": {"t": {"x": 0.9, "y": 0.8}}, "foreground": {"t": f}} for n, f in zip(at, foreground)])
    every, before, level = [], 0, 0.0
    for n, f in zip(at, foreground):
        every += [level + (f - level) * (i + 0.5 - before) / (n - before) for i in range(before, n)]
        before, level = n, f
    assert len(every) == 40 and found.values["curve"] == pytest.approx(sum(every) / 40)
    assert found.foreground == tuple(zip(at, foreground)) and [d for _, d in found.curve] == pytest.approx([0.85] * 3)


def test_a_gain_is_called_one_although_splits_scatter_by_more():
    """Splits scatter by 0.1, the gain is 0.08: only pairs can show it."""
    end, way = said(scores(0.08))
    assert re.match(r"a gains 0\.0[78]\d Dice over scratch \(95 % interval \+0\.0", end)
    assert "ahead in 5 of 5 splits, mean of 1, 4 labelled cases" in end
    assert re.match(r"Along the way a is ahead of scratch: mean foreground Dice over the training \+0\.0\d\d \(95 % int", way)


def test_no_gain_is_called_so_and_says_what_could_have_been_seen():
    end, way = said(scores(0.0, spread=0.05))
    assert end.startswith("No gain shown of a over scratch:")
    assert re.search(r"A gain of 0\.\d+ would have been shown four times out of five", end)
    assert way.startswith("Along the way no gain of a over scratch is shown: mean foreground Dice over the training ")
    assert "ahead of scratch" not in way and "ahead in " in way


@pytest.mark.parametrize("labels", [(4,), LABELS])
def test_a_gain_along_the_way_alone_is_said_of_the_way_alone(labels):
    """With its numbers, made again by hand: halfway the foreground is 0.1 ahead, at the end it is as in no gain."""
    found = scores(0.0, spread=0.02, sooner=0.1)
    end, way = said(found, labels=labels)
    assert end.startswith("No gain shown of a over scratch:")
    values = {job: (2 * s.foreground[0][1] + s.foreground[1][1]) / 4 for job, s in found.items()}
    by_split = [np.mean([values[Job("a", k, n)] - values[Job(SCRATCH, k, n)] for k in labels]) for n in range(SEEDS)]
    half = 2.7764 * np.std(by_split, ddof=1) / np.sqrt(SEEDS)
    mean, low, high = np.mean(by_split), np.mean(by_split) - half, np.mean(by_split) + half
    of = "mean of 1, 4 labelled cases" if len(labels) > 1 else "4 labelled cases"
    assert way == (
        f"Along the way a is ahead of scratch: mean foreground Dice over the training {mean:+.3f} "
        f"(95 % interval {low:+.3f} to {high:+.3f}, ahead in 5 of 5 splits, {of})."
    )


def test_a_loss_is_called_a_loss():
    end, way = said(scores(0.0), "b")
    assert re.match(r"b loses 0\.\d+ Dice against scratch", end)
    assert re.match(r"Along the way b is behind scratch: mean foreground Dice over the training -0\.\d+ \(95", way)


def test_files_are_compared_with_each_other_too():
    found = scores(0.08)
    every = sentences(compare(found, ARMS, LABELS, SEEDS), found, LABELS)
    assert re.match(r"b loses 0\.1\d+ Dice against a \(", every[4])
    assert every == (*said(found, "a"), *said(found, "b"), *said(found, "b", "a"))


def test_nothing_segmented_is_no_result():
    found = {Job(arm, k, s): score(points(0.0, 0.0)) for arm in ARMS for k in LABELS for s in range(SEEDS)}
    assert said(found) == ("Neither a nor scratch segments anything yet: train longer.",)


def test_one_split_claims_nothing():
    end, way = said({job: s for job, s in scores(0.1).items() if job.seed == 0})
    assert "one split says nothing about chance" in end
    assert re.match(r"Along the way a differs from scratch by \+0\.\d+ in mean foreground Dice over the training, in one sp", way)


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
    found = scores(0.08, sooner=0.1)
    compared = compare(found, ARMS, LABELS, SEEDS)
    end, way = (part.splitlines() for part in table(compared, found, ARMS, LABELS).split("\n\n"))
    assert [line.split()[:2] for line in end[2:]] == [[k, arm] for k in ("1", "4", "mean") for arm in ARMS]
    assert "5 of 5" in end[-2] and "0 of 5" in end[-1] and "of" not in end[-3]
    assert end[0].startswith("At the end: Dice") and way[0].startswith("Along the way: curve")
    assert [line.split()[:2] for line in way[2:]] == [[k, arm] for k in ("1", "4", "mean") for arm in ARMS[1:]]
    (p,) = [c.found for c in compared if (c.arm, c.against, c.labels, c.measure) == ("a", SCRATCH, None, "curve")]
    mean = np.mean([s.values["curve"] for job, s in found.items() if job.arm == "a"])
    expected = f"mean a {mean:.3f} {p.mean:+.3f} {p.low:+.3f} to {p.high:+.3f} 5 of 5 {p.detectable:.3f}"
    assert way[-2].split() == expected.split()
    assert max(map(len, end + way)) <= 120


def test_a_table_without_pairs_has_no_second_part():
    found = {job: s for job, s in scores(0.0).items() if job.arm == SCRATCH}
    assert "Along the way" not in table(compare(found, ARMS, LABELS, SEEDS), found, ARMS, LABELS)


def test_what_is_written_is_plain_and_complete(tmp_path):
    import json

    found = scores(0.08)
    compared = compare(found, ARMS, LABELS, SEEDS)
    content = json.loads(json.dumps(as_plain(DESIGN, [{"name": "a"}], found, compared, ["said"], 3)))
    assert content["unfinished"] == 3 and content["sentences"] == ["said"]
    assert len(content["scores"]) == len(ARMS) * len(LABELS) * SEEDS
    assert content["comparisons"][0]["found"].keys() >= {"mean", "low", "high", "ahead", "pairs", "detectable"}
    assert {c["measure"] for c in content["comparisons"]} == content["measures"].keys() == {"dice", "foreground", "curve"}
    first, *_ = content["scores"]
    (_, half), (_, end) = first["foreground_curve"]
    assert first["curve"] == pytest.approx((2 * half + end) / 4) and first["foreground"] == end
    assert [n for n, _ in first["learning_curve"]] == [10, 20] and first["learning_curve"][-1][1] == first["dice"]
    write_curves(tmp_path / "curves.png", found, compared, ARMS, LABELS)
    assert (tmp_path / "curves.png").read_bytes()[1:4] == b"PNG"


def test_the_picture_shows_both_dice_whole_and_the_differences_of_the_table(tmp_path, monkeypatch):
    figures = []
    saved = "matplotlib.figure.Figure.savefig"
    monkeypatch.setattr(saved, lambda figure, file, **_: (figures.append(figure), file.write_bytes(b"x")))
    found = scores(0.0, sooner=0.1)
    compared = compare(found, ARMS, LABELS, SEEDS)
    write_curves(tmp_path / "curves.png", found, compared, ARMS, LABELS)
    panels = figures[0].axes
    structures, foreground = panels[:2], panels[3:5]
    assert (structures[0].get_ylabel(), foreground[0].get_ylabel()) == (
        "Dice, mean over structures",
        "Dice of all foreground as one",
    )
    for row, attribute in ((structures, "curve"), (foreground, "foreground")):
        for ax, k in zip(row, LABELS):
            drawn = [[float(v) for v in line.get_ydata()] for line in ax.lines]
            assert ax.get_ylim()[0] == 0 and max(map(max, drawn)) < ax.get_ylim()[1]
            for job, s in found.items():
                assert ([d for _, d in getattr(s, attribute)] in drawn) == (job.labels == k)
    for ax, measure in ((panels[2], "dice"), (panels[5], "curve")):
        means = {round(float(line.get_ydata()[0]), 9) for line in ax.lines}
        pairs = [c for c in compared if (c.measure, c.against) == (measure, SCRATCH) and c.labels is not None]
        assert means >= {round(c.found.mean, 9) for c in pairs} and len(pairs) == 4


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
