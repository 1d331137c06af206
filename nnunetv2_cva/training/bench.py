"""How fast a training would be on this machine: the loader alone, the device alone, both together.

The trainer is the one that training uses and so is its step; only its results folder is a temporary one.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from nnunetv2_cva.sizes import by
from nnunetv2_cva.training.clock import Clock, make_clock
from nnunetv2_cva.training.copies import COPIED
from nnunetv2_cva.training.messages import less_memory
from nnunetv2_cva.training.trainer import CVATrainer
from nnunetv2_cva.transfer.target import find_target
from nnunetv2_cva.views.resources import CGROUPS, usable_cores

# Of the seconds that a measurement may take. Starting is not counted.
LOADER, DEVICE, BOTH = 0.25, 0.35, 0.4
ENDLESS = 10**7  # epochs


@dataclass(frozen=True)
class Speeds:
    """Steps per second of the loader alone (``workers`` processes), the device alone, and both; ``waiting``: share of the time in
    which the device had nothing to do but wait for data. Memory in bytes; ``available`` is the device's (None: not known).
    ``first_step``: seconds, with whatever is compiled or tuned in it."""

    loader: float
    device: float
    both: float
    waiting: float
    workers: int
    first_step: float
    memory: int
    available: int | None

    @property
    def bottleneck(self) -> str:
        """ "loader" when it makes batches slower than the device uses them up."""
        return "loader" if self.loader < self.device else "device"


def bench(
    dataset: str, configuration: str, plans: str, trainer: str, device: str, seconds: float, say: Callable[[str], None]
) -> list[str]:
    """Measure a training for about ``seconds``, given as nnUNetv2_train's arguments. Returns the table, the bottleneck and what
    to do, as lines; ``say`` is told what goes on.

    Raises:
        ValueError: as ``find_target``, ``bench_trainer`` and ``measure``.
    """
    target = find_target(dataset, configuration, plans, trainer)
    say(f"{target.label} on {device}: about {seconds:.0f} s after the start.")
    used = torch.device(device)
    with _threads(device), bench_trainer(target.trainer, target.plans, configuration, target.dataset_json, used) as made:
        found = measure(made, seconds, lambda part: say(f"measuring: {part}"))
        other = found.loader / found.device if found.bottleneck == "device" else found.device / found.loader
        comparison = "The loader is" if found.bottleneck == "device" else "The device would be"
        log = Path(made.log_file).read_text("utf-8")
        helps = (*advice(found, made, usable_cores(os.environ, CGROUPS)), *warnings(log))
        return [
            "",
            *table(found, made),
            *_said(log, "Attention: "),
            "",
            f"Bottleneck: the {found.bottleneck}. {comparison} {other:.1f} times as fast. What would help:",
            *(f"  {line}" for line in helps),
        ]


@contextlib.contextmanager
def _threads(device: str) -> Iterator[None]:
    """As many threads as nnUNetv2_train gives torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if device == "cuda" else os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def bench_trainer(
    trainer: type, plans: dict[str, Any], configuration: str, dataset_json: dict[str, Any], device: torch.device
) -> Iterator[CVATrainer]:
    """A trainer that is ready for its first step and writes nothing that stays. Its loader has started.

    Raises:
        ValueError: no trainer of this package, no such device, or what training would refuse.
    """
    if not (isinstance(trainer, type) and issubclass(trainer, CVATrainer)):
        raise ValueError(f"{trainer.__name__} is no pretraining trainer of this package. nnUNetv2_cva trainers lists them.")
    if not {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}.get(device.type, True):
        name = device.type.upper()
        raise ValueError(
            f"There is no {name} device that this torch can use (nnUNetv2_cva doctor says why). There is always cpu."
        )
    kept = {name: os.environ.get(name) for name in ("nnUNet_results", "nnUNet_wandb_enabled")}
    tuned, made = torch.backends.cudnn.benchmark, None
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(nnUNet_results=folder, nnUNet_wandb_enabled="0")
        try:
            torch.backends.cudnn.benchmark = device.type == "cuda"  # as nnUNetv2_train sets it
            with contextlib.redirect_stdout(io.StringIO()):
                made = trainer({**plans, "continue_training": False}, configuration, "all", dataset_json, device)
                _start(made)
            yield made
        finally:
            torch.backends.cudnn.benchmark = tuned
            for name, value in kept.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            if made is not None and made.dataloader_train is not None:
                made.dataloader_train.close()


def _start(trainer: CVATrainer) -> None:
    """Everything that nnU-Net calls before the first step, without checking voxels or looking for weights to start from."""
    trainer.config = trainer.config.updated({"check_seconds": 0.0, "init_from": None}, "bench")
    trainer.num_epochs = ENDLESS
    trainer.disable_checkpointing = True
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()


def measure(trainer: CVATrainer, seconds: float, say: Callable[[str], None] = lambda line: None) -> Speeds:
    """Measure for about ``seconds``, longer where a single step takes longer. ``trainer``: as :func:`bench_trainer` makes it.

    Raises:
        ValueError: a step does not fit into the device's memory.
    """
    clock = make_clock(trainer.device)
    say("loader alone")
    loader, batch = _loader(trainer, LOADER * seconds)
    try:
        say("device alone")
        device, first = _device(trainer, batch, DEVICE * seconds, clock)
        say("both")
        both, waiting = _both(trainer, BOTH * seconds, clock)
    except RuntimeError as e:
        if not isinstance(e.__cause__ or e, torch.cuda.OutOfMemoryError):
            raise
        raise ValueError(
            f"A step does not fit into the {_size(clock.available())} of the device: set {less_memory(trainer.config)}."
        ) from None
    workers = trainer.dataloader_train.workers
    return Speeds(loader, device, both, waiting, workers, first, clock.peak(), clock.available())


def _loader(trainer: CVATrainer, seconds: float) -> tuple[float, dict[str, Any]]:
    """Steps per second, and one batch."""
    batches = getattr(trainer.dataloader_train, "batches", trainer.dataloader_train)  # without the copy to a GPU
    at_once = max(1, batches.workers)  # they come together: only whole rounds count
    for _ in range(batches.prepared + at_once):
        batch = next(batches)
    began, steps = perf_counter(), 0
    while steps == 0 or perf_counter() - began < seconds:
        for _ in range(at_once):
            batch = next(batches)
        steps += at_once
    return steps / (perf_counter() - began), batch


def _device(trainer: CVATrainer, batch: dict[str, Any], seconds: float, clock: Clock) -> tuple[float, float]:
    """Steps per second on one batch, differently augmented and masked in every step, and seconds of the first step."""
    batch = {name: value.to(trainer.device) if name in COPIED else value for name, value in batch.items()}

    def step(number: int) -> None:
        trainer.train_step({**batch, "views": batch["views"].clone(), "step": number})  # the clone is changed in place

    began = perf_counter()
    step(0)
    clock.wait()
    first = perf_counter() - began
    if first > seconds and trainer.device.type == "cpu":  # nothing is compiled or tuned there: it counts
        return 1 / first, first
    for number in range(1, 4 if trainer.device.type == "cuda" else 1):
        step(number)
    clock.wait()
    began, steps = perf_counter(), 0
    while steps == 0 or perf_counter() - began < seconds:
        step(4 + steps)
        clock.mark()
        steps += 1
    clock.wait()
    return steps / (perf_counter() - began), first


def _both(trainer: CVATrainer, seconds: float, clock: Clock) -> tuple[float, float]:
    """Steps per second of a training, and the share of the time in which the device waited for its next batch."""
    for _ in range(trainer.dataloader_train.prepared):  # made while the device was measured alone: they would hide a slow loader
        next(trainer.dataloader_train)
    trainer.train_step(next(trainer.dataloader_train))
    last = clock.mark()
    marks: list[tuple[Any, Any]] = []
    clock.wait()
    began = perf_counter()
    while not marks or perf_counter() - began < seconds:
        batch = next(trainer.dataloader_train)
        ready = clock.mark(hold=False)
        trainer.train_step(batch)
        marks.append((last, ready))
        last = clock.mark()
    clock.wait()
    elapsed = perf_counter() - began
    return len(marks) / elapsed, min(1.0, sum(clock.between(*pair) for pair in marks) / elapsed)


def advice(found: Speeds, trainer: CVATrainer, cores: int) -> list[str]:
    """What to set, most useful first. ``cores``: that this process may use."""
    return _for_the_loader(found, cores) if found.bottleneck == "loader" else _for_the_device(found, trainer)


def _for_the_loader(found: Speeds, cores: int) -> list[str]:
    needed = math.ceil(1.2 * max(1, found.workers) * found.device / found.loader)
    if found.workers < cores - 1:
        lines = [f"export nnUNet_n_proc_DA={min(needed, cores - 1)} (loader processes; now {found.workers})."]
    else:
        lines = [f"All {cores} cores that this process may use are in use: {needed} loader processes would need as many cores."]
    if needed > cores - 1:
        lines.append('Fewer resampled views: rotation_p and scale_p in "cva": a resampled view costs several times a crop.')
    return lines


def _for_the_device(found: Speeds, trainer: CVATrainer) -> list[str]:
    if trainer.device.type != "cuda":
        return ["A CUDA GPU. On a CPU: a smaller patch_size, batch_size or network, for trying things out."]
    lines, free = [], 1 - found.memory / (found.available or found.memory)
    if trainer.autocast_dtype is None:
        lines.append('precision "auto" in "cva": bf16 where the GPU has it. fp32 is set now.')
    if not trainer._do_i_compile():
        lines.append("export nnUNet_compile=1: torch.compile is off.")
    if trainer.config.gradient_checkpointing is True and free > 0.5:
        lines.append('gradient_checkpointing "selective" in "cva": more than half of the memory is free.')
    elif free > 0.4:
        lines.append(f"batch_size: {100 * free:.0f} % of the memory is free. More cases per step are another training, though.")
    elif free < 0.05:
        lines.append(f"The memory is all but full. If a step should fail: {less_memory(trainer.config)}.")
    return lines or ["Nothing: the device is busy with what has to be computed."]


def warnings(log: str) -> list[str]:
    """Of a trainer's log, what a user should know, without the times."""
    return _said(log, "WARNING", "instead of", "Going on without")


def _said(log: str, *marks: str) -> list[str]:
    lines = (re.sub(r"^\d{4}-\S+ [\d:.]+: ", "", line).rstrip() for line in log.splitlines())
    return [line for line in lines if any(mark in line for mark in marks)]


def table(found: Speeds, trainer: CVATrainer) -> list[str]:
    """The speeds as lines of text."""
    cases = trainer.configuration_manager.batch_size
    form = "{:34}{:>10}{:>10}{:>12}"
    rows = {
        f"loader alone, {found.workers} process{'es' * (found.workers != 1)}": found.loader,
        f"device alone ({trainer.device.type})": found.device,
        "both": found.both,
    }
    precision = str(trainer.autocast_dtype or torch.float32).removeprefix("torch.")
    of = f" of {_size(found.available)}" if found.available else ""
    what = "the device" if found.available else "the process, without loader processes"
    hours = trainer.config.epochs * trainer.config.iterations_per_epoch / found.both / 3600
    return [
        f"Each step: {cases} cases, views of {by(trainer.view_size)} voxels, {precision}; the first took "
        f"{found.first_step:.1f} s.",
        form.format("", "steps/s", "cases/s", "s per step"),
        *(form.format(name, f"{rate:.3g}", f"{rate * cases:.3g}", f"{1 / rate:.3g}") for name, rate in rows.items()),
        f"Waiting for data: {100 * found.waiting:.1f} % of the time.",
        *([f"Peak memory of {what}: {_size(found.memory)}{of}."] if found.memory else []),
        f"{trainer.config.epochs} epochs of {trainer.config.iterations_per_epoch} steps would take {hours:.3g} hours.",
    ]


def _size(count: int | None) -> str:
    return "memory" if count is None else f"{count / 2**30:.1f} GB"
