"""Steps of training on a GPU, each way alone on the device: whole and in parts, compiled and plain, switch by switch."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from gpu_report import Report
from subjects import Subject, supervised
from timing import in_turn, one_after_another, unmeasured, wait
from torch import nn

from nnunetv2_cva.training.attention import KERNELS, attentions, choose, measure, preferring


def torch_device(name: str) -> torch.device:
    """As a training has it."""
    torch.backends.cudnn.benchmark = name == "cuda"  # as nnUNetv2_train sets it
    torch.set_num_threads(1)
    return torch.device(name)


torch_compile = torch.compile  # which measurements replace


def compiler(device: torch.device, mode: str | None = None) -> Callable[..., Any]:
    """torch.compile in this mode; in a rehearsal without code generation, which takes minutes on a CPU."""
    if device.type == "cpu":
        return lambda module, options=None: torch_compile(module, backend="aot_eager")
    of_mode = torch._inductor.list_mode_options(mode) if mode else {}
    return lambda module, options=None: torch_compile(module, options={**(options or {}), **of_mode})


def paper(device: str) -> tuple[str, str]:
    """The paper's two networks; in a rehearsal small ones."""
    return ("resencl_128", "primusm_160") if device == "cuda" else ("tiny_unet", "tiny_primus")


def way(device: torch.device, name: str, how: str, **options: Any) -> dict[str, Any]:
    """Time and memory of one way of taking a step, alone on the device. ``how``: a method of ``Subject``, or supervised;
    ``mode``: torch.compile's; ``kernel``: of attention, "auto": as a training would choose it; the rest are a subject's."""
    mode, kernel = options.pop("mode", None), options.pop("kernel", "auto")
    with patch("torch.compile", compiler(device, mode)):
        subject = Subject(name, device, **options)
        if kernel == "auto":
            dtype = torch.bfloat16 if subject.bf16 else None
            kernel, _ = choose("auto", subject.student.backbone, subject.views, device, dtype)
        step: Any = supervised(subject) if how == "supervised" else getattr(subject, how)
        if how == "supervised":
            del subject.student, subject.teacher, subject.network, subject.optimizer, subject.training_step
    with preferring(kernel):
        found = one_after_another(step, device, 10 if device.type == "cuda" else 2)
        if how == "whole":
            found["kernels"] = kernels(step, device)
    del subject, step
    clean(device)
    return found


def kernels(step: Any, device: torch.device, steps: int = 3) -> dict[str, float]:
    """What a step spends its time in: ms per step of the kernels (on a CPU: operations) that take longest, and of all."""
    activities = [torch.profiler.ProfilerActivity.CPU] if device.type == "cpu" else [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as seen:
        for _ in range(steps):
            step(unmeasured)
        wait(device)
    times = {e.key: (e.self_cpu_time_total if device.type == "cpu" else e.self_device_time_total) for e in seen.key_averages()}
    longest = sorted(times, key=lambda key: -times[key])[:24]
    return {key[:160]: times[key] / steps / 1000 for key in longest} | {"all": sum(times.values()) / steps / 1000}


def clean(device: torch.device) -> None:
    """The next way finds the device as this one found it."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def ways(which: int, device: str, report: Report) -> None:
    """Whole step, slow way and supervised of one of the paper's networks. Plain before compiled, which takes minutes to begin."""
    on, name = torch_device(device), paper(device)[which]
    report(subject=name)
    report.once("whole step, plain", way, on, name, "whole")
    report.once("slow way", way, on, name, "slow_way", recompute=False)
    report.once("whole step, compiled", way, on, name, "whole", compiled=True)
    report.once("supervised, compiled", way, on, name, "supervised", compiled=True)


def parts(device: str, report: Report) -> None:
    """Both steps taken apart, plain."""
    on = torch_device(device)
    for name in paper(device):
        subject = Subject(name, on)
        report(**{name: in_turn(subject, {"whole step": subject.whole}, 5 if device == "cuda" else 2)})
        del subject
        clean(on)


# ---- switches


def attention(device: str, report: Report) -> None:
    """Kernels of attention: alone, as the start of a training measures them, and in the whole step."""
    on, name = torch_device(device), paper(device)[1]
    subject = Subject(name, on)
    dtype = torch.bfloat16 if subject.bf16 else torch.float32
    for step in attentions(subject.student.backbone, subject.views):
        label = f"{'x'.join(map(str, step.shape))}, {step.count} times, {'with' if step.trained else 'without'} backward"
        report(**{label: {k: s if s < float("inf") else None for k, s in measure([step], on, dtype).items()}})
    del subject
    clean(on)
    for kernel in (*KERNELS, None):
        label = f"whole step, plain, {kernel or 'as torch chooses'}"
        report.once(label, way, on, name, "whole", kernel=kernel)


def channels_last(device: str, report: Report) -> None:
    """The U-Net with its convolutions in channels-last-3d."""
    on, name = torch_device(device), paper(device)[0]
    report.once("compiled", way, on, name, "whole", compiled=True, channels_last=True)
    report.once("plain", way, on, name, "whole", channels_last=True)


def graphs(device: str, report: Report) -> None:
    """CUDA graphs, by torch.compile's mode."""
    on = torch_device(device)
    for name in paper(device):
        report.once(name, way, on, name, "whole", compiled=True, mode="reduce-overhead")


def checkpointing(device: str, report: Report) -> None:
    """What computing again costs, and saves."""
    on = torch_device(device)
    for name in paper(device):
        for value in (False, "selective", True):
            report.once(f"{name}, {str(value).lower()}", way, on, name, "whole", compiled=True, recompute=value)


def norms(device: str, report: Report) -> None:
    """Instance norm and LeakyReLU at full resolution, forward and backward, by themselves."""
    on = torch_device(device)
    for compiled in (False, True):
        for last in (False, True):
            report.once(("compiled" if compiled else "plain") + ", channels last" * last, _norm, on, compiled, last)


def _norm(device: torch.device, compiled: bool, channels_last: bool) -> dict[str, float]:
    cuda = device.type == "cuda"
    shape, dtype = ((8, 32, 128, 128, 128), torch.bfloat16) if cuda else ((2, 8, 24, 24, 24), torch.float32)
    block: Any = nn.Sequential(nn.InstanceNorm3d(shape[1], affine=True), nn.LeakyReLU(inplace=True)).to(device)
    block = compiler(device)(block) if compiled else block
    x = torch.randn(shape, device=device, dtype=dtype)
    x = x.to(memory_format=torch.channels_last_3d if channels_last else torch.contiguous_format).requires_grad_()

    def step(part: Any) -> None:
        x.grad = None
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            block(x).backward(x.detach())

    found = one_after_another(step, device, 10)
    clean(device)
    # At least: x read and the result written, forward; x and the gradient read and one written, backward.
    return {**found, "gb_s": 5 * x.numel() * x.element_size() / found["seconds"] / 1e9}
