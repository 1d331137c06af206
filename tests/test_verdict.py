"""The verdict from recorded metrics: what collapses is seen within a few epochs, what learns is never called so."""

import re
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.recorded import RECORDED

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.seeding import stream
from nnunetv2_cva.seeing.verdict import verdict
from nnunetv2_cva.training.metrics import collapse_metrics
from nnunetv2_cva.training.watching import score
from nnunetv2_cva.views.geometry import draw_pair

COLLAPSES = {
    "no stop-gradient",
    "no stop-gradient, constant images",
    "mask 0, constant images",
    "huge learning rate",
    "huge learning rate, MAE",
    "huge learning rate, Cont",
    "weight decay only",
}
AS_PAPER = {"paper's optimizer", "paper's optimizer, 30 epochs"}
OBJECTIVES = {"default", "AE", "MAE", "MAE_CVA", "MAE_CCVA", "MAE_Cont", "MAE_CCVA_Cont", "Gram", "Cont"}
BAD = ("COLLAPSING", "COLLAPSED")


def run(**metrics):
    """Epochs with these metrics, lists of one length."""
    return [{"epoch": n, **{k: v[n] for k, v in metrics.items()}} for n in range(len(next(iter(metrics.values()))))]


def said(epochs):
    return [verdict(epochs[: n + 1]).state for n in range(len(epochs))]


@pytest.mark.parametrize("recorded", [r for r in RECORDED if r["run"] not in COLLAPSES], ids=lambda r: f"{r['run']}-{r['seed']}")
def test_a_run_that_learns_is_never_called_collapsing(recorded):
    assert not set(said(recorded["epochs"])) & set(BAD)


@pytest.mark.parametrize("recorded", [r for r in RECORDED if r["run"] in COLLAPSES], ids=lambda r: f"{r['run']}-{r['seed']}")
def test_a_run_made_to_collapse_is_seen_within_a_few_epochs(recorded):
    states = said(recorded["epochs"])
    assert set(states[:6]) & set(BAD), [(e.get("effective_rank"), e.get("spread")) for e in recorded["epochs"]]


def test_recorded_are_three_seeds_of_every_objective_and_of_every_collapse():
    recorded = {(r["run"], r["seed"]) for r in RECORDED}
    assert recorded >= {(n, seed) for n in OBJECTIVES | AS_PAPER | COLLAPSES for seed in range(3)}


@pytest.mark.parametrize("recorded", [r for r in RECORDED if "32 epochs" in r["run"]], ids=lambda r: f"{r['run']}-{r['seed']}")
def test_a_long_run_learns_first_and_a_plateau_says_when_it_last_moved(recorded):
    """Checked against the plain numbers: since then the metric has gained little of what it had gained before."""
    epochs = recorded["epochs"]
    assert said(epochs)[9] == "LEARNING"
    found = verdict(epochs)
    if recorded["run"].startswith("default") and recorded["seed"] == 0:
        assert found.state == "PLATEAU"
    if found.state == "PLATEAU":
        name, ago = re.match(r"(\w+) last moved by more than its noise (\d+) epochs ago", found.reason).groups()
        values, at = np.array([e[name] for e in epochs]), len(epochs) - 1 - int(ago)
        assert int(ago) >= 10 and abs(np.median(values[-3:]) - values[at]) < 0.15 * abs(values[at] - values[0])


@pytest.mark.parametrize("recorded", [r for r in RECORDED if r["run"] not in COLLAPSES], ids=lambda r: f"{r['run']}-{r['seed']}")
def test_a_plateau_does_not_come_and_go_with_the_estimate_of_the_noise(recorded):
    states = said(recorded["epochs"])
    assert sum(a == "PLATEAU" != b for a, b in zip(states, states[1:])) == 0


def test_before_anything_can_be_said():
    assert verdict([]).state == "TOO EARLY"
    assert verdict(run(retrieval=[0.1, 0.2, 0.3])).state == "TOO EARLY"


def test_rising_retrieval_is_learning_with_its_numbers():
    found = verdict(run(retrieval=np.linspace(0.01, 0.4, 12).tolist(), effective_rank=[60.0] * 12))
    assert found.state == "LEARNING" and "retrieval has changed by +0.39" in found.reason


def test_what_stands_still_for_long_is_a_plateau_and_says_since_when():
    rng = np.random.default_rng(0)
    curve = np.concatenate([np.linspace(0, 0.5, 10), np.full(25, 0.5)]) + rng.normal(0, 0.003, 35)
    epochs = run(retrieval=curve.tolist(), effective_rank=[60.0] * 35)
    states = said(epochs)
    assert states[12] == "LEARNING" and states[-1] == "PLATEAU"
    ago = int(verdict(epochs).reason.split("noise ")[1].split(" epochs ago")[0])
    assert 20 <= ago <= 26


def test_noise_alone_is_rarely_learning_and_a_trend_twice_as_large_as_the_noise_is():
    wrong = right = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        wrong += verdict(run(watched_loss=rng.normal(1, 0.1, 30).tolist())).state != "PLATEAU"
        right += verdict(run(watched_loss=(np.linspace(1, 0.8, 15) + rng.normal(0, 0.02, 15)).tolist())).state == "LEARNING"
    assert wrong <= 2 and right >= 36


def test_a_falling_loss_is_learning_where_nothing_else_is_watched():
    epochs = run(watched_loss=np.geomspace(3, 1, 9).tolist(), effective_rank=np.linspace(50, 40, 9).tolist())
    assert verdict(epochs).state == "LEARNING"


@pytest.mark.parametrize(
    "name, values, expected",
    [
        ("effective_rank", [90.0, 80.0, 60.0, 35.0], "COLLAPSING"),
        ("effective_rank", [90.0, 60.0, 20.0, 5.0], "COLLAPSED"),
        ("effective_rank", [90.0, 1.5], "COLLAPSED"),
        ("spread", [0.6, 0.5, 0.15], "COLLAPSING"),
        ("spread", [0.6, 0.3, 0.01], "COLLAPSED"),
        ("effective_rank", [90.0, 80.0, 60.0, 55.0], "LEARNING"),
    ],
)
def test_collapse_outweighs_everything_and_says_its_numbers(name, values, expected):
    found = verdict(run(**{name: values, "retrieval": np.linspace(0, 0.9, len(values)).tolist()}))
    assert found.state == expected
    if expected in BAD:
        assert f"{values[-1]:.3g}" in found.reason and f"{max(values):.3g}" in found.reason


def test_what_is_worse_than_the_untrained_network_from_the_first_epoch_on_is_seen():
    epochs = [{"epoch": 0, "effective_rank": 19.9, "effective_rank_start": 47.0}]
    assert verdict(epochs).state == "COLLAPSING" and "the highest was 47" in verdict(epochs).reason


def test_agreement_that_tells_nothing_apart_is_a_collapse():
    first = {"epoch": 0, "consistency_loss": 0.4, "retrieval": 0.005, "retrieval_chance": 0.003}
    later = {**first, "consistency_loss": 0.001}
    assert verdict([first, first, first]).state == verdict([first, later]).state == "TOO EARLY"
    found = verdict([first, later, later])
    assert found.state == "COLLAPSING" and "0.001, in the first epoch 0.4, but retrieval 0.005" in found.reason
    assert verdict([first, *[{**later, "retrieval": 0.4}] * 2]).state == "TOO EARLY", "it agrees, and tells them apart"


def test_bins_that_are_more_alike_than_unrelated_ones_are_no_collapse():
    """Retrieval among many fine bins may be at chance although what corresponds agrees best."""
    chance = {"retrieval": 0.004, "retrieval_chance": 0.003}
    first = {"epoch": 0, "consistency_loss": 1.5, "alignment": 0.2, "alignment_null": 0.1, **chance}
    apart = {**first, "consistency_loss": 0.05, "alignment": 0.97, "alignment_null": 0.6}
    alike = {**apart, "alignment_null": 0.95}
    assert verdict([first, apart, apart]).state == "TOO EARLY"
    found = verdict([first, alike, alike])
    assert found.state == "COLLAPSING" and "alignment 0.97 (of unrelated bins 0.95)" in found.reason


def test_a_run_that_begins_with_everything_alike_is_a_collapse_from_the_second_epoch_on():
    """Its consistency loss cannot vanish any more: it was small in the first epoch."""
    epoch = {"consistency_loss": 0.01, "alignment": 0.995, "alignment_null": 0.99, "retrieval": 0.003, "retrieval_chance": 0.003}
    assert verdict([epoch, epoch]).state == "COLLAPSING"
    by_position = {**epoch, "alignment_null": 0.93, "retrieval": 0.5}
    assert verdict([by_position, by_position]).state == "TOO EARLY", "position in the view is learned, which is no collapse"


def test_a_student_that_leaves_its_teacher_is_a_collapse_at_once():
    assert verdict([{"effective_rank": 40.0, "teacher_distance": 0.5}]).state == "TOO EARLY"
    found = verdict([{"effective_rank": 40.0, "teacher_distance": 2.2}])
    assert found.state == "COLLAPSING" and "the student is 2.2 lengths of its teacher's weights away" in found.reason


def test_distance_and_unrelated_bins_alone_tell_recorded_runs_apart():
    """By these two rules without effective rank and spread: learning rates of 0.3 with a teacher and runs without
    stop-gradient, and none that learns."""
    seen = set()
    for r in RECORDED:
        blind = [{k: v for k, v in e.items() if k not in ("effective_rank", "spread")} for e in r["epochs"]]
        if set(said(blind)[:4]) & set(BAD):
            seen.add(r["run"])
    assert seen - {"weight decay only"} == COLLAPSES - {"huge learning rate, MAE", "weight decay only"}, "MAE has no teacher"


def test_views_that_show_nothing_are_a_collapse_whatever_the_loss_does():
    falling = np.geomspace(1, 0.01, 8).tolist()
    assert verdict(run(total_loss=falling, reconstruction_null=[0.35] * 8)).state == "LEARNING"
    found = verdict(run(total_loss=falling, reconstruction_null=[2e-4] * 8))
    assert found.state == "COLLAPSING" and "the mean of a view is all that it shows" in found.reason and "0.0002" in found.reason


def test_one_count_more_is_no_move():
    """Retrieval is a count of bins: most epochs have the same, and one bin more is not learning."""
    steady = [0.0104, 0.0104, 0.0104, 0.0130, 0.0104, 0.0104, 0.0104, 0.0130, 0.0130, 0.0130]
    assert verdict(run(retrieval=steady)).state != "LEARNING"


def test_a_verdict_depends_on_nothing_but_the_metrics():
    epochs = run(retrieval=[0.1, 0.2, 0.3, 0.4, 0.5], learning_rate=[1.0] * 5)
    again = [dict(e, seconds=9.0) for e in epochs]
    assert verdict(epochs) == verdict(again)


# ---- the metrics it reads


def test_effective_rank_sees_complete_collapse_under_rounding():
    constant = torch.ones(200, 8) * torch.randn(8) + 1e-7 * torch.randn(200, 8)
    assert collapse_metrics(constant)["effective_rank"] == pytest.approx(1, abs=1e-3)
    assert collapse_metrics(torch.zeros(50, 8))["effective_rank"] == pytest.approx(1)
    healthy = torch.randn(5000, 8) + 3
    assert collapse_metrics(healthy)["effective_rank"] == pytest.approx(8, abs=0.05)
    line = torch.randn(200, 1) * torch.randn(8) + torch.randn(8)
    assert collapse_metrics(line)["effective_rank"] == pytest.approx(1, abs=0.05)


class Seeing:
    """A student of two channels per bin that knows the bin's place in the view alone, or what the case shows there."""

    backbone = SimpleNamespace(block=(8, 8, 8))

    def __init__(self, what):
        self.what, self.waves = what, torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * 6

    def eval(self):
        return self

    def features(self, views, rois):
        steps = torch.stack(torch.meshgrid(*(torch.arange(n) / n + 0.5 / n for n in (3, 4, 2)), indexing="ij"), -1).flatten(0, 2)
        places = rois[:, None, 0] + steps * (rois[:, None, 1] - rois[:, None, 0])
        if self.what == "place":
            return torch.cos(places.float() @ self.waves)
        anatomy = views[:, 0, 0, 0, 0, None, None] + steps  # the case's number, and the place in what both views share
        return torch.cos(anatomy.float() @ self.waves)

    def __call__(self, views, mask, rois):
        return {"bins": self.features(views, rois)}


@pytest.mark.parametrize("batch_sizes", [(4, 4), (1, 3, 1)], ids=str)
def test_a_null_is_another_case_seen_at_the_same_place_in_the_view(batch_sizes):
    """Every pair of views has its own rois: the same number of a bin is another place in the view."""
    plain = {name: 0.0 for name in vars(CVAConfig()) if name.endswith("_p")}  # views as they are
    config = CVAConfig(**{**plain, "reconstruction_weight": 0.0, "contrastive_weight": 0.0, "mask_ratio": 0.0})
    batches, case = [], 0
    for size in batch_sizes:
        rng = stream("rois", case)
        rois = [draw_pair((64,) * 3, (32, 40, 24), config, rng).rois for _ in range(size)]
        numbers = torch.arange(case, case + size, dtype=torch.float32)
        views = numbers[None, :, None, None, None, None].expand(2, size, 1, 32, 40, 24).flatten(0, 1).clone()
        inside = torch.ones(2 * size, 1, 32, 40, 24, dtype=torch.bool)
        batches.append({"views": views, "rois": torch.tensor(np.array(rois)).transpose(0, 1).flatten(0, 1), "inside": inside})
        case += size
    device = torch.device("cpu")
    place, anatomy = (score(Seeing(what), None, batches, config, device, nullcontext) for what in ("place", "anatomy"))
    for prefix in ("", "feature_"):
        assert anatomy[f"{prefix}retrieval"] == 1 and anatomy[f"{prefix}alignment"] == pytest.approx(1)
        assert anatomy[f"{prefix}alignment_null"] < 0.5
        assert place[f"{prefix}alignment"] < 0.9  # views that are moved against each other
    # The case before has the same rois here: what knows the place alone reaches in it what it reaches in the case itself.
    if len(batch_sizes) == 2:
        assert place["alignment_null"] == pytest.approx(place["alignment"], abs=1e-5)
        assert place["retrieval_null"] == pytest.approx(place["retrieval"], abs=1e-5)
        assert place["feature_alignment_null"] == pytest.approx(place["feature_alignment"], abs=1e-4)
    alone = score(Seeing("place"), None, [{k: v[:: v.shape[0] // 2] for k, v in batches[0].items()}], config, device, nullcontext)
    assert "alignment" in alone and not [name for name in alone if name.endswith("_null")]
