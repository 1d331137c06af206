"""The numbers of the method: one frozen dataclass, and where its values come from.

View size, cases per step, spacing and normalisation belong to nnU-Net's plans. Everything else is a field of
:class:`CVAConfig`. Values are taken from, later wins:

1. the recipe (``config = CVAConfig(...)`` of the trainer class),
2. ``configurations[name]["cva"]`` of the plans file, merged key by key along ``inherits_from``,
3. the environment variable ``nnUNet_cva`` (JSON), for throw-away runs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

ENVIRONMENT_VARIABLE = "nnUNet_cva"
SUFFIX = "_cva"  # of the name of a configuration for pretraining, which inherits from the one that is fine-tuned

# What a resumed run may change without becoming another run.
MAY_CHANGE_ON_RESUME = frozenset(
    ("epochs", "init_from", "workers", "prefetch", "precision", "tf32", "channels_last", "fused_optimizer", "attention")
    + ("gradient_checkpointing", "checkpoint_minutes", "check_seconds")
)

# The paper's optimisation of Primus-M (its U-Nets have the defaults of CVAConfig), and half of the memory for some of the time.
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


@dataclass(frozen=True)
class CVAConfig:
    """Everything of the method that is not in nnU-Net's plans. Defaults: the paper's MAE+CVA+Cont on U-Nets.

    Lengths are in voxels of the preprocessed case, probabilities in [0, 1]; ``*_p`` is how often a transform is applied.
    ``(low, high)`` pairs are ranges of a uniform draw.
    """

    # Two views of a case
    overlap: tuple[float, float] = (0.4, 0.8)  # volume fraction of a view that the other one also contains
    spatial: Literal["shared", "independent"] = "shared"  # mirroring and scale: the same for both views (paper) or not
    padding: float = 0.25  # how far a view may reach out of the case, in fractions of its extent
    mirror_p: float = 0.5  # per axis
    rotation_p: float = 0.2
    rotation_degrees: float = 30.0  # about each axis, both directions
    scale_p: float = 0.2
    scale_range: tuple[float, float] = (0.7, 1.4)  # extent read from the case / extent of the view
    max_air: float = 0.8  # a pair whose shared region holds more air than this is drawn again; 1: never

    # Intensities: low resolution is drawn per case, the rest per view
    low_resolution_p: float = 0.1
    low_resolution_zoom: tuple[float, float] = (0.5, 1.0)
    noise_p: float = 0.1
    noise_sigma: tuple[float, float] = (0.0, 0.1)  # batchgeneratorsv2 calls it variance and uses it as sigma
    blur_p: float = 0.2
    blur_channel_p: float = 0.5
    blur_sigma: tuple[float, float] = (0.5, 1.0)
    brightness_p: float = 0.15
    brightness_range: tuple[float, float] = (0.75, 1.25)
    contrast_p: float = 0.15
    contrast_range: tuple[float, float] = (0.75, 1.25)
    inverted_gamma_p: float = 0.1
    gamma_p: float = 0.3
    gamma_range: tuple[float, float] = (0.7, 1.5)

    # Masking
    mask_ratio: float = 0.75
    mask_block: int = 16  # U-Nets; Primus hides its own tokens

    # Alignment and heads
    roi_size: tuple[int, int, int] = (7, 7, 7)
    head_width: int = 2048
    predictor_width: int = 512

    # Losses; a weight of 0 removes the loss and everything only it needs
    reconstruction_weight: float = 5.0
    consistency_weight: float = 1.0
    consistency: Literal["cosine", "nt_xent", "gram"] = "cosine"
    contrastive_weight: float = 0.1
    temperature: float = 0.5
    teacher_momentum: float = 0.995

    # Optimisation
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 1e-2
    weight_decay: float = 3e-5
    momentum: float = 0.99  # sgd, Nesterov
    betas: tuple[float, float] = (0.9, 0.98)  # adamw
    gradient_clip: float = 12.0
    warmup_epochs: int = 0
    epochs: int = 250
    iterations_per_epoch: int = 250

    # The run
    init_from: str | None = None  # a checkpoint of ours, nnU-Net, nnssl or OpenMind to start from; adapted where it must be
    seed: int = 0
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    tf32: bool = True  # float32 convolutions, as in torch; matrix products stay exact, which RoIAlign needs
    channels_last: bool = False  # memory format of convolutions
    fused_optimizer: bool = True  # one kernel for all parameters, on CUDA
    attention: Literal["auto", "flash", "cudnn", "efficient"] = "auto"  # kernel, on CUDA; auto: the fastest, tried at the start
    # Kept for the backward pass: false: everything; true: what enters a block; "selective": also convolutions, matrix
    # products and attention. The rest is computed again.
    gradient_checkpointing: bool | Literal["selective"] = False
    sampling: Literal["cases", "datasets", "sqrt"] = "cases"  # drawn alike: cases; datasets; datasets by the root of their size
    workers: int | None = None  # None: from nnUNet_n_proc_DA, else from the cores this process may use
    prefetch: int = 2  # steps that each worker prepares ahead
    checkpoint_minutes: float = 15.0
    probe_cases: int = 8  # cases kept back as fixed probe pairs when fold is "all"
    check_seconds: float = 60.0  # how long voxels are checked for NaN/Inf before training; the rest when they are read

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), typing.get_type_hints(type(self))[field.name])
        _check_ranges(self)

    @property
    def needs_second_view(self) -> bool:
        """Whether a loss compares the two views (else one view per case would do)."""
        return self.consistency_weight > 0 or self.contrastive_weight > 0

    @property
    def needs_heads(self) -> bool:
        """Whether projector, predictor and teacher exist."""
        return self.needs_second_view

    def as_dict(self) -> dict[str, Any]:
        """Plain types only (lists instead of tuples), as stored in checkpoints and ``cva_config.json``."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def updated(self, values: Mapping[str, Any], origin: str) -> CVAConfig:
        """A copy with ``values`` set; lists become tuples.

        Raises:
            ValueError: unknown key, wrong type or value out of range; names the key and ``origin``.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"{origin}: expected an object of settings, found {type(values).__name__} {values!r}.")
        known = {f.name for f in dataclasses.fields(self)}
        for key in values:
            if key not in known:
                raise ValueError(f"{origin}: unknown setting {key!r}. Valid settings: {', '.join(sorted(known))}.")
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        try:
            return dataclasses.replace(self, **plain)
        except ValueError as e:
            raise ValueError(f"{origin}: {e}") from None


def resolve(recipe: CVAConfig, plans: Mapping[str, Any], configuration: str, environment: Mapping[str, str]) -> CVAConfig:
    """The configuration of a run: recipe < plans < environment (see the module's docstring).

    Raises:
        ValueError: a bad value anywhere; the message names the key and where it came from.
    """
    config = recipe
    for name in _inheritance(plans, configuration):
        block = plans["configurations"][name].get("cva")
        if block is not None:
            config = config.updated(block, f'plans file, configurations["{name}"]["cva"]')
    text = environment.get(ENVIRONMENT_VARIABLE, "").strip()
    if text:
        try:
            values = json.loads(text)
        except json.JSONDecodeError as e:
            raise ValueError(
                f"environment variable {ENVIRONMENT_VARIABLE}: expected JSON such as '{{\"epochs\": 10}}', found {text!r} ({e})."
            ) from None
        config = config.updated(values, f"environment variable {ENVIRONMENT_VARIABLE}")
    return config


def check_resumable(saved: Mapping[str, Any], now: CVAConfig) -> CVAConfig:
    """The checkpoint's configuration with the settings that may change taken from ``now``.

    Raises:
        ValueError: another setting differs; names every such key with both values.
    """
    before, after = dict(saved), now.as_dict()
    changed = [k for k in after if k not in MAY_CHANGE_ON_RESUME and before.get(k, after[k]) != after[k]]
    if changed:
        listing = "; ".join(f"{k}: {before[k]!r} in the checkpoint, {after[k]!r} now" for k in changed)
        raise ValueError(
            f"Cannot resume with other settings than the checkpoint's ({listing}). Restore them in the plans file or in "
            f"{ENVIRONMENT_VARIABLE}, or start a new training without --c."
        )
    kept = {k: v for k, v in before.items() if k in after and k not in MAY_CHANGE_ON_RESUME}
    return now.updated(kept, "checkpoint")


def _inheritance(plans: Mapping[str, Any], configuration: str) -> list[str]:
    """Configuration names from the root of ``inherits_from`` to ``configuration`` (nnU-Net has checked for cycles)."""
    chain = [configuration]
    while "inherits_from" in plans["configurations"][chain[0]]:
        chain.insert(0, plans["configurations"][chain[0]]["inherits_from"])
    return chain


def _check_type(name: str, value: Any, expected: Any) -> None:
    if not _has_type(value, expected):
        raise ValueError(f"{name}: expected {_type_name(expected)}, found {value!r}.")


def _has_type(value: Any, expected: Any) -> bool:
    origin = typing.get_origin(expected)
    if origin is Literal:
        return value in typing.get_args(expected)
    if origin is tuple:
        args = typing.get_args(expected)
        return isinstance(value, tuple) and len(value) == len(args) and all(map(_has_type, value, args))
    if origin in (typing.Union, types.UnionType):
        return any(_has_type(value, a) for a in typing.get_args(expected))
    if expected is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, expected)


def _type_name(expected: Any) -> str:
    origin = typing.get_origin(expected)
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in typing.get_args(expected))
    if origin is tuple:
        return "[" + ", ".join(_type_name(a) for a in typing.get_args(expected)) + "]"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(a) for a in typing.get_args(expected))
    return "null" if expected is type(None) else {"bool": "true or false"}.get(expected.__name__, expected.__name__)


def _check_ranges(c: CVAConfig) -> None:
    """Raise ValueError for the first value out of range."""

    def need(name: str, condition: bool, expected: str) -> None:
        if not condition:
            raise ValueError(f"{name}: expected {expected}, found {getattr(c, name)!r}.")

    for name in (f.name for f in dataclasses.fields(c) if f.name.endswith("_p")):
        need(name, 0 <= getattr(c, name) <= 1, "a probability in [0, 1]")
    for name in ("scale_range", "brightness_range", "contrast_range", "gamma_range", "blur_sigma"):
        low, high = getattr(c, name)
        need(name, 0 < low <= high, "0 < low <= high")
    need("noise_sigma", 0 <= c.noise_sigma[0] <= c.noise_sigma[1], "0 <= low <= high")
    need("low_resolution_zoom", 0 < c.low_resolution_zoom[0] <= c.low_resolution_zoom[1] <= 1, "0 < low <= high <= 1")
    need("overlap", 0 < c.overlap[0] <= c.overlap[1] <= 1, "0 < low <= high <= 1")
    need("padding", 0 <= c.padding < 0.5, "0 <= padding < 0.5")
    need("rotation_degrees", 0 <= c.rotation_degrees <= 45, "0 to 45 degrees")
    need("max_air", 0 < c.max_air <= 1, "0 < max_air <= 1")
    need("mask_ratio", 0 <= c.mask_ratio < 1, "0 <= mask_ratio < 1")
    need("roi_size", all(r >= 1 for r in c.roi_size), "three positive integers")
    need("betas", all(0 <= b < 1 for b in c.betas), "two numbers in [0, 1)")
    for name in ("mask_block", "head_width", "predictor_width", "epochs", "iterations_per_epoch", "prefetch", "probe_cases"):
        need(name, getattr(c, name) >= 1, "a positive integer")
    for name in ("temperature", "learning_rate", "gradient_clip", "checkpoint_minutes"):
        need(name, getattr(c, name) > 0, "a positive number")
    for name in ("reconstruction_weight", "consistency_weight", "contrastive_weight", "weight_decay", "check_seconds"):
        need(name, getattr(c, name) >= 0, "a number >= 0")
    for name in ("warmup_epochs", "seed"):
        need(name, getattr(c, name) >= 0, "an integer >= 0")
    need("teacher_momentum", 0 <= c.teacher_momentum <= 1, "0 <= teacher_momentum <= 1")
    need("momentum", 0 <= c.momentum < 1, "0 <= momentum < 1")
    need("init_from", c.init_from is None or c.init_from.strip() != "", "null or the path of a checkpoint")
    need("workers", c.workers is None or c.workers >= 0, "null or an integer >= 0")
    if c.reconstruction_weight + c.consistency_weight + c.contrastive_weight == 0:
        raise ValueError("reconstruction_weight, consistency_weight and contrastive_weight are all 0: nothing to train.")
