"""What several ranks compute together, with gradients as if one process had everything."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def several_ranks() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of every rank's ``x``; its gradient is summed over ranks, too."""
    return _Sum.apply(x) if several_ranks() else x


def this_rank() -> int:
    """Its number; 0 for a process that trains alone."""
    return dist.get_rank() if several_ranks() else 0


def gather(mine: Tensor, counts: tuple[int, ...]) -> Tensor:
    """(2, M, D) of every rank as (2, T, D) of all, in rank order; ranks hold ``counts`` items. The gradients of all ranks
    sum up in the vector's own."""
    return _Gather.apply(mine, counts, this_rank()) if len(counts) > 1 else mine


def items_per_rank(mine: int, device: torch.device) -> tuple[int, ...]:
    """How many items every rank holds when this one holds ``mine``. Asking waits for the device."""
    if not several_ranks():
        return (mine,)
    number = torch.tensor([mine], device=device)
    counts = [torch.empty_like(number) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, number)
    return tuple(torch.cat(counts).tolist())


def _all_reduce(x: Tensor) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


class _Sum(torch.autograd.Function):
    """torch's own is deprecated and refuses torch.compile."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _all_reduce(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _all_reduce(gradient)


class _Gather(torch.autograd.Function):
    """A sum of zero-padded tensors, since gathering different lengths is not offered by every backend."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, counts: tuple[int, ...], rank: int) -> Tensor:
        ctx.place = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        everything = mine.new_zeros(2, sum(counts), mine.shape[2])
        everything[:, ctx.place] = mine
        dist.all_reduce(everything)
        return everything

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _all_reduce(gradient)[:, ctx.place], None, None
