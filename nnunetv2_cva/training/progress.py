"""How far the epoch under way has come: what its steps gave, in a form that a stopped run can go on with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nnunetv2_cva.distributed import several_ranks
from nnunetv2_cva.failures import TrainingFailed

SKIPPED = 0.1  # of an epoch's steps: with more of them something is wrong


@dataclass
class Progress:
    """``outputs``: what every step gave, by name, scalars. ``seconds``, ``waited``: spent before a stop, if there was one."""

    outputs: list[dict[str, Tensor]] = field(default_factory=list)
    seconds: float = 0.0
    waited: float = 0.0
    began: float = field(default_factory=monotonic)

    def state(self, waited: float) -> dict[str, Any]:
        """For a checkpoint; all ranks together. ``waited``: seconds for data since the beginning or the last stop."""
        names = sorted(self.outputs[0]) if self.outputs else []
        values = torch.stack([torch.stack([o[n].detach().float() for n in names]) for o in self.outputs]) if names else None
        if values is not None:
            values = mean_over_ranks(values)
        return {
            "names": names,
            "values": None if values is None else values.cpu(),
            "seconds": self.seconds + monotonic() - self.began,
            "waited": self.waited + waited,
        }

    @staticmethod
    def restored(state: dict[str, Any] | None) -> Progress:
        """What :meth:`state` has given; a new epoch for None."""
        if not state or state["values"] is None:
            return Progress()
        outputs = [dict(zip(state["names"], row.unbind(), strict=True)) for row in state["values"]]
        return Progress(outputs, state["seconds"], state["waited"])

    def means(self, device: torch.device) -> tuple[dict[str, float], list[int]]:
        """The mean of every value over steps and ranks, without the steps that were skipped, and which these are, counted from
        the beginning of the epoch. ``skipped`` is their number."""
        together = {n: torch.stack([o[n].to(device).float() for o in self.outputs]) for n in self.outputs[0]}
        together = {n: mean_over_ranks(values) for n, values in together.items()}
        good = together.pop("skipped", torch.zeros(len(self.outputs), device=device)) == 0
        left_out = (~good).nonzero().flatten().tolist()
        return {**{n: values[good].mean().item() for n, values in together.items()}, "skipped": len(left_out)}, left_out


def mean_over_ranks(values: Tensor) -> Tensor:
    """Every rank's values, averaged; not every backend can average."""
    if several_ranks():
        values = values.clone()
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def judge_skipped(left_out: list[int], steps: int, cases: Callable[[list[int]], list[str]]) -> str:
    """What to say about skipped steps; empty where there were none. ``cases``: names of the cases of steps of the epoch.

    Raises:
        TrainingFailed: too many.
    """
    if not left_out:
        return ""
    names = cases(left_out)
    listed = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    if len(left_out) > max(1, SKIPPED * steps):
        raise TrainingFailed(
            f"{len(left_out)} of {steps} steps were left out because loss or gradient was not finite; in them were {listed}. "
            "The last checkpoint is untouched. Where these are few cases look at their voxels; else continue with precision "
            "fp32, or start again with a lower learning_rate."
        )
    return f"WARNING: {len(left_out)} of {steps} steps left out, loss or gradient was not finite. In them were: {listed}."
