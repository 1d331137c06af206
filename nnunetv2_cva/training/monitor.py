"""What a user watches: metrics of the representation, the history of a run, its plot."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize


def pair_metrics(first: Tensor, second: Tensor) -> dict[str, float]:
    """How well corresponding bins of two views agree. ``first``, ``second``: (B, R, D).

    ``alignment``: mean cosine of corresponding bins. ``retrieval``: how often the most similar bin of the other view of the same
    case is the corresponding one (top-1, chance 1/R).
    """
    similarity = normalize(first.float(), dim=-1) @ normalize(second.float(), dim=-1).transpose(1, 2)
    diagonal = similarity.diagonal(dim1=1, dim2=2)
    hits = similarity.argmax(-1) == torch.arange(similarity.shape[1], device=similarity.device)
    return {"alignment": diagonal.mean().item(), "retrieval": hits.float().mean().item()}


def standardised(features: Tensor) -> Tensor:
    """(B, R, D) features with mean 0 and variance 1 per channel over all bins: raw features share a large mean, so that all
    cosines are near 1."""
    rows = features.float().flatten(0, 1)
    std, mean = torch.std_mean(rows, dim=0)
    return (features.float() - mean) / std.clamp_min(1e-6)


def collapse_metrics(features: Tensor) -> dict[str, float]:
    """Whether features still differ from each other. ``features``: (M, D).

    ``spread``: standard deviation of the L2-normalised features, times sqrt(D): 0 when all are the same, up to 1.
    ``effective_rank``: exp of the entropy of the normalised singular values of the centred features (Roy and Vetterli, 2007);
    1 when all lie on a line, at most min(M, D).
    """
    rows = features.float()
    spread = normalize(rows, dim=-1).std(0).mean() * rows.shape[1] ** 0.5
    singular = _singular_values(rows - rows.mean(0))
    p = singular / singular.sum().clamp_min(torch.finfo(torch.float32).tiny)
    rank = torch.exp(-(p * p.clamp_min(1e-12).log()).sum())
    return {"spread": spread.item(), "effective_rank": rank.item()}


def _singular_values(rows: Tensor) -> Tensor:
    """By the eigenvalues of the smaller Gram matrix in float64, on the device: a tenth of the time of a decomposition."""
    exact = rows.cpu().double() if rows.device.type == "mps" else rows.double()
    gram = exact.T @ exact if len(exact) > exact.shape[1] else exact @ exact.T
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()


class History:
    """The metrics of every epoch: a list of plain dicts, in ``metrics.jsonl`` and in checkpoints."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.epochs: list[dict[str, Any]] = []

    def restore(self, epochs: list[dict[str, Any]]) -> None:
        """Go on after these epochs (none: a new run). Epochs that a killed run logged and did not save leave the file."""
        self.epochs = list(epochs)
        self.write()

    def write(self) -> None:
        """Write ``metrics.jsonl``: one line per epoch."""
        partial = self.folder / "metrics.partial.jsonl"
        partial.write_text("".join(json.dumps(epoch) + "\n" for epoch in self.epochs))
        os.replace(partial, self.folder / "metrics.jsonl")

    def plot(self) -> None:
        """Write ``progress.png``: losses, agreement of the views, collapse, speed, learning rate over the epochs."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        panels = {
            "losses": [k for k in self.epochs[-1] if k.endswith("_loss")],
            "agreement of the two views (probe pairs)": ["alignment", "retrieval", "feature_alignment", "feature_retrieval"],
            "effective rank of the features": ["effective_rank"],
            "spread of the features; real overlap; share of time waiting for data": ["spread", "overlap", "data_wait"],
            "learning rate": ["learning_rate"],
        }
        figure = Figure(figsize=(9, 16), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (title, keys) in zip(figure.subplots(len(panels), 1), panels.items()):
            for key in keys:
                points = [(e["epoch"], e[key]) for e in self.epochs if key in e]
                if points:
                    axes.plot(*zip(*points), label=key, marker="." if len(points) < 30 else None)
            axes.set(title=title, xlabel="epoch")
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))  # beside the curves, not on them
        partial = self.folder / "progress.partial.png"
        figure.savefig(partial, dpi=110)
        os.replace(partial, self.folder / "progress.png")
