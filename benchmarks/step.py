"""What a training step consists of: FLOPs at the paper's sizes, time and peak memory where the machine allows.

    python benchmarks/step.py flops [resencl_128 primusm_160]          # no memory needed: fake tensors, torch's own counter
    python benchmarks/step.py memory [resencl_128 primusm_160]         # bytes of all tensors at the peak, on fake tensors
    python benchmarks/step.py time [--device cuda] [--steps 10] [small_unet small_primus]     # on cuda also the two above

The step is put together of the trainer's own parts (student, teacher, objective, optimizer), timed one by one. Beside it, in the
same run: "slow way" is the same step with a teacher in float32 that goes through a decoder as well and with all taps brought to
16^3 positions that are all projected before they are aligned; "supervised" is a step of plain nnU-Net (Dice and cross-entropy
with deep supervision) with as many patches as we have views.

"needed" is the sum of what the method cannot do without: student forward and backward, teacher's encoder forward, heads on the
bins alone. Each is counted by itself, from the networks' plain modules.
"""

from __future__ import annotations

import argparse
import resource
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from preset_memory import GB, Fake, Peak
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.model.branches import Student, Teacher, align, make_backbone
from nnunetv2_cva.training.objective import Prepared, objective
from nnunetv2_cva.training.schedule import make_optimizer
from nnunetv2_cva.views.masking import expand_mask, hide

POSITIONS = 16  # of every tap, per axis, in the slow way


def unet(features: list[int], blocks: list[int]) -> nn.Module:
    """nnU-Net's ResEnc U-Net of one channel, with as many outputs."""
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    n = len(features)
    return ResidualEncoderUNet(
        input_channels=1, n_stages=n, features_per_stage=features, conv_op=nn.Conv3d, kernel_sizes=3,
        strides=[1] + [2] * (n - 1), n_blocks_per_stage=blocks, num_classes=1, n_conv_per_stage_decoder=[1] * (n - 1),
        conv_bias=True, norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )  # fmt: skip


def primus(width: int, depth: int, heads: int, size: int) -> nn.Module:
    """nnU-Net's Primus."""
    from dynamic_network_architectures.architectures.primus import Primus

    return Primus(
        1, width, (8, 8, 8), 1, depth, heads, (size,) * 3, drop_path_rate=0.2, scale_attn_inner=True, init_values=0.1
    )


ADAMW = CVAConfig(optimizer="adamw", learning_rate=3e-4, betas=(0.9, 0.98), weight_decay=5e-2, gradient_clip=1.0)
# Name: network, its view, cases per step, settings
SUBJECTS: dict[str, tuple[Callable[[], nn.Module], int, int, CVAConfig]] = {
    "resencl_128": (lambda: unet([32, 64, 128, 256, 320, 320], [1, 3, 4, 6, 6, 6]), 128, 4, CVAConfig()),
    "primusm_160": (lambda: primus(864, 16, 12, 160), 160, 4, ADAMW),
    "small_unet": (lambda: unet([16, 32, 64, 96], [1, 2, 2, 2]), 64, 2, CVAConfig(head_width=512, predictor_width=128)),
    "small_primus": (
        lambda: primus(384, 6, 8, 64), 64, 2, ADAMW.updated({"head_width": 512, "predictor_width": 128}, "small"),
    ),
}  # fmt: skip
PAPER = ("resencl_128", "primusm_160")


class Subject:
    """A student, its teacher, and a batch as the loader and ``prepare`` would leave it."""

    def __init__(self, name: str, device: torch.device) -> None:
        make, edge, cases, self.config = SUBJECTS[name]
        self.make, self.device, self.views, self.bf16 = make, device, 2 * cases, device.type == "cuda"
        with device:
            self.network = make()
            self.student = Student(make_backbone(self.network, self.config), self.config).train()
        self.teacher = Teacher(self.student).eval()
        self.optimizer = make_optimizer(self.student.parameters(), self.config, device)
        self.size, block = (edge,) * 3, self.student.backbone.block
        grid = tuple(-(-n // b) for n, b in zip(self.size, block, strict=True))
        tokens = grid[0] * grid[1] * grid[2]
        order = torch.arange(tokens, device=device).expand(self.views, -1).contiguous()
        self.mask = (order * 7 % tokens < round(self.config.mask_ratio * tokens)).view(-1, *grid)
        hidden = expand_mask(self.mask, block, self.size)
        views = torch.randn(self.views, 1, *self.size, device=device)
        inside = torch.ones(self.views, 1, *self.size, dtype=torch.bool, device=device)
        first, second = ([[0.0, 0.1, 0.2], [0.8, 1.0, 0.9]], [[0.2, 0.0, 0.1], [1.0, 0.9, 0.8]])
        rois = torch.tensor([first] * cases + [second] * cases, device=device)
        self.batch = Prepared(views, rois, inside, hide(views, hidden), self.mask, hidden)

    @property
    def autocast(self) -> Any:
        """bf16 where training would use it."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    @property
    def tensors(self) -> list[Tensor]:
        """What exists before a step."""
        b = self.batch
        modules = (*self.student.parameters(), *self.student.buffers(), *self.teacher.parameters(), *self.teacher.buffers())
        return [*modules, b.views, b.inside, b.visible, b.hidden]

    def step(self, part: Callable[[str], Any]) -> None:
        """The trainer's step after ``prepare``; ``part(name)`` is entered around each of its parts."""
        backbone, student, batch = self.student.backbone, self.student, self.batch
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast:
            with part("student, backbone"):
                maps, image, reconstruction = backbone(batch.visible, batch.mask)
            out = {"reconstruction": reconstruction}
            with part("RoIAlign, student"):
                rows = align(maps, backbone.taps, batch.rois, student.bins, batch.views.shape[2:])
            with part("heads, student"):
                out["bins"] = student.predictor(student.projector(rows.flatten(0, 1))).unflatten(0, rows.shape[:2])
                out["image"] = student.predictor(student.projector(image))
            with torch.no_grad():
                with part("teacher, backbone"):
                    maps, image = self.teacher.encode(self.teacher.encoder, batch.views)
                with part("RoIAlign, teacher"):
                    rows = align(maps, self.teacher.taps, batch.rois, student.bins, batch.views.shape[2:])
                with part("heads, teacher"):
                    bins = self.teacher.projector(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
                    teacher = {"bins": bins, "image": self.teacher.projector(image)}
        with part("losses"):
            total = objective(out, teacher, batch, self.config)["total"]
        self.finish(total, part)
        with part("teacher follows"):
            self.teacher.follow(student, self.config.teacher_momentum)

    def finish(self, total: Tensor, part: Callable[[str], Any]) -> None:
        """Backward, clip, step."""
        with part("backward"):
            total.backward()
        with part("clip and optimizer"):
            nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], self.config.gradient_clip)
            self.optimizer.step()

    def whole(self, part: Callable[[str], Any]) -> None:
        """The step by the modules that the trainer calls, in one part."""
        self.optimizer.zero_grad(set_to_none=True)
        with part("whole step"):
            with self.autocast:
                student = self.student(self.batch.visible, self.batch.mask, self.batch.rois)
                teacher = self.teacher(self.batch.views, self.batch.rois)
            self.finish(objective(student, teacher, self.batch, self.config)["total"], lambda name: nullcontext())
            self.teacher.follow(self.student, self.config.teacher_momentum)

    def slow_way(self, part: Callable[[str], Any]) -> None:
        """Teacher in float32 and through a decoder; 16^3 positions of every tap projected, then aligned."""
        backbone, batch = self.student.backbone, self.batch
        self.optimizer.zero_grad(set_to_none=True)
        with part("slow way"):
            with self.autocast:
                maps, image, reconstruction = backbone(batch.visible, batch.mask)
                bins = self.late(maps, lambda rows: self.student.predictor(self.student.projector(rows)))
                image = self.student.predictor(self.student.projector(image))
            with torch.no_grad():
                maps, vector = self.teacher.encode(self.teacher.encoder, batch.views)
                decode(backbone, maps)
                teacher = {"bins": self.late(maps, self.teacher.projector), "image": self.teacher.projector(vector)}
            student = {"bins": bins, "image": image, "reconstruction": reconstruction}
            self.finish(objective(student, teacher, batch, self.config)["total"], lambda name: nullcontext())
            self.teacher.follow(self.student, self.config.teacher_momentum)

    def late(self, maps: list[Tensor], head: Callable[[Tensor], Tensor]) -> Tensor:
        """(N, R, D): pooled or interpolated to 16^3 positions, projected, and only then aligned."""
        from nnunetv2_cva.model.roi_align import roi_align_3d

        grid = (min(POSITIONS, self.size[0] // 4),) * 3
        same = torch.cat([F.adaptive_avg_pool3d(m, grid) if m.shape[2] >= grid[0] else F.interpolate(m, grid) for m in maps], 1)
        rows = head(same.flatten(2).transpose(1, 2).flatten(0, 1))
        found = rows.unflatten(0, (self.views, -1)).transpose(1, 2).unflatten(2, grid).contiguous()
        i = self.size[0] // grid[0]
        bins = roi_align_3d(
            found, self.batch.rois, self.student.bins, view_size=self.size, stride=(i,) * 3, offset=(0.0, 0.0, 0.0)
        )
        return bins.flatten(2).transpose(1, 2)


def decode(backbone: Any, maps: list[Tensor]) -> None:
    """The decoder that the released research code's teacher runs for nothing."""
    if hasattr(backbone.network, "decoder"):
        backbone.network.decoder(maps)
    else:
        tokens = maps[0].flatten(2).transpose(1, 2)
        features = backbone.decoder_blocks(tokens)[0]
        backbone.patch_decoder(features.transpose(1, 2).unflatten(2, maps[0].shape[2:]))


def supervised(subject: Subject) -> Callable[[Callable[[str], Any]], None]:
    """A step of plain nnU-Net with as many patches as we have views; 2 classes need no other network."""
    with subject.device:
        network = subject.make().train()
    optimizer = make_optimizer(network.parameters(), subject.config, subject.device)
    target = (torch.randn(subject.views, 1, *subject.size, device=subject.device) > 0).float()

    def step(part: Callable[[str], Any]) -> None:
        optimizer.zero_grad(set_to_none=True)
        with part("supervised"):
            with subject.autocast:
                found = network(subject.batch.views)
                maps = [m.float() for m in (found if isinstance(found, (list, tuple)) else [found])]
                total = torch.stack([_dice_and_entropy(m, F.interpolate(target, m.shape[2:])) for m in maps]).sum()
            total.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 12.0)
            optimizer.step()

    if hasattr(network, "decoder"):
        network.decoder.deep_supervision = True
    step.tensors = [*network.parameters(), *network.buffers(), subject.batch.views, target]
    return step


def _dice_and_entropy(logits: Tensor, target: Tensor) -> Tensor:
    p = logits.sigmoid()
    dice = (2 * (p * target).sum() + 1e-5) / (p.sum() + target.sum() + 1e-5)
    return F.binary_cross_entropy_with_logits(logits, target) - dice


# ---- FLOPs


class Counts:
    """FLOPs by part. Backward's belong to the part that is open when it runs."""

    def __init__(self) -> None:
        self.of: dict[str, int] = defaultdict(int)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with FlopCounterMode(display=False) as counter:
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


def flops(names: list[str]) -> None:
    """Tables of FLOPs per step, in units of 10^12."""
    for name in names:
        # Which values weights begin with does not matter, and drawing them would look at values, which fake tensors have not.
        with patch("torch.nn.init._no_grad_trunc_normal_", lambda tensor, *_, **__: tensor), Fake(allow_non_fake_inputs=True):
            subject = Subject(name, torch.device("cpu"))
            counts = Counts()
            subject.step(counts)
            for other in (subject.whole, subject.slow_way, supervised(subject)):
                other(counts)
            least = needed(subject)
        print(f"\n{name}: {subject.views} views of {'x'.join(map(str, subject.size))}, TFLOPs per step\n")
        print("| part | TFLOPs |\n|---|---|")
        whole = counts.of["whole step"]
        for part, count in counts.of.items():
            if count:
                share = f" ({100 * count / whole:.2f} %)" if part.startswith("RoIAlign") else ""
                print(f"| {part}{share} | {count / 1e12:.3f} |")
        print("".join(f"| needed: {part} | {count / 1e12:.3f} |\n" for part, count in least.items()), end="")
        print(f"| needed, sum | {sum(least.values()) / 1e12:.3f} |")
        print(f"\nwhole / needed: {whole / sum(least.values()):.4f}; whole / slow way: {whole / counts.of['slow way']:.3f}")


def memory(names: list[str]) -> None:
    """Tables of GB at the peak of the second step, when the optimizer's state exists; bf16 as on a GPU."""
    for name in names:
        print(f"\n{name}, bf16, GB of tensors at the peak\n\n| step | GB | of the slow way |\n|---|---|---|")
        found = {}
        for run in ("slow way", "whole step", "supervised"):
            with patch("torch.nn.init._no_grad_trunc_normal_", lambda tensor, *_, **__: tensor), Fake():
                subject = Subject(name, torch.device("cpu"))
                subject.bf16 = True
                step = {"whole step": subject.whole, "slow way": subject.slow_way}.get(run) or supervised(subject)
                with Peak() as tracker:
                    for tensor in getattr(step, "tensors", subject.tensors):
                        tracker.note(tensor)
                    for _ in range(2):
                        step(lambda part: nullcontext())
                found[run] = tracker.peak / GB
                del subject, step
            print(f"| {run} | {found[run]:.1f} | {found[run] / found['slow way']:.2f} |", flush=True)


# ---- time and memory


class Times:
    """Seconds by part; on CUDA the device's, with a wait after every part."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.of, self.steps = device, defaultdict(float), 0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._wait()
        began = perf_counter()
        yield
        self._wait()
        self.of[name] += perf_counter() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def roi_align_both_ways(subject: Subject, times: Times) -> None:
    """RoIAlign of the student by itself, with its backward."""
    with torch.no_grad(), subject.autocast:
        maps = subject.student.backbone(subject.batch.visible, subject.batch.mask)[0]
    maps = [m.detach().requires_grad_() for m in maps]
    with times("RoIAlign, student, with backward"):
        rows = align(maps, subject.student.backbone.taps, subject.batch.rois, subject.student.bins, subject.batch.views.shape[2:])
        rows.sum().backward()


def time(names: list[str], device: torch.device, steps: int) -> None:
    """Tables of milliseconds per step and peak memory."""
    for name in names:
        subject = Subject(name, device)
        times = Times(device)
        runs = {"whole step": subject.whole, "slow way": subject.slow_way, "supervised": supervised(subject)}
        for step in (subject.step, *runs.values()):  # warm up
            step(lambda name: nullcontext())
        for _ in range(steps):  # in turn: what else runs on the machine meets all alike
            subject.step(times)
            for step in runs.values():
                step(times)
            roi_align_both_ways(subject, times)
        print(f"\n{name}: {subject.views} views of {'x'.join(map(str, subject.size))} on {device.type}\n\n| part | ms | share |")
        print("|---|---|---|")
        whole = times.of["whole step"]
        for part, seconds in times.of.items():
            print(f"| {part} | {1000 * seconds / steps:.1f} | {100 * seconds / whole:.1f} % |")
        if device.type == "cuda":
            for run, step in runs.items():
                torch.cuda.reset_peak_memory_stats()
                step(lambda name: nullcontext())
                print(f"Peak memory, {run}: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            print(f"Peak memory of the process, everything above: {peak / 1e9:.2f} GB")
        print(f"whole step / slow way: {whole / times.of['slow way']:.2f}", flush=True)
        del subject, runs


def main() -> None:
    """Count or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("flops", "memory", "time"))
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=", ".join(SUBJECTS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
    if args.what != "time":
        {"flops": flops, "memory": memory}[args.what](args.subjects or list(PAPER))
        return
    device = torch.device(args.device)
    torch.backends.cudnn.benchmark = True  # as nnUNetv2_train sets it
    time(args.subjects or [n for n in SUBJECTS if device.type == "cuda" or n not in PAPER], device, args.steps)


if __name__ == "__main__":
    main()
