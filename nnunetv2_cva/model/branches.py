"""The two branches: a student that is trained and the teacher that follows it."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.model.backbone import Backbone
from nnunetv2_cva.model.heads import Predictor, Projector
from nnunetv2_cva.model.primus import PrimusBackbone
from nnunetv2_cva.model.roi_align import roi_align_3d
from nnunetv2_cva.model.taps import Tap
from nnunetv2_cva.model.unet import UNetBackbone


def make_backbone(network: nn.Module, config: CVAConfig) -> Backbone:
    """The student's backbone for a network that nnU-Net built.

    Raises:
        ValueError: the network is of no supported family; says what it has and what would be needed.
    """
    return backbone_class(network)(network, config)


def backbone_class(network: nn.Module) -> type[UNetBackbone] | type[PrimusBackbone]:
    """Raises ValueError for a network of another kind than nnU-Net's."""
    if hasattr(network, "eva") and hasattr(network, "down_projection"):
        return PrimusBackbone
    if hasattr(network, "encoder") and all(hasattr(getattr(network, "decoder", None), n) for n in ("stages", "seg_layers")):
        return UNetBackbone
    found = ", ".join(name for name, _ in network.named_children()) or "no submodules"
    raise ValueError(
        f"{type(network).__name__} is not supported: expected a U-Net with `encoder.stages` (its taps) and a `decoder` with "
        f"`stages` and `seg_layers`, or a Primus with `down_projection` and `eva` (its tokens are the tap), found {found}. For "
        "another network a recipe names its `backbone` (docs/recipes.md)."
    )


class Student(nn.Module):
    """Backbone, projector and predictor; what is compiled and wrapped for several GPUs."""

    def __init__(self, backbone: Backbone, config: CVAConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.bins = config.roi_size
        self.projector: nn.Module | None = None
        self.predictor: nn.Module | None = None
        self.reads_bins = config.consistency_weight > 0
        self.reads_image = config.contrastive_weight > 0
        if config.needs_heads:
            self.projector = Projector(backbone.image_channels, config.head_width)
            self.predictor = Predictor(config.head_width, config.predictor_width)

    def forward(self, views: Tensor, mask: Tensor | None, rois: Tensor) -> dict[str, Tensor]:
        """``views``: (N, C, I, J, K) with hidden voxels 0; ``mask``: (N, gi, gj, gk) bool; ``rois``: (N, 2, 3).

        Returns, as far as the recipe's losses read them: ``bins`` (N, R, D) embeddings of the shared region, ``image`` (N, D),
        ``reconstruction`` (N, C, I, J, K).
        """
        maps, image, reconstruction = self.backbone(views, mask)
        out = {} if reconstruction is None else {"reconstruction": reconstruction}
        if self.projector is not None and self.predictor is not None:
            if self.reads_bins:
                rows = align(maps, self.backbone.taps, rois, self.bins, views.shape[2:])
                out["bins"] = _per_row(nn.Sequential(self.projector, self.predictor), rows)
            if self.reads_image:
                assert image is not None
                out["image"] = self.predictor(self.projector(image))
        return out

    @torch.no_grad()
    def features(self, views: Tensor, rois: Tensor) -> Tensor:
        """(N, R, sum of C) float32: what fine-tuning gets, the encoder's features of the bins. Nothing hidden, no gradient."""
        maps, _ = self.backbone.encode(self.backbone.averaged(), views)
        return align(maps, self.backbone.taps, rois, self.bins, views.shape[2:])

    def heads(self) -> dict[str, nn.Module]:
        """Everything trained that is not nnU-Net's network, by name."""
        named = {**dict(self.backbone.own_modules()), "projector": self.projector, "predictor": self.predictor}
        return {name: module for name, module in named.items() if module is not None}


class Teacher(nn.Module):
    """Exponential moving average of the student's encoder and projector. Sees unmasked views, without gradient."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.taps = student.backbone.taps
        self.bins = student.bins
        self.reads_bins, self.reads_image = student.reads_bins, student.reads_image
        self.encode = student.backbone.encode
        self.encoder = nn.ModuleDict({name: deepcopy(module) for name, module in student.backbone.averaged().items()})
        self.projector = deepcopy(student.projector)
        self.requires_grad_(False)
        self._pairs: tuple[list[Tensor], list[Tensor]] | None = None

    @torch.no_grad()
    def forward(self, views: Tensor, rois: Tensor) -> dict[str, Tensor]:
        """``views``: (N, C, I, J, K), nothing hidden. Returns ``bins`` (N, R, D) and ``image`` (N, D) as far as losses
        read them."""
        assert self.projector is not None
        maps, image = self.encode(self.encoder, views)
        out = {}
        if self.reads_bins:
            out["bins"] = _per_row(self.projector, align(maps, self.taps, rois, self.bins, views.shape[2:]))
        if self.reads_image:
            assert image is not None
            out["image"] = self.projector(image)
        return out

    @torch.no_grad()
    def follow(self, student: Student, momentum: float) -> None:
        """teacher = momentum * teacher + (1 - momentum) * student; one fused operation, in place.

        Running statistics of a backbone with batch normalisation follow as parameters do.
        """
        if self._pairs is None:
            self._pairs = self._match(student)
        mine, theirs = self._pairs
        torch._foreach_lerp_(mine, theirs, 1 - momentum)

    @torch.no_grad()
    def distance(self, student: Student) -> float:
        """Length of the difference to the student, in lengths of the teacher's own weights: 0 where it has not moved."""
        mine, theirs = self._pairs or self._match(student)
        apart = torch.stack(torch._foreach_norm(torch._foreach_sub(mine, theirs))).norm()
        return (apart / torch.stack(torch._foreach_norm(mine)).norm()).item()

    def _match(self, student: Student) -> tuple[list[Tensor], list[Tensor]]:
        """Corresponding tensors of both branches: parameters, and buffers that training changes."""
        assert self.projector is not None and student.projector is not None
        sources = {**student.backbone.averaged(), "projector": student.projector}
        copies = {**self.encoder, "projector": self.projector}
        assert sources.keys() == copies.keys()
        mine, theirs = ([t for name in copies for t in _changing(modules[name])] for modules in (copies, sources))
        assert [t.shape for t in mine] == [t.shape for t in theirs]
        return mine, theirs


def _changing(module: nn.Module) -> list[Tensor]:
    statistics = [t for name, t in module.named_buffers() if name.endswith(("running_mean", "running_var"))]
    return [*(p.detach() for p in module.parameters()), *statistics]


def align(maps: list[Tensor], taps: tuple[Tap, ...], rois: Tensor, bins: tuple[int, int, int], view_size: torch.Size) -> Tensor:
    """(N, R, sum of C) float32: every tap aligned on its own grid, then concatenated over channels (paper, ResEnc-L: 1120)."""
    i, j, k = view_size
    aligned = [
        roi_align_3d(m, rois, bins, view_size=(i, j, k), stride=tap.stride, offset=tap.offset)
        for m, tap in zip(maps, taps, strict=True)
    ]
    return torch.cat(aligned, dim=1).flatten(2).transpose(1, 2)


def _per_row(module: nn.Module, vectors: Tensor) -> Tensor:
    """Apply a module of (M, D) rows to (N, R, D) vectors."""
    return module(vectors.flatten(0, 1)).unflatten(0, vectors.shape[:2])
