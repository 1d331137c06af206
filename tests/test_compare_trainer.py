"""What a comparison fixes in nnU-Net's trainers, and nothing else: cases, batches, length; and how test cases are scored."""

import hashlib
import multiprocessing
import random

import numpy as np
import pytest
import torch
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from helpers.projects import DATASET_JSON, add_labels, make_project, make_trainer
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_cva.comparing.scores import dice, segment
from nnunetv2_cva.comparing.trainer import Numbered, fixed, set_length

TRAINING, TEST = ["case_01", "case_04"], ["case_00", "case_03"]


class Draws:
    """A loader whose batch is one number of each generator that nnU-Net draws from."""

    def set_thread_id(self, number):
        self.thread_id = number

    def __next__(self):
        return {"drawn": np.array([random.random(), np.random.rand(), torch.rand(1).item()])}


def drawn(batches, count):
    return np.stack([next(batches)["drawn"] for _ in range(count)])


@pytest.mark.parametrize("processes", [1, 3])
def test_batches_are_the_same_for_any_number_of_loader_processes(processes):
    alone = drawn(Numbered(Draws(), 7, 0), 6)
    assert len(np.unique(alone)) == alone.size, "every batch and every generator draws another number"
    if multiprocessing.get_start_method() != "fork":
        pytest.skip("batchgenerators starts its processes by forking")
    shared = MultiThreadedAugmenter(Numbered(Draws(), 7, processes), None, processes, 1, None)
    try:
        assert np.array_equal(drawn(shared, 6), alone)
    finally:
        shared._finish()


def test_another_seed_draws_other_batches():
    assert not np.intersect1d(drawn(Numbered(Draws(), 7, 0), 4), drawn(Numbered(Draws(), 8, 0), 4)).size


@pytest.fixture
def data(tmp_path, monkeypatch):
    folder = make_project(tmp_path, monkeypatch, cases=6)
    add_labels(folder)
    return folder


def trained(seed, disturb=False):
    """Digests of the batches that a short training sees, and the trainer. ``disturb``: something else draws numbers."""
    seen, epochs = [], []
    trainer = make_trainer(fixed(nnUNetTrainer, TRAINING, TEST, seed, lambda t: epochs.append(t.current_epoch)), fold=0)
    set_length(trainer, 10)
    trainer.num_epochs, trainer.num_iterations_per_epoch = 2, 2
    step = trainer.train_step

    def watched(batch):
        seen.append(hashlib.sha256(batch["data"].numpy().tobytes()).hexdigest())
        if disturb:
            torch.rand(3), np.random.rand(5)
        return step(batch)

    trainer.train_step = watched
    trainer.run_training()
    assert epochs == [1, 2]
    return seen, trainer


def test_arms_see_the_same_batches_of_the_same_cases_whatever_else_is_drawn(data):
    first, trainer = trained(3)
    again, _ = trained(3, disturb=True)
    other, _ = trained(4)
    assert len(set(first)) == 4 and first == again and not set(first) & set(other)
    assert trainer.do_split() == (TRAINING, TEST)
    assert type(trainer).__name__ == "nnUNetTrainer" and "nnUNetTrainer__" in trainer.output_folder
    scores = segment(trainer, TEST)
    assert set(scores) == set(TEST) and all(set(s.structures) == {"a"} for s in scores.values())
    assert trainer.network.decoder.deep_supervision, "training could go on"


def test_a_short_training_has_its_schedule_in_proportion(data):
    trainer = make_trainer(fixed(nnUNetTrainer, TRAINING, TEST, 0, lambda t: None), fold=0)
    trainer.warmup_duration_whole_net = 50  # nnU-Net's trainers with a warm-up have 50 of 1000 epochs
    set_length(trainer, 800)
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.warmup_duration_whole_net) == (50, 16, 2)


def test_without_a_length_the_schedule_is_the_trainers_own(data):
    trainer = make_trainer(fixed(nnUNetTrainer, TRAINING, TEST, 0, lambda t: None), fold=0)
    set_length(trainer, None)
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch) == (1000, 250)


def reference_dice(truth, guess, members, ignored=()):
    both = one = 0
    for t, g in zip(truth.ravel().tolist(), guess.ravel().tolist()):
        if t in ignored:
            continue
        both += (t in members) and (g in members)
        one += (t in members) + (g in members)
    return 2 * both / one if one else None


@pytest.mark.parametrize(
    "labels",
    [
        {"background": 0, "a": 1, "b": 2, "c": 3},
        {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "c": 3},
        {"background": 0, "a": 1, "b": 2, "ignore": 3},
    ],
)
def test_dice_is_that_of_a_slow_count(labels):
    rng = np.random.default_rng(0)
    truth, guess = (rng.integers(-1 if n == 0 else 0, 4 if "ignore" not in labels else 4 - n, (4, 5, 6)) for n in range(2))
    order = [1, 2, 3] if any(isinstance(v, list) for v in labels.values()) else None
    found = dice(truth, guess, LabelManager(labels, order), labels)
    ignored = (3,) if "ignore" in labels else ()
    wanted = {k: v for k, v in labels.items() if k not in ("background", "ignore")}
    for name, value in wanted.items():
        members = tuple(value) if isinstance(value, list) else (value,)
        assert found.structures[name] == pytest.approx(reference_dice(truth, guess, members, ignored)), name
    assert set(found.structures) == set(wanted)
    assert found.foreground == pytest.approx(reference_dice(truth, guess, (1, 2, 3), ignored))


def test_what_neither_has_has_no_dice():
    empty = np.zeros((2, 3, 4), int)
    found = dice(empty, empty, LabelManager(DATASET_JSON["labels"], None), DATASET_JSON["labels"])
    assert found.structures == {"a": None} and found.foreground is None
