"""``bench``: plausible numbers, the right bottleneck, nothing left behind. No test depends on how fast anything is."""

import os
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.projects import CONFIGURATION, DATASET_JSON, NAME, make_project, plans
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2_cva.trainers.nnUNetTrainerCVA import nnUNetTrainerCVA

from nnunetv2_cva.commands import main
from nnunetv2_cva.training import bench, clock
from nnunetv2_cva.training import trainer as trainer_module
from nnunetv2_cva.training.bench import Speeds, advice, bench_trainer, measure, table, warnings
from nnunetv2_cva.training.clock import make_clock
from nnunetv2_cva.transfer import target

CPU = torch.device("cpu")
FOUND = Speeds(loader=8.0, device=2.0, both=1.9, waiting=0.01, workers=4, first_step=3.0, memory=6 * 2**30, available=8 * 2**30)


@pytest.fixture
def project(tmp_path, monkeypatch):
    make_project(tmp_path, monkeypatch)
    monkeypatch.setattr(target, "trainer_class", lambda name: {"nnUNetTrainerCVA": nnUNetTrainerCVA}.get(name, nnUNetTrainer))
    return tmp_path


def files(folder):
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_the_command_prints_speeds_and_advice_and_leaves_nothing(project, capsys):
    before = files(project)
    assert main.main(["bench", "-d", "100", "-c", CONFIGURATION, "-device", "cpu", "--seconds", "0.5"]) == 0
    out = capsys.readouterr().out
    for words in ("loader alone, 0 processes", "device alone (cpu)", "both", "cases/s", "Waiting for data:", "Bottleneck: the "):
        assert words in out, words
    assert "Each step: 2 cases, views of 16x24x16 voxels, float32" in out and "2 epochs of 2 steps would take" in out
    assert files(project) == before


def test_the_kernel_of_attention_is_said_and_every_step_prefers_it(project, capsys, monkeypatch):
    """Chosen at the start of a training; for a U-Net on a CPU there is nothing to choose."""
    preferred = []
    monkeypatch.setattr(trainer_module, "choose", lambda *given: preferred.append(given[2]) or ("flash", "Attention: flash."))
    monkeypatch.setattr(trainer_module, "preferring", lambda kernel: preferred.append(kernel) or nullcontext())
    assert main.main(["bench", "-d", "100", "-c", CONFIGURATION, "-device", "cpu", "--seconds", "0.1"]) == 0
    assert capsys.readouterr().out.count("\nAttention: flash.\n") == 1
    assert preferred[0] == 4 and len(preferred) > 2 and set(preferred[1:]) == {"flash"}, "4 views, then every step"


class Simulated:
    """Loader processes that make a batch every ``pause`` seconds while fewer than ``prepared`` lie ready, on a clock that only
    they and the device move."""

    def __init__(self, batch, pause, workers, prepared):
        self.batch, self.pause, self.workers, self.prepared = batch, pause, workers, prepared
        self.now, self.made, self.taken = 0.0, [], []

    def __next__(self):
        room = self.taken[-self.prepared] if self.prepared and len(self.taken) >= self.prepared else 0.0
        if not self.prepared:  # made when asked for
            room = self.now
        self.made.append(max(self.made[-1] if self.made else 0.0, room) + self.pause)
        self.now = max(self.now, self.made[-1])
        self.taken.append(self.now)
        return self.batch

    def close(self):
        pass


@pytest.mark.parametrize(
    "pause, step_pause, workers, prepared",
    [(0.04, 0.01, 0, 0), (0.01, 0.04, 0, 0), (0.2, 0.1, 1, 2), (1 / 1.5, 0.5, 12, 24), (0.05, 0.1, 2, 4)],
)
def test_the_speeds_are_those_of_the_parts(project, monkeypatch, pause, step_pause, workers, prepared):
    """The slower part is the bottleneck, waiting is the loader's share, and batches that were ready before do not count."""
    with bench_trainer(nnUNetTrainerCVA, plans(), CONFIGURATION, DATASET_JSON, CPU) as trainer:
        loader, seen = Simulated(next(trainer.dataloader_train), pause, workers, prepared), []

        def step(given):
            seen.append(given["step"])
            loader.now += step_pause

        for module in (bench, clock):
            monkeypatch.setattr(module, "perf_counter", lambda: loader.now)
        trainer.dataloader_train.close()
        trainer.dataloader_train, trainer.train_step = loader, step
        found = measure(trainer, 100 * max(pause, step_pause))
    together = max(pause, step_pause) if prepared else pause + step_pause
    assert found.bottleneck == ("loader" if pause > step_pause else "device")
    assert found.loader == pytest.approx(1 / pause, rel=0.01) and found.device == pytest.approx(1 / step_pause, rel=0.01)
    assert found.both == pytest.approx(1 / together, rel=0.05)
    assert found.waiting == pytest.approx(1 - step_pause / together, abs=0.05)
    assert len(set(seen)) > 3  # the fixed batch is augmented differently each time


def test_the_fixed_batch_stays_as_it_is(project):
    with bench_trainer(nnUNetTrainerCVA, plans(), CONFIGURATION, DATASET_JSON, CPU) as trainer:
        batch = next(trainer.dataloader_train)
        views = batch["views"].clone()
        speed, first = bench._device(trainer, batch, 0.2, make_clock(CPU))
    assert torch.equal(views, batch["views"]) and speed > 0 and first > 0


def test_the_step_is_the_trainers(project):
    """Weights move and the teacher follows, as in training."""
    with bench_trainer(nnUNetTrainerCVA, plans(), CONFIGURATION, DATASET_JSON, CPU) as trainer:
        before = [p.detach().clone() for p in trainer.student.parameters() if p.requires_grad]
        teacher = [p.clone() for p in trainer.teacher.parameters()]
        measure(trainer, 0.1)
        assert any(not torch.equal(a, b) for a, b in zip(before, (p for p in trainer.student.parameters() if p.requires_grad)))
        assert any(not torch.equal(a, b) for a, b in zip(teacher, trainer.teacher.parameters()))


def test_the_environment_is_restored_also_after_an_error(project, monkeypatch):
    monkeypatch.delenv("nnUNet_wandb_enabled", raising=False)
    with pytest.raises(ValueError, match="2D .*Pretraining needs a 3D configuration"):
        with bench_trainer(nnUNetTrainerCVA, plans(), "2d", DATASET_JSON, CPU):
            pass
    assert os.environ["nnUNet_results"] == str(project / "results") and "nnUNet_wandb_enabled" not in os.environ


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["-d", "100", "-c", CONFIGURATION, "-tr", "nnUNetTrainer"], "nnUNetTrainer is no pretraining trainer"),
        (["-d", "100", "-c", "3d_none"], "has no configuration '3d_none'. Found: 3d_fullres, 2d"),
        (["-d", "101", "-c", CONFIGURATION], "No dataset 101"),
        (["-d", "100", "-c", CONFIGURATION, "-p", "Other"], "has no plans 'Other'"),
        (["-d", "100", "-c", CONFIGURATION, "--seconds", "0"], "--seconds: expected a positive number, found 0"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(project, arguments, message, capsys):
    assert main.main(["bench", "-device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named(project, capsys):
    assert main.main(["bench", "-d", "100", "-c", CONFIGURATION]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_too_little_memory_says_what_to_set(project, monkeypatch):
    def full(batch):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with bench_trainer(nnUNetTrainerCVA, plans(), CONFIGURATION, DATASET_JSON, CPU) as trainer:
        trainer.train_step = full
        with pytest.raises(ValueError, match="does not fit into the memory of the device: set gradient_checkpointing"):
            measure(trainer, 0.1)


class Trainer:
    """As much of a trainer as advice looks at."""

    def __init__(self, device="cuda", compiled=True, dtype=torch.bfloat16, checkpointing=False):
        self.device, self.autocast_dtype = torch.device(device), dtype
        self.config = nnUNetTrainerCVA.config.updated({"gradient_checkpointing": checkpointing}, "test")
        self._do_i_compile = lambda: compiled


@pytest.mark.parametrize(
    "change, cores, expected",
    [
        ({"loader": 1.0}, 16, "nnUNet_n_proc_DA=10 "),
        ({"loader": 1.0}, 8, "nnUNet_n_proc_DA=7 "),
        ({"loader": 1.0}, 4, "All 4 cores .* 10 loader processes would need as many cores"),
    ],
)
def test_a_slow_loader_needs_processes_or_cores(change, cores, expected):
    (first, *_) = advice(replace(FOUND, **change), Trainer(), cores)
    assert re.search(expected, first), first


@pytest.mark.parametrize(
    "options, memory, expected",
    [
        ({"dtype": None}, 6 * 2**30, 'precision "auto"'),
        ({"compiled": False}, 6 * 2**30, "nnUNet_compile=1"),
        ({"checkpointing": True}, 2 * 2**30, 'gradient_checkpointing "selective"'),
        ({"checkpointing": "selective"}, 7.9 * 2**30, "fail: gradient_checkpointing true"),
        ({"checkpointing": True}, 7.9 * 2**30, "fail: a smaller batch_size or patch_size"),
        ({}, 2 * 2**30, "75 % of the memory is free"),
        ({}, 7.9 * 2**30, 'gradient_checkpointing "selective"'),
        ({}, 6 * 2**30, "Nothing: the device is busy"),
        ({"device": "cpu"}, 6 * 2**30, "A CUDA GPU"),
    ],
)
def test_a_slow_device_is_told_what_would_help(options, memory, expected):
    (line,) = advice(replace(FOUND, memory=int(memory)), Trainer(**options), 8)
    assert expected in line


def test_the_table_has_units_and_what_a_whole_training_takes():
    trainer = Trainer()
    trainer.view_size = (16, 24, 16)
    trainer.configuration_manager = type("Configuration", (), {"batch_size": 4})
    text = "\n".join(table(FOUND, trainer))
    assert "Peak memory of the device: 6.0 GB of 8.0 GB." in text and "bfloat16" in text
    assert "250 epochs of 250 steps would take 9.14 hours." in text
    assert [float(n) for n in text.splitlines()[2].split()[-3:]] == [8, 32, 0.125]


def test_only_warnings_of_the_trainer_are_passed_on():
    said = ["12 training cases, 2 loader processes.", "WARNING: only 2 of 9 cases", "Going on without torch.compile"]
    assert warnings("".join(f"2026-01-02 03:04:05.678: {line}\n" for line in said)) == said[1:]


def test_bench_needs_no_results_folder(project, monkeypatch):
    monkeypatch.delenv("nnUNet_results")
    with bench_trainer(nnUNetTrainerCVA, plans(), CONFIGURATION, DATASET_JSON, CPU) as trainer:
        assert not Path(trainer.output_folder).is_relative_to(project)
    assert not Path(trainer.output_folder).exists() and NAME in trainer.output_folder
