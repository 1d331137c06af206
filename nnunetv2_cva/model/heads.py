"""Projector and predictor: the MLPs behind the backbone, and the normalisation in them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nnunetv2_cva.distributed import several_ranks, sum_over_ranks


class BatchNormalise(nn.Module):
    """(M, D) rows of any floating type to float32 columns of mean 0 and variance 1; over the rows of all ranks.

    Without affine parameters and without running statistics: training, evaluation, student and teacher all use the rows
    they are given. (``nn.SyncBatchNorm`` refuses CPU tensors and falls back to other statistics in evaluation.) Ranks
    may hold different numbers of rows. The gradient flows through the statistics of all ranks: when every rank's loss
    is its share of the whole and gradients are averaged as DDP does, the result is that of one process with all rows.

    Raises (when called):
        ValueError: not (M, D), or fewer than 2 rows over all ranks.
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, rows: Tensor) -> Tensor:
        if rows.ndim != 2:
            raise ValueError(f"BatchNormalise: expected rows (M, D), found {tuple(rows.shape)}.")
        with torch.autocast(rows.device.type, enabled=False):
            x = rows if rows.dtype == torch.float64 else rows.float()
            total, count = _sum_and_count(x)
            # A rank with two rows knows that there are enough; only one with fewer has to look, and
            # wait for the device.
            if x.shape[0] < 2 and int(count) < 2:
                raise ValueError(
                    f"BatchNormalise: expected at least 2 rows over all ranks, found {int(count)}. One row has no "
                    "variance: use a batch_size of at least 2 cases."
                )
            # Two passes: mean of squares minus square of the mean would cancel where the mean is large.
            centred = x - total / count
            variance = sum_over_ranks(centred.square().sum(dim=0)) / count
            return centred * (variance + self.eps).rsqrt()

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class Projector(nn.Module):
    """(M, channels) features to (M, width) float32 embeddings: three linear layers, BN after each, SiLU between."""

    def __init__(self, channels: int, width: int = 2048) -> None:
        super().__init__()
        # No bias in front of BN: subtracting the mean removes it, so its gradient would be rounding noise.
        self.layers = nn.Sequential(
            nn.Linear(channels, width, bias=False), BatchNormalise(), nn.SiLU(),
            nn.Linear(width, width, bias=False), BatchNormalise(), nn.SiLU(),
            nn.Linear(width, width, bias=False), BatchNormalise(),
        )  # fmt: skip
        self.apply(_initialise)

    def forward(self, rows: Tensor) -> Tensor:
        return self.layers(rows)


class Predictor(nn.Module):
    """(M, width) embeddings of the student to (M, width) guesses of the teacher's: linear, BN, SiLU, linear."""

    def __init__(self, width: int = 2048, hidden: int = 512) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden, bias=False), BatchNormalise(), nn.SiLU(),  # no bias: see Projector
            nn.Linear(hidden, width),
        )  # fmt: skip
        self.apply(_initialise)

    def forward(self, rows: Tensor) -> Tensor:
        return self.layers(rows)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _sum_and_count(rows: Tensor) -> tuple[Tensor, Tensor | int]:
    """Sum (D,) of the rows of all ranks, and how many there are: a number, or a tensor when it had to be asked for."""
    if not several_ranks():
        return rows.sum(dim=0), rows.shape[0]
    both = sum_over_ranks(torch.cat((rows.sum(dim=0), rows.new_full((1,), rows.shape[0]))))
    return both[:-1], both[-1].detach()
