"""Times and peak memory of training steps and of their parts, the same way on every device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from time import perf_counter
from typing import Any

import torch
from subjects import Subject

from nnunetv2_cva.model.branches import align

Step = Callable[[Callable[[str], Any]], None]  # given what is entered around each of its parts
GB = 2**30
WARM_UP = 2  # steps after the first one


def wait(device: torch.device) -> None:
    """Until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize()


class Times:
    """Seconds by part; on CUDA the device's, with a wait after every part."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.of: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        wait(self.device)
        began = perf_counter()
        yield
        wait(self.device)
        self.of[name] += perf_counter() - began


def unmeasured(part: str) -> Any:
    """What is entered around the parts of a step that only warms up, or is measured as a whole."""
    return nullcontext()


def in_turn(subject: Subject, others: dict[str, Step], steps: int) -> dict[str, float]:
    """Seconds of every part of the subject's step, of every other step, and of the student's RoIAlign with its backward, mean of
    ``steps``. They take turns: what else runs on the machine meets all alike."""
    times = Times(subject.device)
    for step in (subject.step, *others.values()):
        step(unmeasured)
    for _ in range(steps):
        subject.step(times)
        for step in others.values():
            step(times)
        _roi_align_both_ways(subject, times)
    return {part: seconds / steps for part, seconds in times.of.items()}


def _roi_align_both_ways(subject: Subject, times: Times) -> None:
    with torch.no_grad(), subject.autocast:
        maps = subject.student.backbone(subject.batch.visible, subject.batch.mask)[0]
    maps = [m.detach().requires_grad_() for m in maps]
    with times("RoIAlign, student, with backward"):
        rows = align(maps, subject.student.backbone.taps, subject.batch.rois, subject.student.bins, subject.batch.views.shape[2:])
        rows.sum().backward()


def one_after_another(step: Step, device: torch.device, steps: int) -> dict[str, float]:
    """How a training has it, no wait between steps: ``seconds`` per step (the better half of two), how much the two halves differ
    (``spread``), seconds of the ``first`` step (compiling, tuning), and GB of memory at the ``peak`` (CUDA: of tensors,
    ``reserved`` by torch, and in use on the ``card``)."""
    began = perf_counter()
    step(unmeasured)
    wait(device)
    first = perf_counter() - began
    for _ in range(WARM_UP):
        step(unmeasured)
    wait(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    halves = []
    for _ in range(2):
        began = perf_counter()
        for _ in range(max(1, steps // 2)):
            step(unmeasured)
        wait(device)
        halves.append((perf_counter() - began) / max(1, steps // 2))
    found = {"seconds": min(halves), "spread": max(halves) / min(halves) - 1, "first": first}
    if device.type == "cuda":
        found["peak"] = torch.cuda.max_memory_allocated() / GB
        free, total = torch.cuda.mem_get_info()
        found |= {"reserved": torch.cuda.max_memory_reserved() / GB, "card": (total - free) / GB}
    return found
