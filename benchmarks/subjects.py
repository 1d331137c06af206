"""Networks, batches and the three ways of taking a step that ``step.py`` compares."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunetv2_cva.config import PRIMUS, CVAConfig
from nnunetv2_cva.model.branches import Student, Teacher, align, make_backbone
from nnunetv2_cva.model.roi_align import roi_align_3d
from nnunetv2_cva.training.checkpoint import Run
from nnunetv2_cva.training.objective import Prepared, objective
from nnunetv2_cva.training.schedule import make_optimizer
from nnunetv2_cva.training.step import TrainingStep
from nnunetv2_cva.views.masking import expand_mask, hide

POSITIONS = 16  # of every tap, per axis, in the slow way


def unet(features: list[int], blocks: list[int]) -> nn.Module:
    """nnU-Net's ResEnc U-Net of one channel, with as many outputs."""
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    n = len(features)
    return ResidualEncoderUNet(
        input_channels=1,
        n_stages=n,
        features_per_stage=features,
        conv_op=nn.Conv3d,
        kernel_sizes=3,
        strides=[1] + [2] * (n - 1),
        n_blocks_per_stage=blocks,
        num_classes=1,
        n_conv_per_stage_decoder=[1] * (n - 1),
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )


def primus(width: int, depth: int, heads: int, size: int) -> nn.Module:
    """nnU-Net's Primus."""
    from dynamic_network_architectures.architectures.primus import Primus

    return Primus(1, width, (8, 8, 8), 1, depth, heads, (size,) * 3, drop_path_rate=0.2, scale_attn_inner=True, init_values=0.1)


ADAMW = CVAConfig(**PRIMUS)
# Name: network, its view, cases per step, settings
SUBJECTS: dict[str, tuple[Callable[[], nn.Module], int, int, CVAConfig]] = {
    "resencl_128": (lambda: unet([32, 64, 128, 256, 320, 320], [1, 3, 4, 6, 6, 6]), 128, 4, CVAConfig()),
    "primusm_160": (lambda: primus(864, 16, 12, 160), 160, 4, ADAMW),
    "small_unet": (lambda: unet([16, 32, 64, 96], [1, 2, 2, 2]), 64, 2, CVAConfig(head_width=512, predictor_width=128)),
    "small_primus": (lambda: primus(384, 6, 8, 64), 64, 2, ADAMW.updated({"head_width": 512, "predictor_width": 128}, "small")),
    "tiny_unet": (lambda: unet([4, 8, 12], [1, 1, 1]), 32, 2, CVAConfig(head_width=64, predictor_width=16)),
    "tiny_primus": (lambda: primus(96, 2, 4, 32), 32, 2, ADAMW.updated({"head_width": 64, "predictor_width": 16}, "tiny")),
}
PAPER = ("resencl_128", "primusm_160")


class Subject:
    """A student, its teacher, and a batch as the loader and ``prepare`` would leave it."""

    def __init__(
        self, name: str, device: torch.device, compiled: bool = False, recompute: Any = None, channels_last: bool = False
    ) -> None:
        """``recompute``: gradient_checkpointing; None: the recipe's default."""
        make, edge, cases, self.config = SUBJECTS[name]
        if recompute is not None:
            self.config = replace(self.config, gradient_checkpointing=recompute)
        self.make, self.device, self.views, self.bf16 = make, device, 2 * cases, device.type == "cuda"
        with device:
            self.network = make()
            self.student = Student(make_backbone(self.network, self.config), self.config).train()
        if channels_last:  # as the trainer does it
            self.student.to(memory_format=torch.channels_last_3d)
        self.teacher = Teacher(self.student).eval()
        self.optimizer = make_optimizer(self.student.parameters(), self.config, device)
        run = Run(self.student, self.teacher, self.optimizer, None)
        self.training_step = TrainingStep(run, self.student, self.config, autocast=lambda: self.autocast, compiled=compiled)
        self.compiled = compiled
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
        """The trainer's step taken apart; ``part(name)`` is entered around each of its parts."""
        backbone, student, batch = self.student.backbone, self.student, self.batch
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast:
            with torch.no_grad():
                with part("teacher, backbone"):
                    maps, image = self.teacher.encode(self.teacher.encoder, batch.views)
                with part("RoIAlign, teacher"):
                    rows = align(maps, self.teacher.taps, batch.rois, student.bins, batch.views.shape[2:])
                with part("heads, teacher"):
                    bins = self.teacher.projector(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
                    teacher = {"bins": bins, "image": self.teacher.projector(image)}
            with part("student, backbone"):
                maps, image, reconstruction = backbone(batch.visible, batch.mask)
            out = {"reconstruction": reconstruction}
            with part("RoIAlign, student"):
                rows = align(maps, backbone.taps, batch.rois, student.bins, batch.views.shape[2:])
            with part("heads, student"):
                out["bins"] = student.predictor(student.projector(rows.flatten(0, 1))).unflatten(0, rows.shape[:2])
                out["image"] = student.predictor(student.projector(image))
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

    def whole(self, part: Callable[[str], Any], name: str = "whole step") -> None:
        """The trainer's own step, in one part."""
        with part(name):
            self.training_step(self.batch)

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
                found = forward(subject.batch.views)
                maps = [m.float() for m in (found if isinstance(found, (list, tuple)) else [found])]
                total = torch.stack([_dice_and_entropy(m, F.interpolate(target, m.shape[2:])) for m in maps]).sum()
            total.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 12.0)
            optimizer.step()

    if hasattr(network, "decoder"):
        network.decoder.deep_supervision = True
    forward = torch.compile(network) if subject.compiled else network
    step.tensors = [*network.parameters(), *network.buffers(), subject.batch.views, target]
    return step


def _dice_and_entropy(logits: Tensor, target: Tensor) -> Tensor:
    p = logits.sigmoid()
    dice = (2 * (p * target).sum() + 1e-5) / (p.sum() + target.sum() + 1e-5)
    return F.binary_cross_entropy_with_logits(logits, target) - dice
