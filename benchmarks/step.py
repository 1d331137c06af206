"""What a training step consists of: FLOPs and memory at the paper's sizes, times where the machine allows.

    python benchmarks/step.py flops [resencl_128 primusm_160]          # no memory needed: fake tensors, torch's own counter
    python benchmarks/step.py memory [resencl_128 primusm_160]         # bytes of all tensors at the peak, on fake tensors
    python benchmarks/step.py time [--device cuda] [--compile] [--steps 10] [small_unet small_primus]  # cuda: also the two above

The whole step is the trainer's own; it is also taken apart and its parts are timed one by one. Beside it, in the same run: "slow
way" is the same step with a teacher in float32 that goes through a decoder as well, with all taps brought to 16^3 positions that
are all projected before they are aligned, and with all activations kept (never compiled); "supervised" is a step of plain nnU-Net
(Dice and cross-entropy with deep supervision) with as many patches as we have views.

"needed" is the sum of what the method cannot do without: student forward and backward, teacher's encoder forward, heads on the
bins alone. Each is counted by itself, from the networks' plain modules.
"""

from __future__ import annotations

import argparse
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from subjects import PAPER, SUBJECTS, Subject, supervised
from timing import in_turn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from nnunetv2_cva.training.memory import GB, Fake, Peak

# ---- FLOPs


# On a CPU attention is another operation, which torch's counter does not know.
_aten: Any = torch.ops.aten
ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, out_shape=None, **__: sdpa_flop(q, k, v),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *_, out_shape=None, **__: sdpa_backward_flop(g, q, k, v)
    ),
}


class Counts:
    """FLOPs by part. Backward's belong to the part that is open when it runs."""

    def __init__(self) -> None:
        self.of: dict[str, int] = defaultdict(int)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            yield
        self.of[name] += counter.get_total_flops()


def needed(subject: Subject) -> dict[str, int]:
    """What the method cannot do without, each counted by itself."""
    counts, config, batch = Counts(), subject.config, subject.batch
    student, teacher = subject.student, subject.teacher
    with counts("student's network, forward and backward"):
        maps, image, reconstruction = student.backbone(batch.visible, batch.mask)
        gradients = [torch.ones_like(m) for m in (*maps, reconstruction)]
        torch.autograd.backward([*maps, reconstruction, image], [*gradients, torch.ones_like(image)])
    with counts("teacher's encoder, forward"), torch.no_grad():
        teacher.encode(teacher.encoder, batch.views)
    bins = subject.views * config.roi_size[0] * config.roi_size[1] * config.roi_size[2]
    rows = torch.ones(bins + subject.views, student.backbone.image_channels, device=subject.device, requires_grad=True)
    with counts("heads on bins and image vectors"):
        student.predictor(student.projector(rows)).sum().backward()
        with torch.no_grad():
            teacher.projector(rows)
    return dict(counts.of)


def counted(name: str) -> tuple[Subject, dict[str, int], dict[str, int]]:
    """The subject, FLOPs of the parts of its step and of whole steps, and of what the method needs; on fake tensors."""
    # Which values weights begin with does not matter, and drawing them would look at values, which fake tensors have not.
    with patch("torch.nn.init._no_grad_trunc_normal_", lambda tensor, *_, **__: tensor), Fake(allow_non_fake_inputs=True):
        subject = Subject(name, torch.device("cpu"))
        counts = Counts()
        subject.step(counts)
        for other in (subject.whole, subject.slow_way, supervised(subject)):
            other(counts)
        return subject, dict(counts.of), needed(subject)


def flops(names: list[str]) -> None:
    """Tables of FLOPs per step, in units of 10^12."""
    for name in names:
        subject, counts, least = counted(name)
        print(f"\n{name}: {subject.views} views of {'x'.join(map(str, subject.size))}, TFLOPs per step\n")
        print("| part | TFLOPs |\n|---|---|")
        whole = counts["whole step"]
        for part, count in counts.items():
            if count:
                share = f" ({100 * count / whole:.2f} %)" if part.startswith("RoIAlign") else ""
                print(f"| {part}{share} | {count / 1e12:.3f} |")
        print("".join(f"| needed: {part} | {count / 1e12:.3f} |\n" for part, count in least.items()), end="")
        print(f"| needed, sum | {sum(least.values()) / 1e12:.3f} |")
        print(f"\nwhole / needed: {whole / sum(least.values()):.4f}; whole / slow way: {whole / counts['slow way']:.3f}")


def memory(names: list[str]) -> None:
    """Tables of GB at the peak of the second step, when the optimizer's state exists; bf16 as on a GPU."""
    for name in names:
        print(f"\n{name}, bf16, GB of tensors at the peak\n\n| step | GB | of the slow way |\n|---|---|---|")
        found = {}
        for run in ("slow way", "whole step", "whole step, all kept", "supervised"):
            with patch("torch.nn.init._no_grad_trunc_normal_", lambda tensor, *_, **__: tensor), Fake():
                subject = Subject(name, torch.device("cpu"), recompute=None if run == "whole step" else False)
                subject.bf16 = True
                step = {"slow way": subject.slow_way, "supervised": None}.get(run, subject.whole) or supervised(subject)
                with Peak() as tracker:
                    for tensor in getattr(step, "tensors", subject.tensors):
                        tracker.note(tensor)
                    for _ in range(2):
                        step(lambda part: nullcontext())
                found[run] = tracker.peak / GB
                del subject, step
            print(f"| {run} | {found[run]:.1f} | {found[run] / found['slow way']:.2f} |", flush=True)


# ---- time


def time(names: list[str], device: torch.device, steps: int, compiled: bool) -> None:
    """Tables of milliseconds per step."""
    for name in names:
        subject = Subject(name, device, compiled)
        slow = Subject(name, device, recompute=False)
        runs = {"whole step": subject.whole, "slow way": slow.slow_way, "supervised": supervised(subject)}
        for value in (False, "selective", True):
            label = f"whole step, gradient_checkpointing {value}"
            runs[label] = partial(Subject(name, device, compiled, recompute=value).whole, name=label)
        found = in_turn(subject, runs, steps)
        print(f"\n{name}: {subject.views} views of {'x'.join(map(str, subject.size))} on {device.type}\n\n| part | ms | share |")
        print("|---|---|---|")
        for part, seconds in found.items():
            print(f"| {part} | {1000 * seconds:.1f} | {100 * seconds / found['whole step']:.1f} % |")
        print(f"whole step / slow way: {found['whole step'] / found['slow way']:.2f}", flush=True)


def main() -> None:
    """Count or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("flops", "memory", "time"))
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=", ".join(SUBJECTS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="time: torch.compile, as in training; not the slow way")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    if args.what != "time":
        {"flops": flops, "memory": memory}[args.what](args.subjects or list(PAPER))
        return
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True  # as nnUNetv2_train sets it
    time(
        args.subjects or [n for n in SUBJECTS if n.startswith("small") or device.type == "cuda" and n in PAPER],
        device,
        args.steps,
        args.compile,
    )


if __name__ == "__main__":
    main()
