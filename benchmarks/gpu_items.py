"""What ``gpu.py`` measures: each item a function of the device and of the seconds that it has, which reports as it goes."""

from __future__ import annotations

import gc
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parents[1]
Report = Callable[..., None]  # what has been found, by name


@dataclass(frozen=True)
class Item:
    """``least``: seconds without which it is not begun; ``limit``: after which it is cut off."""

    name: str
    least: int
    limit: int
    measure: Callable[[str, float, Report], None]


def run(name: str, device: str, seconds: float, out: Path) -> None:
    """Measure one item in this process; everything reported is in ``out`` at once, whatever happens next."""
    from nnunetv2_cva.files import write_json

    found: dict[str, Any] = {}

    def report(**values: Any) -> None:
        found.update(values)
        write_json(out, {"item": name, "found": found})

    (item,) = (item for item in ITEMS if item.name == name)
    item.measure(device, monotonic() + seconds, report)


def _torch_device(name: str) -> Any:
    import torch

    torch.backends.cudnn.benchmark = name == "cuda"  # as nnUNetv2_train sets it
    torch.set_num_threads(1)
    return torch.device(name)


def _compile(device: Any, mode: str | None = None) -> Callable[..., Any]:
    """torch.compile in this mode; in a rehearsal without code generation, which takes minutes on a CPU."""
    import torch

    options = {"backend": "aot_eager"} if device.type == "cpu" else {"mode": mode}
    return partial(torch.compile, **options)


def _paper(device: str) -> tuple[str, str]:
    return ("resencl_128", "primusm_160") if device == "cuda" else ("tiny_unet", "tiny_primus")


# ---- the machine and what is right on it


def machine(device: str, end: float, report: Report) -> None:
    """Hardware and software; the two rates that every other number is a share of."""
    import torch

    on, cuda = _torch_device(device), device == "cuda"
    report(python=platform.python_version(), torch=torch.__version__, cores=len(os.sched_getaffinity(0)))
    if cuda:
        properties, version = torch.cuda.get_device_properties(0), torch.backends.cudnn.version()
        smi = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
        )
        report(name=properties.name, memory=properties.total_memory, driver=smi.stdout.strip(), cuda=torch.version.cuda)
        report(cudnn=version, capability=f"{properties.major}.{properties.minor}", processors=properties.multi_processor_count)
    else:
        report(name=platform.processor() or platform.machine())
    report(copy_gb_s=_copy_rate(on, 2**30 if cuda else 2**22))
    report(bf16_tflops=_product_rate(on, 8192 if cuda else 256))


def _copy_rate(device: Any, numbers: int) -> float:
    """GB/s, read and written, of a copy on the device."""
    import torch
    from timing import one_after_another

    source, target = torch.randn(numbers, device=device), torch.empty(numbers, device=device)
    return 2 * 4 * numbers / one_after_another(lambda part: target.copy_(source), device, 20)["seconds"] / 1e9


def _product_rate(device: Any, edge: int) -> float:
    """TFLOP/s of a product of bf16 matrices."""
    import torch
    from timing import one_after_another

    a, b = (torch.randn(edge, edge, device=device).bfloat16() for _ in range(2))
    return 2 * edge**3 / one_after_another(lambda part: a @ b, device, 20)["seconds"] / 1e12


def correct(device: str, end: float, report: Report) -> None:
    """The GPU's tests; on a CPU those of them that need no GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-W", "default", "-p", "no:cacheprovider", "-rfEs"]
    environment = {**os.environ, "CVA_TEST_DEVICE": device, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command += ["tests/test_cuda.py", "tests/test_augment.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    lines = done.stdout.strip().splitlines() or ["nothing was printed"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    report(summary=re.sub(r"[= ]+$|^[= ]+", "", lines[-1]), failed=failed, code=done.returncode)


# ---- steps


def way(device: Any, name: str, how: str, **options: Any) -> dict[str, float]:
    """Time and memory of one way of taking a step, alone on the device. ``how``: a method of ``Subject``, or supervised;
    ``mode``: torch.compile's; ``kernel``: of attention, "auto": as a training would choose it; the rest are a subject's."""
    import torch
    from subjects import Subject, supervised
    from timing import one_after_another

    from nnunetv2_cva.training.attention import choose, preferring

    mode, kernel, steps = (
        options.pop("mode", None),
        options.pop("kernel", "auto"),
        options.pop("steps", 10 if device.type == "cuda" else 2),
    )
    with patch("torch.compile", _compile(device, mode)):
        subject = Subject(name, device, **options)
        if kernel == "auto":
            dtype = torch.bfloat16 if subject.bf16 else None
            kernel, _ = choose("auto", subject.student.backbone, subject.views, device, dtype)
        step: Any = supervised(subject) if how == "supervised" else getattr(subject, how)
        if how == "supervised":
            del subject.student, subject.teacher, subject.network, subject.optimizer, subject.training_step
    with preferring(kernel):
        found = one_after_another(step, device, steps)
    del subject, step
    _clean(device)
    return found


def _clean(device: Any) -> None:
    import torch

    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def ways(which: int, device: str, end: float, report: Report) -> None:
    """Whole step, slow way and supervised of one of the paper's networks, compiled and plain."""
    on, name = _torch_device(device), _paper(device)[which]
    report(subject=name)
    report(**{"whole step, compiled": way(on, name, "whole", compiled=True)})
    report(**{"whole step, plain": way(on, name, "whole")})
    report(**{"slow way": way(on, name, "slow_way", recompute=False)})
    report(**{"supervised, compiled": way(on, name, "supervised", compiled=True)})


def parts(device: str, end: float, report: Report) -> None:
    """Both steps taken apart, plain."""
    from subjects import Subject
    from timing import in_turn

    on = _torch_device(device)
    for name in _paper(device):
        subject = Subject(name, on)
        report(**{name: in_turn(subject, {"whole step": subject.whole}, 5 if device == "cuda" else 2)})
        del subject
        _clean(on)


# ---- switches


def attention(device: str, end: float, report: Report) -> None:
    """Kernels of attention: alone, as the start of a training measures them, and in the whole step."""
    import torch
    from subjects import Subject

    from nnunetv2_cva.training.attention import KERNELS, attentions, measure

    on, name = _torch_device(device), _paper(device)[1]
    subject = Subject(name, on)
    dtype = torch.bfloat16 if subject.bf16 else torch.float32
    for step in attentions(subject.student.backbone, subject.views):
        label = f"{'x'.join(map(str, step.shape))}, {step.count} times, {'with' if step.trained else 'without'} backward"
        report(**{label: {k: s if s < float("inf") else None for k, s in measure([step], on, dtype).items()}})
    del subject
    _clean(on)
    for kernel in (*KERNELS, None):
        label = f"whole step, plain, {kernel or 'as torch chooses'}"
        try:
            report(**{label: way(on, name, "whole", kernel=kernel)})
        except RuntimeError as e:
            report(**{label: str(e).splitlines()[0]})


def channels_last(device: str, end: float, report: Report) -> None:
    """The U-Net with its convolutions in channels-last-3d."""
    on, name = _torch_device(device), _paper(device)[0]
    report(**{"compiled": way(on, name, "whole", compiled=True, channels_last=True)})
    report(**{"plain": way(on, name, "whole", channels_last=True)})


def graphs(device: str, end: float, report: Report) -> None:
    """CUDA graphs, by torch.compile's mode."""
    on = _torch_device(device)
    for name in _paper(device):
        try:
            report(**{name: way(on, name, "whole", compiled=True, mode="reduce-overhead")})
        except Exception as e:  # a result like any other
            report(**{name: f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"})
            _clean(on)


def checkpointing(device: str, end: float, report: Report) -> None:
    """What computing again costs, and saves."""
    on = _torch_device(device)
    for name in _paper(device):
        for value in (False, "selective", True):
            report(**{f"{name}, {str(value).lower()}": way(on, name, "whole", compiled=True, recompute=value)})


def norms(device: str, end: float, report: Report) -> None:
    """Instance norm and LeakyReLU at full resolution, forward and backward, by themselves."""
    import torch
    from timing import one_after_another
    from torch import nn

    on, cuda = _torch_device(device), device == "cuda"
    shape = (8, 32, 128, 128, 128) if cuda else (2, 8, 24, 24, 24)
    for label, compiled, format_ in (
        ("plain", False, torch.contiguous_format),
        ("compiled", True, torch.contiguous_format),
        ("plain, channels last", False, torch.channels_last_3d),
        ("compiled, channels last", True, torch.channels_last_3d),
    ):
        block = nn.Sequential(nn.InstanceNorm3d(shape[1], affine=True), nn.LeakyReLU(inplace=True)).to(on)
        run_ = _compile(on)(block) if compiled else block
        x = torch.randn(shape, device=on, dtype=torch.bfloat16 if cuda else torch.float32).to(memory_format=format_)
        x.requires_grad_()

        def step(part: Any, run_: Any = run_, x: Any = x) -> None:
            x.grad = None
            with torch.autocast(on.type, torch.bfloat16, enabled=cuda):
                run_(x).backward(x.detach())

        found = one_after_another(step, on, 10)
        # At least: x read and the result written, forward; x and the gradient read and one written, backward.
        report(**{label: {**found, "gb_s": 5 * x.numel() * x.element_size() / found["seconds"] / 1e9}})
        del block, run_, x, step
        _clean(on)


# ---- data and a training


def augmentation(device: str, end: float, report: Report) -> None:
    """Every transform of a view on the device, and what hiding blocks takes for a whole batch."""
    import torch
    from augmentation import PROBABILITY, milliseconds, ours
    from timing import one_after_another

    from nnunetv2_cva.views.masking import expand_mask, hide

    on = _torch_device(device)
    for edge in (128, 160) if device == "cuda" else (32,):
        view, size = torch.randn(1, edge, edge, edge).to(on), (edge, edge, edge)
        found = {name: milliseconds(ours(on)[name], view, 12) for name in PROBABILITY}
        found["mean of a view"] = sum(PROBABILITY[name] * ms for name, ms in found.items())
        views = torch.randn(8, 1, *size, device=on)
        mask = (torch.arange((edge // 16) ** 3, device=on) % 4 < 3).view(1, *[edge // 16] * 3).expand(8, -1, -1, -1)
        masked = one_after_another(lambda part: hide(views, expand_mask(mask, (16, 16, 16), size)), on, 10)  # noqa: B023
        report(**{f"{edge}^3": {**found, "hiding, 8 views": 1000 * masked["seconds"]}})


def data(device: str, end: float, report: Report) -> None:
    """A training's own measurement (``bench``) with more and more loader processes; the copy on the computation's stream."""
    import torch
    from made import made_training

    from nnunetv2_cva.training.bench import bench_trainer, measure

    cuda = device == "cuda"
    counts = (4, 8, 15) if cuda else (1, 2)
    with tempfile.TemporaryDirectory() as folder:
        recipe, plans, dataset_json = made_training(Path(folder), "resencl_128" if cuda else "tiny", 16 if cuda else 4)
        for workers, own_stream in [*((n, True) for n in counts), (counts[1], False)]:
            os.environ["nnUNet_n_proc_DA"] = str(workers)
            with bench_trainer(recipe, plans, "3d_fullres_cva", dataset_json, torch.device(device)) as (trainer, said):
                if not own_stream and hasattr(trainer.dataloader_train, "batches"):
                    trainer.dataloader_train = trainer.dataloader_train.batches
                found = measure(trainer, 15.0 if cuda else 2.0)
            label = f"{workers} processes" + ("" if own_stream else ", copied on the computation's stream")
            report(**{label: {**vars(found), "cases": plans["configurations"]["3d_fullres_cva"]["batch_size"]}})
            report(said=[line for line in said if "Attention" in line or "First step" in line])


def training(device: str, end: float, report: Report) -> None:
    """A pretraining, and fine-tunings from its weights and from scratch at one budget, on made cases."""
    from made import compare

    compare(device, end, report)


ITEMS = (
    Item("machine", 15, 60, machine),
    Item("correct", 60, 170, correct),
    Item("resencl", 60, 200, partial(ways, 0)),
    Item("primus", 60, 200, partial(ways, 1)),
    Item("attention", 25, 60, attention),
    Item("parts", 25, 60, parts),
    Item("data", 60, 200, data),
    Item("channels_last", 60, 150, channels_last),
    Item("graphs", 60, 150, graphs),
    Item("norms", 20, 60, norms),
    Item("checkpointing", 60, 240, checkpointing),
    Item("augmentation", 15, 40, augmentation),
    Item("training", 150, 420, training),
)
