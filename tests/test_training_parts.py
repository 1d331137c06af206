import json
import math

import numpy as np
import pytest
import torch
from helpers.projects import VIEW, architecture, make_project, make_trainer
from helpers.recorded import RECORDED
from matplotlib import rc_context
from matplotlib.figure import Figure
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2_cva.trainers.nnUNetTrainerCVA import nnUNetTrainerCVA

from nnunetv2_cva.config import DEFAULT, CVAConfig
from nnunetv2_cva.seeding import stream, torch_seed
from nnunetv2_cva.seeing.verdict import verdict
from nnunetv2_cva.training import checkpoint, launch, messages
from nnunetv2_cva.training import metrics as metrics_of_runs
from nnunetv2_cva.training.curves import draw_curves
from nnunetv2_cva.training.data import evenly
from nnunetv2_cva.training.device import Share, autocast_dtype, share_of_rank
from nnunetv2_cva.training.history import History
from nnunetv2_cva.training.metrics import collapse_metrics, pair_metrics, standardised
from nnunetv2_cva.training.schedule import learning_rate, make_optimizer

# ---- schedule


def test_without_warm_up_the_rate_is_nnunets_poly_schedule():
    from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

    config = CVAConfig(epochs=20)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    scheduler = PolyLRScheduler(optimizer, config.learning_rate, config.epochs)
    for epoch in range(20):
        scheduler.step(epoch)
        assert learning_rate(epoch, config) == pytest.approx(optimizer.param_groups[0]["lr"])


def test_warm_up_rises_linearly_and_decay_starts_at_the_full_rate():
    config = CVAConfig(epochs=10, warmup_epochs=4, learning_rate=1.0)
    rates = [learning_rate(e, config) for e in range(10)]
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 0.25


def test_the_optimizer_takes_only_what_is_trained():
    frozen, trained = torch.nn.Parameter(torch.zeros(1), requires_grad=False), torch.nn.Parameter(torch.zeros(1))
    for name in ("sgd", "adamw"):
        optimizer = make_optimizer([frozen, trained], CVAConfig(optimizer=name), torch.device("cpu"))
        assert optimizer.param_groups[0]["params"] == [trained]
        assert optimizer.param_groups[0]["weight_decay"] == 3e-5


# ---- streams


def test_streams_differ_by_purpose_numbers_and_count():
    draws = [stream(*a).random() for a in (("a", 1), ("b", 1), ("a", 2), ("a", 1, 0), ("a", 1, 0, 0))]
    assert len(set(draws)) == len(draws)
    assert stream("a", 1).random() == draws[0] and torch_seed("a", 1) == torch_seed("a", 1)


# ---- device


def test_precision_is_float32_away_from_cuda():
    assert autocast_dtype("auto", torch.device("cpu")) is None
    assert autocast_dtype("fp32", torch.device("cuda")) is None
    assert autocast_dtype("bf16", torch.device("cpu")) is torch.bfloat16
    with pytest.raises(ValueError, match="precision: 'fp16' needs a CUDA device, found 'cpu'. Use 'bf16', 'auto' or 'fp32'"):
        autocast_dtype("fp16", torch.device("cpu"))
    with pytest.raises(ValueError, match="precision: 'bf16' needs a CUDA device, found 'mps'. Use 'auto' or 'fp32'"):
        autocast_dtype("bf16", torch.device("mps"))


def test_one_process_owns_the_whole_step():
    assert share_of_rank(5) == Share((5,))
    assert (Share((5,)).total, Share((5,)).begin, Share((5,)).end) == (5, 0, 5)


def test_ranks_share_the_cases_without_gaps(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        shares.append(share_of_rank(8))
    assert [(s.begin, s.end, s.total, s.per_rank) for s in shares] == [(b, e, 8, (3, 3, 2)) for b, e in ((0, 3), (3, 6), (6, 8))]
    with pytest.raises(ValueError, match="batch_size 2 of the plans is smaller than the number of GPUs, 3"):
        share_of_rank(2)


# ---- metrics


def test_alignment_and_retrieval_against_loops():
    rng = torch.Generator().manual_seed(0)
    first, second = torch.randn(3, 5, 4, generator=rng), torch.randn(3, 5, 4, generator=rng)
    second[0] = 2 * first[0]
    cosines, hits = [], []
    for b in range(3):
        table = [[float(torch.dot(f, s) / f.norm() / s.norm()) for s in second[b]] for f in first[b]]
        cosines += [table[r][r] for r in range(5)]
        hits += [max(range(5), key=lambda s: table[r][s]) == r for r in range(5)]
    found = pair_metrics(first, second)
    assert found["alignment"] == pytest.approx(np.mean(cosines), abs=1e-6)
    assert found["retrieval"] == pytest.approx(np.mean(hits))


def test_collapse_shows():
    rng = torch.Generator().manual_seed(0)
    wide = torch.randn(400, 6, generator=rng)
    line = torch.outer(torch.randn(400, generator=rng), torch.randn(6, generator=rng))
    same = torch.ones(400, 6) + 1e-6 * wide
    assert collapse_metrics(wide)["effective_rank"] == pytest.approx(6, rel=0.02)
    assert collapse_metrics(line)["effective_rank"] == pytest.approx(1, abs=0.01)
    assert collapse_metrics(wide)["spread"] == pytest.approx(1, abs=0.05)
    assert collapse_metrics(same)["spread"] < 1e-3


def test_effective_rank_is_the_entropy_of_singular_values():
    features = torch.randn(20, 4, generator=torch.Generator().manual_seed(1)) * torch.tensor([5.0, 1, 0.2, 1])
    s = np.linalg.svd(features.numpy() - features.numpy().mean(0), compute_uv=False)
    p = s / s.sum()
    assert collapse_metrics(features)["effective_rank"] == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-4)


def test_standardising_removes_what_all_features_share():
    features = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0)) + 100
    assert pair_metrics(features[:1], features[1:])["alignment"] > 0.99
    compared = standardised(features)
    assert abs(pair_metrics(compared[:1], compared[1:])["alignment"]) < 0.2


def test_history_drops_epochs_that_were_not_saved(tmp_path):
    history = History(tmp_path)
    history.restore([{"epoch": 0, "total_loss": 1.0}, {"epoch": 1, "total_loss": 0.5}])
    history.plot(DEFAULT)
    again = History(tmp_path)
    again.restore(history.epochs[:1])
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        {"epoch": 0, "total_loss": 1.0}
    ]
    assert (tmp_path / "progress.png").stat().st_size > 1000


def epochs_of(objective="default"):
    """Recorded epochs, with losses that add up to their totals and what else a run has but the recording leaves out."""
    recorded = next(r["epochs"] for r in RECORDED if r["run"] == objective)
    rest = {"contrastive_loss": 2.0, "overlap": 0.6, "data_wait": 0.01, "learning_rate": 1e-3}
    hidden = [(e["total_loss"] - e["consistency_loss"] - 0.1 * rest["contrastive_loss"]) / 5 for e in recorded]
    return [{"reconstruction_loss": h, **rest, **e} for h, e in zip(hidden, recorded)]


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they were when they were written."""
    figures = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), savefig(self, *a, **k))[1])
    return figures


@pytest.mark.parametrize("run", ["default", "weight decay only"])
def test_curves_have_whole_epochs_parts_that_add_up_and_what_to_compare_with(tmp_path, drawn, run):
    epochs = epochs_of(run)
    draw_curves(epochs, DEFAULT, tmp_path / "progress.png")
    (figure,) = drawn
    by_title = {a.get_title(): a for a in figure.axes}
    assert (tmp_path / "progress.png").stat().st_size > 10_000
    for axes in by_title.values():
        figure.canvas.draw()
        assert all(tick == int(tick) for tick in axes.get_xticks())
    parts = by_title[metrics_of_runs.PARTS]
    top = [c.get_paths()[0].get_extents().y1 for c in parts.collections][-1]
    assert top == pytest.approx(max(e["total_loss"] for e in epochs), rel=1e-3)
    assert parts.get_legend_handles_labels()[1][0] == "5 x reconstruction_loss"
    rank = by_title[metrics_of_runs.RANK]
    assert rank.get_ylim()[0] == 0 and rank.get_ylim()[1] > max(e["effective_rank"] for e in epochs)
    chance = next(x for x in by_title[metrics_of_runs.RETRIEVAL].lines if x.get_label() == "retrieval_chance")
    assert chance.get_linestyle() == ":" and set(chance.get_ydata()) == {epochs[0]["retrieval_chance"]}
    (band,) = by_title[metrics_of_runs.SHARES].patches
    ends = band.get_patch_transform().transform_path(band.get_path()).get_extents()  # a polygon in matplotlib 3.8
    assert (ends.y0, ends.y1) == pytest.approx(DEFAULT.overlap)
    assert " ".join(figure.get_suptitle().split()).startswith(f"{verdict(epochs).state} after {len(epochs)} epochs: ")


def test_no_legend_lies_on_a_panel_whatever_style_others_have_set(tmp_path, drawn):
    """nnU-Net's plots leave fonts two and a half times as large behind."""
    with rc_context({"font.size": 30, "legend.fontsize": 40}):
        draw_curves(epochs_of("default"), DEFAULT, tmp_path / "progress.png")
    (figure,) = drawn
    figure.canvas.draw()
    panels = [axes.get_window_extent() for axes in figure.axes]
    legends = [axes.get_legend().get_window_extent() for axes in figure.axes if axes.get_legend()]
    assert len(legends) >= 5 and all(p.width > 300 and p.height > 100 for p in panels)
    assert not any(legend.overlaps(panel) for legend in legends for panel in panels)


def test_an_objective_from_outside_is_drawn_without_parts_that_would_not_add_up(tmp_path, drawn):
    epochs = [{"epoch": n, "total_loss": 1.0 + n, "novelty_loss": 0.3} for n in range(3)]
    draw_curves(epochs, DEFAULT, tmp_path / "progress.png")
    parts, losses = drawn[0].axes[:2]
    assert not parts.collections and [x.get_label() for x in parts.lines] == ["total_loss"]
    assert [x.get_label() for x in losses.lines] == ["novelty_loss"]


def test_the_end_of_the_run_is_said_after_the_first_minute_and_no_sooner(monkeypatch):
    """Steps of 7 s after a first one of 100 s, epochs of 4 steps with 5 s between them."""
    now, said = [0.0], []
    monkeypatch.setattr(messages, "monotonic", lambda: now[0])
    pace = messages.Pace(4, 40, lambda line: said.append((now[0], line)))
    for step in range(20):
        if step % 4 == 0:
            now[0] += 5
            pace.begin(0)
        now[0] += 7 if step else 100
        pace.tick()
    ((when, line),) = [(t, x) for t, x in said if "The run" in x]
    seconds = when - 105  # after the first step
    assert 60 < seconds <= 72
    steps = round((seconds - seconds // 33 * 5) / 7)
    each = seconds / steps
    assert line.startswith(f"  The run: {40 - 1 - steps} iterations to go, {each:.2f} s each: ") and "until 20" in line


def test_within_a_long_epoch_the_pace_is_said_every_minute(monkeypatch):
    now, said = [0.0], []
    monkeypatch.setattr(messages, "monotonic", lambda: now[0])
    pace = messages.Pace(10, 7, said.append)
    pace.begin(3)  # continued
    for _ in range(7):
        now[0] += 50
        pace.tick()
    assert said[0] == "  5 of 10 iterations, 50.00 s each" and said[2:] == ["  8 of 10 iterations, 50.00 s each"]
    assert said[1].startswith("  The run: 4 iterations to go, 50.00 s each: 3 min, until 20")


@pytest.mark.parametrize(("seconds", "text"), [(50, "1 min"), (3599, "1 h 0 min"), (12_000, "3 h 20 min"), (190_000, "2 d 4 h")])
def test_lengths_of_time_are_read_at_a_glance(seconds, text):
    assert messages.lasting(seconds) == text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_what_to_add(tmp_path, monkeypatch):
    make_project(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match="no CUDA GPU here. Add -device cpu"):
        make_trainer(nnUNetTrainerCVA, device="cuda")
    for number in (1, 2):
        with pytest.raises(ValueError, match="no CUDA GPU here. Add -device cpu"):
            launch.train(launch.Training("100", "3d_fullres", "all", num_gpus=number))


# ---- checkpoints


def test_shared_storage_stays_shared(tmp_path):
    layer = torch.nn.Linear(300, 300)
    content = {"cva": {}, "network_weights": {"a": layer.weight, "alias": layer.weight}}
    checkpoint.save(content, tmp_path / "c.pth")
    loaded = checkpoint.load(tmp_path / "c.pth")["network_weights"]
    assert loaded["a"].data_ptr() == loaded["alias"].data_ptr()
    assert (tmp_path / "c.pth").stat().st_size < 1.2 * 300 * 300 * 4


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint_latest.pth"
    checkpoint.save({"cva": {"version": "1"}}, path)

    def full(obj, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left.*checkpoint_latest.pth is untouched.*--c"):
        checkpoint.save({"cva": {"version": "2"}}, path)
    assert checkpoint.load(path) == {"cva": {"version": "1"}}
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_where_nothing_was_saved_yet_a_failed_write_does_not_advise_to_continue(tmp_path, monkeypatch):
    def full(obj, file):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    (tmp_path / checkpoint.BEST).write_bytes(b"cannot be continued")
    with pytest.raises(OSError, match=r"latest.pth cannot be written: .*GB are free there\. Make room, then start again\.$"):
        checkpoint.save({"cva": 1}, tmp_path / checkpoint.LATEST)


def test_an_error_of_the_device_is_not_taken_for_a_full_disk(tmp_path, monkeypatch):
    def assert_on_device(*_):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(checkpoint, "_on_cpu", assert_on_device)
    with pytest.raises(RuntimeError, match="^CUDA error"):
        checkpoint.save({"cva": 1}, tmp_path / "c.pth")


def test_a_damaged_checkpoint_is_named(tmp_path):
    path = tmp_path / checkpoint.LATEST
    checkpoint.save({"cva": {}, "network_weights": {"a": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="checkpoint_latest.pth cannot be read as a checkpoint .truncated"):
        checkpoint.load(path)


def test_code_in_a_checkpoint_is_refused_without_naming_an_option_that_training_lacks(tmp_path):
    torch.save({"cva": {}, "code": print}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="opening it may execute anything. It was not written by this package") as refused:
        checkpoint.load(tmp_path / "x.pth")
    assert "--trust" not in str(refused.value)


def test_a_stranger_is_not_resumed(tmp_path):
    torch.save({"network_weights": {}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="no entry 'cva'.*-pretrained_weights"):
        checkpoint.load(tmp_path / "x.pth")


def test_watched_cases_are_spread_over_the_list():
    keys = [f"{dataset}__{n}" for dataset in "ab" for n in range(10)]
    assert evenly(keys, 4) == ["a__0", "a__6", "b__2", "b__9"]
    assert evenly(keys[:3], 8) == keys[:3]


def closing(tmp_path, monkeypatch, any_target=True, weights="w.pth", between=None):
    path = make_project(tmp_path, monkeypatch).parent / "nnUNetPlans.json"
    content = json.loads(path.read_text())
    configurations = content["configurations"]
    configurations["3d_middle"] = {"inherits_from": "3d_fullres", **(between or {})}
    parent = "3d_fullres" if between is None else "3d_middle"
    configurations["3d_fullres_cva"] = {"inherits_from": parent, "patch_size": list(VIEW)}
    path.write_text(json.dumps(content))
    trainer = make_trainer(nnUNetTrainerCVA, configuration="3d_fullres_cva")
    trainer.initialize()
    trainer.student.backbone.fits_any_target = any_target
    return messages.closing(trainer.plans_manager.plans, "3d_fullres_cva", trainer.student, nnUNetTrainer, weights)


def test_the_configuration_to_fine_tune_is_the_one_inherited_from(tmp_path, monkeypatch):
    """Targets have the parent's name."""
    said = closing(tmp_path, monkeypatch)
    assert "nnUNetv2_train DATASET 3d_fullres FOLD -p nnUNetPlans -pretrained_weights w.pth" in said.splitlines()


def test_with_an_architecture_of_its_own_a_middle_configuration_is_the_one_to_fine_tune(tmp_path, monkeypatch):
    """Its parent's network would not take the weights."""
    said = closing(tmp_path, monkeypatch, between={"architecture": architecture(features=(4, 8, 12))})
    assert "nnUNetv2_train DATASET 3d_middle FOLD -p nnUNetPlans -pretrained_weights w.pth" in said.splitlines()


def test_weights_that_fit_no_target_as_they_are_are_exported_first(tmp_path, monkeypatch):
    lines = closing(tmp_path, monkeypatch, any_target=False).splitlines()
    assert lines[1:] == [
        "nnUNetv2_cva export w.pth -d DATASET -c 3d_fullres -p nnUNetPlans -o weights.pth",
        "nnUNetv2_train DATASET 3d_fullres FOLD -p nnUNetPlans -pretrained_weights weights.pth",
    ]


def test_paths_in_commands_are_quoted(tmp_path, monkeypatch):
    assert "-pretrained_weights '/my data/w.pth'" in closing(tmp_path, monkeypatch, weights="/my data/w.pth")


def test_a_training_that_is_all_warm_up_is_warned_about():
    class Student(torch.nn.Module):
        pass

    config = CVAConfig(epochs=2, warmup_epochs=10, optimizer="adamw")
    lines = messages.opening(config, 2, VIEW, Student(), True, None)
    assert "WARNING: warmup_epochs 10, epochs 2" in lines[-1] and "at most 20% of learning_rate" in lines[-1]
    lines = messages.opening(CVAConfig(epochs=3, warmup_epochs=2, optimizer="adamw"), 2, VIEW, Student(), True, None)
    assert not any("WARNING" in line for line in lines)


def test_a_short_run_of_sgd_is_warned_of_with_numbers():
    from types import SimpleNamespace

    student = SimpleNamespace(parameters=lambda: [])

    def warnings(**settings):
        lines = messages.opening(CVAConfig(**settings), 2, (16, 24, 16), student, True, None)
        return [line for line in lines if line.startswith("WARNING")]

    (warning,) = warnings(optimizer="sgd", epochs=20, iterations_per_epoch=50)
    assert (
        "1000 iterations of SGD at learning_rate 0.01" in warning
        and "1 of 5 splits" in warning
        and "fresh decoder" in warning
        and "Between 1000 iterations and the paper's 62500 nothing was measured" in warning
    )
    assert not warnings(optimizer="sgd", epochs=250)
    assert not warnings(optimizer="adamw", epochs=20, iterations_per_epoch=50)
