"""A network whose weights no longer change, as a source of features: of any file that ``info`` reads, or untrained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunetv2_cva.model.taps import Tap
from nnunetv2_cva.transfer.card import NO_RESAMPLING, entry
from nnunetv2_cva.transfer.network import Loaded, load_network, untrained_network

Encode = Callable[[Tensor], list[Tensor]]
# nnU-Net's ways to normalise an image by its own voxels alone; others use what the plans say of all images.
BY_ITSELF = {"ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization", "RGBTo01Normalization"}
INTENSITIES, OF_ALL = "foreground_intensity_properties_per_channel", ("mean", "std", "percentile_00_5", "percentile_99_5")
# Of a configuration, where plans of nnssl say less than nnU-Net's: nnU-Net's own values.
RESAMPLING = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
USUAL = {
    "preprocessor_name": "DefaultPreprocessor",
    "resampling_fn_data": "resample_data_or_seg_to_shape",
    "resampling_fn_data_kwargs": RESAMPLING,
    "resampling_fn_seg": "resample_data_or_seg_to_shape",
    "resampling_fn_seg_kwargs": {**RESAMPLING, "is_seg": True, "order": 1},
    "architecture": {},  # preprocessing asks for none, but without the word nnU-Net takes plans for its old ones and fails
}
# Images that stay at their own spacing: the one that is stated is used for nothing.
LEFT: dict[str, Any] = {
    "spacing": [1.0, 1.0, 1.0],
    "resampling_fn_data": NO_RESAMPLING,
    "resampling_fn_data_kwargs": {},
    "resampling_fn_seg": NO_RESAMPLING,
    "resampling_fn_seg_kwargs": {},
}


@dataclass(frozen=True)
class Frozen:
    """An encoder and what it expects. ``encode``: views (N, C, *view) on ``device`` -> a map (N, C, cells) of every tap.

    ``plans`` and ``configuration`` say how images are preprocessed for it, at ``spacing`` (mm along i, j, k; None where they keep
    their own); ``view`` is the extent that it was trained with.
    """

    label: str
    encode: Encode
    taps: tuple[Tap, ...]
    view: tuple[int, int, int]
    spacing: tuple[float, float, float] | None
    channels: int
    plans: dict[str, Any]
    configuration: str
    device: torch.device


def check_comparable(first: Frozen, other: Frozen, files: tuple[str, str], views: bool) -> None:
    """Images are preprocessed once, for ``first``: ``other`` must expect the same. ``views``: and windows of the same extent.

    Raises:
        ValueError: it does not; says what differs. ``files``: the names of both.
    """
    wanted, found = _expected(first, views), _expected(other, views)
    differing = [f"{k} {wanted[k]}, found {found[k]}" for k in wanted if wanted[k] != found[k]]
    if differing:
        raise ValueError(
            f"{files[1]} expects other images than {files[0]}, for which they are preprocessed: expected {'; '.join(differing)}. "
            "Features of images that a network was not trained for say nothing of it: look at each file by itself."
        )


def _expected(network: Frozen, views: bool) -> dict[str, Any]:
    settings = network.plans["configurations"][network.configuration]
    schemes = list(settings["normalization_schemes"])
    intensities = {
        str(c): {k: float(f"{v:.4g}") for k, v in network.plans[INTENSITIES].get(str(c), {}).items() if k in OF_ALL}
        for c, scheme in enumerate(schemes)
        if scheme not in BY_ITSELF
    }
    return {
        "spacing": network.spacing or "of the image",
        "channels": network.channels,
        "axes": list(network.plans["transpose_forward"]),
        "normalisation": schemes,
        "normalisation within the mask": [bool(m) for m in settings["use_mask_for_norm"]],
        "intensities": intensities,
        **({"views": network.view} if views else {}),
    }


def load_frozen(file: str | Path, branch: str = "student", trust: bool = False, device: str = "cpu", label: str = "") -> Frozen:
    """The network in a file. ``label``: how tables and pictures call it, the file's name by default.

    Raises:
        ValueError: as ``load_network``; or the file does not say how images are to be preprocessed for it.
    """
    return _frozen(load_network(file, branch, trust), str(file), device, label or Path(file).stem)


def untrained(like: str | Path, trust: bool = False, device: str = "cpu", label: str = "untrained") -> Frozen:
    """The network of a file as nnU-Net initialises it.

    Raises:
        ValueError: as ``load_frozen``.
    """
    return _frozen(untrained_network(like, trust), str(like), device, label)


def _frozen(loaded: Loaded, file: str, device: str, label: str) -> Frozen:
    loaded.network.requires_grad_(False).to(device)
    return frozen(loaded, file, label)


def frozen(loaded: Loaded, file: str = "The file of this network", label: str = "") -> Frozen:
    """A network that is loaded, where and as it is. ``file``: how errors call it.

    Raises:
        ValueError: its file does not say how images are to be preprocessed for it.
    """
    card, chosen = loaded.card, next(loaded.network.parameters()).device
    plans, name = entry(card, "plans"), card.get("configuration")
    settings = _usual(plans, name)
    spacing, view = (
        tuple(settings.get(key) or card.get(other) or ()) for key, other in (("spacing", "spacing"), ("patch_size", "view_size"))
    )
    schemes = settings.get("normalization_schemes")
    if not isinstance(name, str) or not schemes or len(spacing) != 3 or len(view) != 3:
        raise ValueError(
            f"{file} does not state how images are preprocessed for its network: expected plans with the spacing, the "
            f"normalisation and the patch_size of a 3D configuration, found spacing {list(spacing)}, normalisation {schemes}, "
            f"patch_size {list(view)}."
        )
    intensities = entry(plans, INTENSITIES)
    plans = {
        **{"transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2]},
        **plans,
        INTENSITIES: {str(c): intensities.get(str(c), {}) for c in range(len(schemes))},
        "configurations": {name: settings},
    }
    i, j, k = (int(n) for n in view)
    si, sj, sk = (float(s) for s in spacing)
    grid = None if settings.get("resampling_fn_data") == NO_RESAMPLING else (si, sj, sk)
    return Frozen(label, loaded.maps, loaded.taps, (i, j, k), grid, len(schemes), plans, name, chosen)


def _usual(plans: dict[str, Any], name: Any) -> dict[str, Any]:
    """The configuration with all that nnU-Net's preprocessing asks for."""
    from nnunetv2_cva.transfer.card import settings

    found = settings(plans, name)
    whole = {"use_mask_for_norm": [False] * len(found.get("normalization_schemes") or ())}
    masks = {
        "resampling_fn_seg": found.get("resampling_fn_mask"),
        "resampling_fn_seg_kwargs": found.get("resampling_fn_mask_kwargs"),
    }
    if found and found.get("spacing", ()) is None:  # nnssl's way to say it
        found = {**found, **LEFT}
    return {**USUAL, **whole, **{k: v for k, v in masks.items() if v}, **found} if found else {}
