"""What the device of this process can do, and which part of a step is its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Share:
    """Which cases of a step are whose. ``per_rank``: how many every process has; those of this one are ``begin`` to before
    ``end``."""

    per_rank: tuple[int, ...]
    rank: int = 0

    @property
    def total(self) -> int:
        return sum(self.per_rank)

    @property
    def begin(self) -> int:
        return sum(self.per_rank[: self.rank])

    @property
    def end(self) -> int:
        return self.begin + self.per_rank[self.rank]


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, None for float32. "auto": bfloat16 where a CUDA device has it, else float16; float32 elsewhere.

    bfloat16 works on CPUs, too, and halves the time where they have instructions for it; nobody gets it there unasked.

    Raises:
        ValueError: a precision that this device does not have.
    """
    if precision == "fp32" or (precision == "auto" and device.type != "cuda"):
        return None
    if device.type not in ("cuda", "cpu") or (device.type == "cpu" and precision == "fp16"):
        other = "'bf16', 'auto' or 'fp32'" if device.type == "cpu" else "'auto' or 'fp32'"
        raise ValueError(f"precision: {precision!r} needs a CUDA device, found {device.type!r}. Use {other}.")
    if precision == "auto":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if precision == "bf16" else torch.float16


def local_device(device: torch.device) -> torch.device:
    """This process's own among the devices of its machine, of several processes that train together.

    The launcher says which (LOCAL_RANK); without it all processes are on one machine, as nnU-Net's ``-num_gpus`` starts them.
    A process that is shown a single GPU, as some launchers do it, has that one.

    Raises:
        ValueError: more processes than GPUs.
    """
    if device.type != "cuda":
        return device
    given, there = os.environ.get("LOCAL_RANK"), torch.cuda.device_count()
    index = 0 if there == 1 else dist.get_rank() if given is None else int(given)
    if index >= there:
        raise ValueError(f"Process {index} of this machine has no GPU: torch finds {there}. Start one process for each GPU.")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@contextmanager
def one_after_the_other() -> Iterator[None]:
    """The first process alone, then all others."""
    together = dist.is_available() and dist.is_initialized()
    if together and dist.get_rank() != 0:
        dist.barrier()
    yield
    if together and dist.get_rank() == 0:
        dist.barrier()


def share_of_rank(cases: int) -> Share:
    """This process's part of the ``cases`` of a step over all GPUs.

    Raises:
        ValueError: fewer cases than processes.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return Share((cases,))
    world, rank = dist.get_world_size(), dist.get_rank()
    if cases < world:
        raise ValueError(f"batch_size {cases} of the plans is smaller than the number of GPUs, {world}. Use fewer GPUs.")
    base, extra = divmod(cases, world)
    return Share(tuple(base + (r < extra) for r in range(world)), rank)
