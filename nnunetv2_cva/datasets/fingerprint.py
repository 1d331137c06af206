"""What nnU-Net wants to know about a dataset, from images alone: ``dataset.json``, fingerprint, splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunetv2_cva.datasets.findings import QUANTILES, Finding
from nnunetv2_cva.datasets.reading import ending_for
from nnunetv2_cva.views.index import Entry

IMAGES_ONLY = (
    "Images without segmentations, for pretraining with nnUNetTrainerCVA (nnunetv2_cva). Stock nnU-Net trainers cannot train "
    "here: fine-tune in the dataset that has the labels."
)
GRID = 4001
LISTED = 5  # odd cases that are named
CT_AIR = -900  # Hounsfield units; nothing else than CT is regularly this low


def channel_names(given: Sequence[str], told: Collection[str], channels: int) -> list[str]:
    """A name per channel, by which nnU-Net chooses the normalisation: ``CT`` for CT, z-score for most others.

    ``given``: by the user for the whole dataset, else empty; then ``told``, the cases' own (``;`` between channels), where all
    agree.

    Raises:
        ValueError: not one given name per channel.
    """
    if given:
        if len(given) != channels:
            raise ValueError(f"`modality={' '.join(given)}`: expected {channels} name(s), one per channel.")
        return list(given)
    names = next(iter(told)).split(";") if len(told) == 1 else []
    if len(names) == channels and all(names):
        return names
    return ["image"] if channels == 1 else [f"image{c}" for c in range(channels)]


def normalisation_warnings(schemes: Sequence[str], found: Sequence[Finding], asked: Sequence[str] = ()) -> list[str]:
    """What is odd about normalising these images, channel by channel, by ``schemes``; ``asked``: what the user wanted instead."""
    lines = []
    if asked and list(asked) != list(schemes):
        lines.append(
            f"WARNING: `modality` asks for {', '.join(asked)}, but these plans have {', '.join(schemes)}, as the target has. "
            "Plan from the images or a preset (not with `target` alone) to have it otherwise."
        )
    for channel, scheme in enumerate(schemes):
        ct = sum(f.intensities[channel]["min"] <= CT_AIR for f in found)
        of = f" in channel {channel}" if len(schemes) > 1 else ""
        if scheme == "CTNormalization" and ct < len(found):
            lines.append(
                f"WARNING: {len(found) - ct} of {len(found)} cases do not look like CT{of} (no air at -1000) and will be clipped "
                "and scaled as CT all the same, which spoils MR. Give what is no CT a dataset of its own, planned without "
                "`modality=CT` and without a target of CT."
            )
        elif scheme != "CTNormalization" and ct:
            lines.append(
                f"NOTE: {ct} of {len(found)} cases look like CT{of} (air at -1000) and will be normalised by {scheme}, as MR is. "
                "For CT's normalisation make them a dataset of their own with `modality=CT`."
            )
        if scheme == "CTNormalization":
            lines += [f"WARNING: {odd}" for odd in odd_cases(found, channel)[:LISTED]]
    return lines


def odd_cases(found: Sequence[Finding], channel: int) -> list[str]:
    """Cases whose intensities are others than those of the rest, which are normalised with them; with the numbers."""
    if len(found) < 4:
        return []
    typical = np.array([np.interp((0.05, 0.5, 0.95), QUANTILES, f.intensities[channel]["quantiles"]) for f in found])
    widths, usual = typical[:, 2] - typical[:, 0], np.median(typical, axis=0)
    width = max(float(np.median(widths)), 1e-6)
    return [
        f"{f.key}: half of its body lies above {row[1]:.4g} and 90 % within {row[0]:.4g} to {row[2]:.4g}; of most cases "
        f"{usual[1]:.4g}, {usual[0]:.4g} to {usual[2]:.4g}. Is it in the same unit?"
        for f, row, w in zip(found, typical, widths)
        if abs(row[1] - usual[1]) > 2 * width or not 0.2 <= w / width <= 5
    ]


def dataset_json(name: str, channels: Sequence[str], cases: Sequence[Finding] | Sequence[Entry]) -> dict[str, Any]:
    """nnU-Net's ``dataset.json`` of a dataset without labels."""
    endings = Counter(ending_for(c.files[0]) for c in cases if isinstance(c, Finding))
    return {
        "name": name,
        "description": IMAGES_ONLY,
        "channel_names": {str(c): channel for c, channel in enumerate(channels)},
        "labels": {"background": 0},
        "numTraining": len(cases),
        "file_ending": endings.most_common(1)[0][0] if endings else ".b2nd",
    }


def fingerprint(found: Sequence[Finding]) -> dict[str, Any]:
    """nnU-Net's dataset fingerprint; intensities of the body stand in for those of the labelled foreground."""
    relative = [np.prod(f.cropped) / np.prod(f.shape) for f in found]
    return {
        "spacings": [list(f.spacing) for f in found],
        "shapes_after_crop": [list(f.cropped) for f in found],
        "foreground_intensity_properties_per_channel": {
            str(c): pooled([f.intensities[c] for f in found]) for c in range(found[0].channels)
        },
        "median_relative_size_after_cropping": float(np.median(relative)),
    }


def fingerprint_of_preprocessed(entries: Sequence[Entry], spacing: Sequence[float], plans: dict[str, Any]) -> dict[str, Any]:
    """The same of cases that are preprocessed already: their intensities are those of the plans they were made with."""
    return {
        "spacings": [list(spacing)] * len(entries),
        "shapes_after_crop": [list(e.shape[1:]) for e in entries],
        "foreground_intensity_properties_per_channel": plans["foreground_intensity_properties_per_channel"],
        "median_relative_size_after_cropping": 1.0,
    }


def normalised_intensities(channels: int) -> dict[str, Any]:
    """In the place of intensities that are not known: those after normalisation."""
    normal = {"mean": 0.0, "median": 0.0, "std": 1.0, "min": -5.0, "max": 5.0, "percentile_99_5": 3.0, "percentile_00_5": -3.0}
    return {str(c): normal for c in range(channels)}


def pooled(cases: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Statistics of all cases together, each with equal weight, as nnU-Net samples them.

    Mean and standard deviation are those of intensities clipped to the percentiles that CT is clipped to: no single voxel
    moves them.
    """
    quantiles = np.array([c["quantiles"] for c in cases])
    low, median, high = pooled_quantiles(quantiles, (0.005, 0.5, 0.995))
    levels = (np.arange(GRID) + 0.5) / GRID
    clipped = np.clip([np.interp(levels, QUANTILES, case) for case in quantiles], low, high)
    return {
        "mean": float(clipped.mean()),
        "median": median,
        "std": float(clipped.std()),
        "min": float(quantiles[:, 0].min()),
        "max": float(quantiles[:, -1].max()),
        "percentile_99_5": high,
        "percentile_00_5": low,
    }


def pooled_quantiles(quantiles: np.ndarray, levels: Sequence[float]) -> list[float]:
    """Quantiles of the mixture of distributions that are known by their ``QUANTILES``; ``(cases, len(QUANTILES))``."""
    grid = np.unique(np.quantile(quantiles, np.linspace(0, 1, GRID)))
    below = np.zeros(len(grid))  # the share of the mixture below each value
    for case in quantiles:
        below += np.interp(grid, case, QUANTILES, left=0, right=1)
    return [float(x) for x in np.interp(levels, below / len(quantiles), grid)]


def splits(found: Sequence[tuple[str, str]], folds: int = 5) -> list[dict[str, list[str]]]:
    """nnU-Net's cross-validation over subjects: all cases of a subject are on one side. ``found``: (case, subject).

    No folds of a single subject: what is trained on would be validated on.
    """
    cases: dict[str, list[str]] = {}
    for key, subject in found:
        cases.setdefault(subject, []).append(key)
    if len(cases) < 2:
        return []
    by_subject = generate_crossval_split(sorted(cases), seed=12345, n_splits=min(folds, len(cases)))
    return [
        {side: sorted(key for subject in fold[side] for key in cases[str(subject)]) for side in ("train", "val")}
        for fold in by_subject
    ]
