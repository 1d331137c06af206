"""What ``gpu.py`` measures: each item a function of the device, which reports as it goes."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_report import Report

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Item:
    """``least``: seconds without which it is not begun; ``limit``: after which it is cut off."""

    name: str
    least: int
    limit: int
    measure: Callable[[str, Report], None]


def run(name: str, device: str, out: Path) -> None:
    """Measure one item in this process; everything reported is in ``out`` at once, whatever happens next."""
    from gpu_report import Report

    (item,) = (item for item in ITEMS if item.name == name)
    item.measure(device, Report(out))


def steps(function: str, *first: Any) -> Callable[[str, Report], None]:
    """One of ``gpu_steps``, which takes seconds to import."""
    return lambda device, report: getattr(import_module("gpu_steps"), function)(*first, device, report)


# ---- the machine and what is right on it


def machine(device: str, report: Report) -> None:
    """Hardware and software; the two rates that every other number is a share of."""
    import torch
    from gpu_steps import torch_device

    on, cuda = torch_device(device), device == "cuda"
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


def correct(device: str, report: Report) -> None:
    """The GPU's tests; on a CPU those of them that need no GPU."""
    command = [sys.executable, "-u", "-m", "pytest", "-v", "-m", "cuda", "-W", "default", "-p", "no:cacheprovider", "-rs"]
    command += ["tests/test_cuda.py", "tests/test_augment.py", "-n", str(min(8, 1 + len(os.sched_getaffinity(0)) // 2))]
    environment = {**os.environ, "CVA_TEST_DEVICE": device, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    counts, failed = dict.fromkeys(("PASSED", "SKIPPED", "FAILED", "ERROR"), 0), []
    for line in process.stdout or ():
        print(line, end="", flush=True)
        if match := re.match(r"\[gw\d+\] \[ *\d+%\] (PASSED|SKIPPED|FAILED|ERROR) (.+)", line):
            counts[match[1]] += 1
            failed += [match[2]] if match[1] in ("FAILED", "ERROR") else []
            report(summary=", ".join(f"{n} {what.lower()}" for what, n in counts.items() if n), failed=failed)
    report(code=process.wait())
    if process.returncode:
        sys.exit("There were failures.")


# ---- data and a training


def augmentation(device: str, report: Report) -> None:
    """Every transform of a view on the device, and what hiding blocks takes for a whole batch."""
    import torch
    from augmentation import PROBABILITY, milliseconds, ours
    from gpu_steps import torch_device
    from timing import one_after_another

    from nnunetv2_cva.views.masking import expand_mask, hide

    on = torch_device(device)
    for edge in (128, 160) if device == "cuda" else (32,):
        view, size = torch.randn(1, edge, edge, edge).to(on), (edge, edge, edge)
        found = {name: milliseconds(ours(on)[name], view, 12) for name in PROBABILITY}
        found["mean of a view"] = sum(PROBABILITY[name] * ms for name, ms in found.items())
        views = torch.randn(8, 1, *size, device=on)
        mask = (torch.arange((edge // 16) ** 3, device=on) % 4 < 3).view(1, *[edge // 16] * 3).expand(8, -1, -1, -1)
        masked = one_after_another(lambda part: hide(views, expand_mask(mask, (16, 16, 16), size)), on, 10)  # noqa: B023
        report(**{f"{edge}^3": {**found, "hiding, 8 views": 1000 * masked["seconds"]}})


def data(device: str, report: Report) -> None:
    """A training's own measurement (``bench``) with more and more loader processes; the copy on the computation's stream."""
    from made import made_training

    cuda = device == "cuda"
    counts = (4, 8, 15) if cuda else (1, 2)
    with tempfile.TemporaryDirectory() as folder:
        made = made_training(Path(folder), "resencl_128" if cuda else "tiny", 16 if cuda else 4)
        for workers in counts:
            report.once(f"{workers} processes", _speeds, made, device, workers, True)
        report.once(f"{counts[1]} processes, copied on the computation's stream", _speeds, made, device, counts[1], False)


def _speeds(made: tuple[type, dict, dict], device: str, workers: int, own_stream: bool) -> dict[str, Any]:
    import torch

    from nnunetv2_cva.training.bench import bench_trainer, measure

    recipe, plans, dataset_json = made
    os.environ["nnUNet_n_proc_DA"] = str(workers)
    with bench_trainer(recipe, plans, "3d_fullres_cva", dataset_json, torch.device(device)) as trainer:
        if not own_stream:
            trainer.dataloader_train = getattr(trainer.dataloader_train, "batches", trainer.dataloader_train)
        found = measure(trainer, 15.0 if device == "cuda" else 2.0)
        lines = Path(trainer.log_file).read_text("utf-8").splitlines()
    said = [line for line in lines if "Attention: " in line or "The first step" in line]
    return {**vars(found), "cases": plans["configurations"]["3d_fullres_cva"]["batch_size"], "said": said}


def training(device: str, report: Report) -> None:
    """A pretraining, and fine-tunings from its weights and from scratch at one budget, on made cases."""
    from made import compare

    from nnunetv2_cva.demo.pipeline import Size

    size = Size(pretraining=(24, 200), labels=4, splits=2, fine_tuning=500)
    if device == "cpu":
        size = Size(images=10, test=4, pretraining=(2, 3), labels=1, splits=2, fine_tuning=10, scored=2, pairs=2)
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), device, size, report)


ITEMS = (
    Item("machine", 15, 60, machine),
    Item("attention", 25, 90, steps("attention")),
    Item("resencl", 60, 260, steps("ways", 0)),
    Item("primus", 60, 260, steps("ways", 1)),
    Item("correct", 60, 200, correct),
    Item("channels_last", 60, 200, steps("channels_last")),
    Item("data", 60, 200, data),
    Item("parts", 25, 60, steps("parts")),
    Item("graphs", 60, 240, steps("graphs")),
    Item("norms", 20, 60, steps("norms")),
    Item("checkpointing", 60, 300, steps("checkpointing")),
    Item("augmentation", 15, 40, augmentation),
    Item("training", 150, 420, training),
)
