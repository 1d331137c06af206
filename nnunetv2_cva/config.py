"""The numbers of the method and of fine-tuning: two frozen dataclasses. Where values come from: ``settings.py``.

View size, cases per step, spacing and normalisation belong to nnU-Net's plans. Everything else is a field here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

from nnunetv2_cva.settings import (
    COUNT,
    FRACTIONS,
    INTERVAL,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_INTEGER,
    PROBABILITY,
    Range,
    Settings,
    check_resumable,
    explained,
    resolve,
    setting,
)

__all__ = ["CVAConfig", "DEFAULT", "FinetuneConfig", "PRIMUS", "UNET", "check_resumable", "document", "explanations", "resolve"]

MASK_BLOCKS, LEAST_BLOCKS = (16, 8, 4), 32  # edges in voxels, the paper's first; of a view
MAX_WARMUP_EPOCHS = 50  # of a fine-tuning, unless set

_BELOW_ONE = Range("a number in [0, 1)", lambda v: 0 <= v < 1)
_BETAS = Range("two numbers in [0, 1)", lambda v: all(0 <= b < 1 for b in v))
_COUNT_OR_NULL = Range("null or an integer >= 0", lambda v: v is None or v >= 0)

# How U-Nets are pretrained unless something else is asked for, chosen by measurement (benchmarks/evidence.md).
UNET: dict[str, Any] = {
    "optimizer": "adamw",
    "learning_rate": 1e-3,
    "weight_decay": 1e-2,
    "warmup_epochs": None,
    "spatial": "independent",
}
# The paper's optimisation of Primus-M, and half of the memory for some of the time.
PRIMUS: dict[str, Any] = {
    "optimizer": "adamw",
    "learning_rate": 3e-4,
    "betas": (0.9, 0.98),
    "weight_decay": 5e-2,
    "warmup_epochs": 10,
    "gradient_clip": 1.0,
    "epochs": 150,
    "gradient_checkpointing": "selective",
}


def _group(name: str) -> Callable[..., Any]:
    return partial(setting, group=name)


_views = _group("Two views of a case")
_intensity = _group("Intensities: low resolution is drawn per case, the rest per view")
_mask = _group("Masking")
_heads = _group("Alignment and heads")
_loss = _group("Losses; a weight of 0 removes the loss and everything only it needs")
_optimisation = _group("Optimisation")
_run = _group("The run")
_machine = partial(_run, may_change=True)


@dataclass(frozen=True)
class CVAConfig(Settings):
    """Everything of the method that is not in nnU-Net's plans. Defaults: the paper's MAE+CVA+Cont on U-Nets; what
    ``nnUNetTrainerCVA`` does instead is ``DEFAULT``.

    Lengths are in voxels of the preprocessed case, probabilities in [0, 1]; ``*_p`` is how often a transform is applied.
    ``(low, high)`` pairs are ranges of a uniform draw.
    """

    BLOCK: ClassVar[str] = "cva"
    VARIABLE: ClassVar[str] = "nnUNet_cva"
    RENAMED: ClassVar[dict[str, str]] = {"probe_cases": "watched_cases"}

    overlap: tuple[float, float] = _views((0.4, 0.8), "volume fraction of a view that the other one also contains", FRACTIONS)
    spatial: Literal["shared", "independent"] = _views(
        "shared", "mirroring and scale: the same for both views (paper) or drawn for each"
    )
    padding: float = _views(
        0.25,
        "how far a view may reach out of the case, in fractions of its extent",
        Range("0 <= padding < 0.5", lambda v: 0 <= v < 0.5),
    )
    mirror_p: float = _views(0.5, "mirroring, per axis", PROBABILITY)
    rotation_p: float = _views(0.2, "rotation, the same for both views", PROBABILITY)
    rotation_degrees: float = _views(
        30.0, "largest angle about each axis, in both directions", Range("0 to 45 degrees", lambda v: 0 <= v <= 45)
    )
    scale_p: float = _views(0.2, "scaling", PROBABILITY)
    scale_range: tuple[float, float] = _views((0.7, 1.4), "extent read from the case / extent of the view", INTERVAL)
    max_air: float = _views(
        0.8,
        "a pair whose shared region holds more air than this is drawn again; 1: never",
        Range("0 < max_air <= 1", lambda v: 0 < v <= 1),
    )

    low_resolution_p: float = _intensity(0.1, "low resolution: shrink and enlarge again", PROBABILITY)
    low_resolution_zoom: tuple[float, float] = _intensity((0.5, 1.0), "to which fraction of the size", FRACTIONS)
    noise_p: float = _intensity(0.1, "Gaussian noise", PROBABILITY)
    noise_sigma: tuple[float, float] = _intensity(
        (0.0, 0.1),
        "its standard deviation (batchgeneratorsv2 calls it variance and uses it as this)",
        Range("0 <= low <= high", lambda v: 0 <= v[0] <= v[1]),
    )
    blur_p: float = _intensity(0.2, "Gaussian blur", PROBABILITY)
    blur_channel_p: float = _intensity(0.5, "of a blurred view, how often a channel is", PROBABILITY)
    blur_sigma: tuple[float, float] = _intensity((0.5, 1.0), "its width in voxels", INTERVAL)
    brightness_p: float = _intensity(0.15, "brightness", PROBABILITY)
    brightness_range: tuple[float, float] = _intensity((0.75, 1.25), "factor", INTERVAL)
    contrast_p: float = _intensity(0.15, "contrast", PROBABILITY)
    contrast_range: tuple[float, float] = _intensity((0.75, 1.25), "factor about the mean", INTERVAL)
    inverted_gamma_p: float = _intensity(0.1, "gamma on the inverted image", PROBABILITY)
    gamma_p: float = _intensity(0.3, "gamma", PROBABILITY)
    gamma_range: tuple[float, float] = _intensity((0.7, 1.5), "exponent; mean and standard deviation are kept", INTERVAL)

    mask_ratio: float = _mask(0.75, "share of the blocks that is hidden", _BELOW_ONE)
    mask_block: int | None = _mask(
        None,
        "edge of a block in voxels, U-Nets; null: 16, or 8 or 4 where a view has fewer than 32 such blocks",
        Range("null or a positive integer", lambda v: v is None or v >= 1),
    )

    roi_size: tuple[int, int, int] = _heads(
        (7, 7, 7), "bins along each axis of the shared region", Range("three positive integers", lambda v: min(v) >= 1)
    )
    head_width: int = _heads(2048, "width of the projector and of embeddings", POSITIVE_INTEGER)
    predictor_width: int = _heads(512, "width of the predictor's hidden layer", POSITIVE_INTEGER)

    reconstruction_weight: float = _loss(5.0, "weight of the reconstruction of hidden voxels", NOT_NEGATIVE)
    consistency_weight: float = _loss(1.0, "weight of the consistency of corresponding bins", NOT_NEGATIVE)
    consistency: Literal["cosine", "nt_xent", "gram"] = _loss("cosine", "which consistency: CVA, C-CVA or Gram matrices")
    contrastive_weight: float = _loss(0.1, "weight of the contrast of images (NT-Xent)", NOT_NEGATIVE)
    temperature: float = _loss(0.5, "of NT-Xent", POSITIVE)
    teacher_momentum: float = _loss(
        0.995, "share of the teacher that stays in a step", Range("0 <= teacher_momentum <= 1", lambda v: 0 <= v <= 1)
    )

    optimizer: Literal["sgd", "adamw"] = _optimisation("sgd", "SGD with Nesterov momentum, or AdamW")
    learning_rate: float = _optimisation(1e-2, "its highest value; polynomial decay to 0", POSITIVE)
    weight_decay: float = _optimisation(3e-5, "pull of the weights towards 0", NOT_NEGATIVE)
    momentum: float = _optimisation(0.99, "of SGD", _BELOW_ONE)
    betas: tuple[float, float] = _optimisation((0.9, 0.98), "of AdamW", _BETAS)
    gradient_clip: float = _optimisation(12.0, "largest norm of a step's gradient", POSITIVE)
    warmup_epochs: int | None = _optimisation(
        0, "epochs of linearly rising learning rate; null: a tenth of epochs", _COUNT_OR_NULL
    )
    epochs: int = _optimisation(250, "length of the training", POSITIVE_INTEGER, may_change=True)
    iterations_per_epoch: int = _optimisation(250, "steps of an epoch", POSITIVE_INTEGER)

    init_from: str | None = _machine(
        None,
        "a checkpoint of this package, nnU-Net, nnssl or OpenMind to start from; adapted where it must be",
        Range("null or the path of a checkpoint", lambda v: v is None or v.strip() != ""),
    )
    seed: int = _run(0, "everything random follows from it", COUNT)
    precision: Literal["auto", "bf16", "fp16", "fp32"] = _machine("auto", "auto: bf16 or fp16 on CUDA, else fp32")
    tf32: bool = _machine(True, "float32 convolutions in TF32, as in torch; matrix products stay exact, which RoIAlign needs")
    channels_last: bool = _machine(False, "memory format of convolutions")
    fused_optimizer: bool = _machine(True, "one kernel for all parameters, on CUDA")
    attention: Literal["auto", "flash", "cudnn", "efficient"] = _machine(
        "auto", "kernel of attention where it can, on CUDA in reduced precision; auto: the fastest, tried when a training starts"
    )
    gradient_checkpointing: bool | Literal["selective"] = _machine(
        False,
        "kept for the backward pass: false: everything; true: what enters a block; selective: also convolutions, matrix products "
        "and attention; the rest is computed again",
    )
    sampling: Literal["cases", "datasets", "sqrt"] = _run(
        "cases", "drawn alike: cases; datasets; datasets by the root of their size"
    )
    workers: int | None = _machine(
        None, "processes that load; null: from nnUNet_n_proc_DA, else from the cores this process may use", _COUNT_OR_NULL
    )
    prefetch: int = _machine(2, "steps that each worker prepares ahead", POSITIVE_INTEGER)
    checkpoint_minutes: float = _machine(15.0, "time between checkpoints, as far as epochs end", POSITIVE)
    stop_after_minutes: float | None = _machine(
        None,
        "save and end with code 75 when this time is over, as on SIGTERM; null: no limit",
        Range("null or a positive number", lambda v: v is None or v > 0),
    )
    set_aside: bool = _machine(False, "a run that lies where a new one would be written is moved aside, instead of refusing")
    other_cases: bool = _machine(False, "continue although the training cases are not those that the run began with")
    watched_cases: int = _run(8, 'cases kept back when fold is "all", whose pairs show how training goes', POSITIVE_INTEGER)
    check_seconds: float = _machine(
        60.0, "how long voxels are checked for NaN/Inf before training; the rest when they are read", NOT_NEGATIVE
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reconstruction_weight + self.consistency_weight + self.contrastive_weight == 0:
            raise ValueError("reconstruction_weight, consistency_weight and contrastive_weight are all 0: nothing to train.")

    def block_edge(self, view: Sequence[int]) -> int:
        """``mask_block``, or as a view of this size asks for."""
        if self.mask_block is not None:
            return self.mask_block
        edges = (e for e in MASK_BLOCKS if math.prod(-(-n // e) for n in view) >= LEAST_BLOCKS)
        return next(edges, MASK_BLOCKS[-1])

    def for_view(self, view: Sequence[int]) -> CVAConfig:
        """With ``mask_block`` set."""
        return replace(self, mask_block=self.block_edge(view))

    @property
    def needs_second_view(self) -> bool:
        """Whether a loss compares the two views (else one view per case would do)."""
        return self.consistency_weight > 0 or self.contrastive_weight > 0

    @property
    def needs_heads(self) -> bool:
        """Whether projector and predictor exist."""
        return self.needs_second_view

    @property
    def needs_teacher(self) -> bool:
        """Whether there is a teacher; an objective that compares the student with itself needs none."""
        return self.needs_heads

    @property
    def warmup(self) -> int:
        """Epochs of warm-up."""
        return self.epochs // 10 if self.warmup_epochs is None else self.warmup_epochs


DEFAULT = CVAConfig(**UNET)  # of nnUNetTrainerCVA


@dataclass(frozen=True)
class FinetuneConfig(Settings):
    """What a fine-tuning has that nnU-Net's trainers have not. Clipping is in their training step: 12 for U-Nets, 1 for Primus.

    The block is not called "cva", which plans copied from the pretraining may hold.
    """

    BLOCK: ClassVar[str] = "cva_finetune"
    VARIABLE: ClassVar[str] = "nnUNet_cva_finetune"

    epochs: int = setting(1000, "length of the training", POSITIVE_INTEGER)
    warmup_epochs: int | None = setting(
        None, f"epochs of linearly rising learning rate; null: a tenth of epochs, at most {MAX_WARMUP_EPOCHS}", _COUNT_OR_NULL
    )
    iterations_per_epoch: int = setting(250, "steps of an epoch", POSITIVE_INTEGER)
    optimizer: Literal["sgd", "adamw"] = setting("sgd", "SGD with Nesterov momentum, or AdamW")
    learning_rate: float = setting(1e-3, "its highest value; polynomial decay to 0", POSITIVE)
    weight_decay: float = setting(3e-5, "pull of the weights towards 0", NOT_NEGATIVE)
    momentum: float = setting(0.99, "of SGD", _BELOW_ONE)
    betas: tuple[float, float] = setting((0.9, 0.98), "of AdamW", _BETAS)
    fused_optimizer: ClassVar[bool] = True

    @property
    def warmup(self) -> int:
        """Epochs of warm-up."""
        return min(MAX_WARMUP_EPOCHS, self.epochs // 10) if self.warmup_epochs is None else self.warmup_epochs


def explanations(beginning: str = "", markdown: bool = False) -> list[str]:
    """Every setting whose name begins so: a line with name, default and range, and one with what it means. ``markdown``: the
    whole ``docs/settings.md`` instead.

    Raises:
        ValueError: there is none.
    """
    if markdown:
        return document()
    lines = []
    for config in (DEFAULT, FinetuneConfig()):
        found = [s for s in explained(config) if s.name.startswith(beginning)]
        if found:
            lines += [f'"{config.BLOCK}" of a configuration in the plans, or {config.VARIABLE}:']
        for s in found:
            lines += [
                f"  {s.name} = {s.default}  ({s.expected})",
                f"      {s.meaning}{'' if s.fixed else ' [may change when a run is continued]'}",
            ]
    if not lines:
        known = dict.fromkeys(s.name for config in (DEFAULT, FinetuneConfig()) for s in explained(config))
        raise ValueError(f"No setting begins with {beginning!r}. There are: {', '.join(known)}.")
    return lines


def document() -> list[str]:
    """``docs/settings.md``, line by line."""
    lines = [
        "# Settings",
        "",
        "Written by `nnUNetv2_cva settings` as Markdown: change `nnunetv2_cva/config.py` instead. Defaults are those of",
        "`nnUNetTrainerCVA`, MAE+CVA+Cont on U-Nets. Later wins: the recipe, the block of the plans' configuration",
        "(setting by setting along `inherits_from`), the environment variable (JSON). View size and cases per step are the",
        "configuration's `patch_size` and `batch_size`. A run that is continued may change what is marked *.",
    ]
    for config, title in ((DEFAULT, "Pretraining"), (FinetuneConfig(), "Fine-tuning")):
        lines += ["", f"## {title}: block `{config.BLOCK}`, environment variable `{config.VARIABLE}`"]
        group = None
        for s in explained(config):
            if s.group != group:
                group = s.group
                lines += [
                    "",
                    *([f"### {group}", ""] if group else []),
                    "| setting | default | expected | meaning |",
                    "|---|---|---|---|",
                ]
            lines.append(f"| `{s.name}`{'' if s.fixed else ' *'} | `{s.default}` | {s.expected} | {s.meaning} |")
    return lines
