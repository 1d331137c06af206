"""What frozen features of a light pretraining hold, on random windows: voxel probes, and labels carried from one to another.

The package's own probe and propagation (`nnUNetv2_cva probe`, `look`), with position, intensity and the untrained network beside
the pretrained one; every row and recipe sees the same windows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from light import CPU, Labelled, Recipe, network
from torch import Tensor

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.model.branches import make_backbone
from nnunetv2_cva.seeing.frozen import Frozen
from nnunetv2_cva.seeing.images import Image
from nnunetv2_cva.seeing.probing import probe_voxels
from nnunetv2_cva.seeing.propagation import means, one_shot

LABELLED, DRAWS, PAIRS = 4, 5, 40
SPACING = (1.0, 1.0, 1.0)


def frozen(recipe: Recipe, states: dict[str, Tensor] | None, seed: int, label: str) -> Frozen:
    """``states``: of the network; None: as it was before its pretraining."""
    built = network(recipe.widths, 1, seed)
    if states is not None:
        built.load_state_dict(states)
    backbone = make_backbone(built, CVAConfig()).eval().requires_grad_(False)

    def encode(views: Tensor) -> list[Tensor]:
        return list(backbone.encode(backbone.averaged(), views)[0])

    return Frozen(label, encode, backbone.taps, recipe.view, SPACING, 1, {}, "", CPU)


@torch.no_grad()
def probe(recipe: Recipe, states: dict[str, Tensor], seed: int, data: Labelled, keys: list[str]) -> dict[str, dict[str, float]]:
    """Row -> mean Dice: "linear" and "k-NN", fitted to 4 cases and scored on the others, mean of 5 draws; "carried"."""
    images = [Image(k, torch.from_numpy(data.images[k])[None], SPACING, {}, labels=data.labels[k]) for k in keys]
    networks = {"untrained": frozen(recipe, None, seed, "untrained"), "pretrained": frozen(recipe, states, seed, "pretrained")}
    labels = [*range(1, data.structures + 1)]
    draws = [probe_voxels(images, networks, labels, LABELLED, draw) for draw in range(DRAWS)]
    found = {row: {name: float(np.mean([d[row][name] for d in draws])) for name in draws[0][row]} for row in draws[0]}
    for row, (mean, _) in means(one_shot(images, networks, labels, PAIRS)).items():
        found[row]["carried"] = mean
    return {row: {name: round(value, 4) for name, value in each.items()} for row, each in found.items()}


def table(results: list[dict[str, Any]], recipes: list[str]) -> str:
    """Mean over the pretraining seeds; in brackets the difference to the untrained network, seed by seed."""
    runs = [r for r in results if r["kind"] == "probe"]
    columns = ("linear", "k-NN", "carried")
    lines = ["| features | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    first = {r["seed"]: r["rows"] for r in reversed(runs)}
    for row in ("position", "intensity", "untrained"):
        cells = [f"{np.mean([rows[row][c] for rows in first.values()]):.3f}" for c in columns]
        lines.append(f"| {row} |  | " + " | ".join(cells) + " |")
    for recipe in recipes:
        own = sorted((r["seed"], r["rows"]) for r in runs if r["recipe"] == recipe)
        if own:
            cells = []
            for c in columns:
                gains = " ".join(f"{rows['pretrained'][c] - rows['untrained'][c]:+.3f}" for _, rows in own)
                cells.append(f"{np.mean([rows['pretrained'][c] for _, rows in own]):.3f} ({gains})")
            lines.append(f"| {recipe} | {len(own)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
