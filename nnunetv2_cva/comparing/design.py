"""What is compared with what: arms, labelled cases, seeds; and which part of it is whose."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnunetv2_cva.files import read_object, write_json
from nnunetv2_cva.seeding import stream

SCRATCH = "scratch"
STOCK_EPOCHS = 1000
EPOCHS = 50  # a short training has up to as many, so that nnU-Net's learning rate, one per epoch, comes down smoothly


@dataclass(frozen=True)
class CompareRequest:
    """What is asked for. ``weights``: files (none: training from scratch alone, for a later comparison); ``labels``: how many
    labelled cases are trained on, one training for each; ``seeds``: how many splits; ``fold``: the fold whose validation cases
    are the test cases, ``test`` of them (None: all); ``iterations``: of every training, None for as many as the trainer has;
    ``points``: of the learning curve; ``folder``: where results go."""

    dataset: str
    configuration: str
    weights: tuple[str, ...]
    plans: str = "nnUNetPlans"
    trainer: str = "nnUNetTrainer"
    labels: tuple[int, ...] = (1, 2, 4, 8)
    seeds: int = 5
    fold: int = 0
    test: int | None = None
    iterations: int | None = None
    points: int = 5
    folder: str | None = None
    device: str = "cuda"
    part: int = 0
    parts: int = 1
    processes: int = 1

    def check(self) -> None:
        """Raise ValueError for what cannot be meant."""
        if not self.labels or min(self.labels) < 1 or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"`labels`: expected different positive numbers, found {' '.join(map(str, self.labels))}.")
        for name in ("seeds", "points", "parts", "processes", "test"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}`: expected 1 or more, found {value}.")
        if not 0 <= self.part < self.parts:
            raise ValueError(f"`part`: expected 0 to {self.parts - 1} of {self.parts} parts, found {self.part}.")
        if self.iterations is not None:
            epochs_of(self.iterations)


@dataclass(frozen=True)
class Job:
    """One training: from the weights ``arm`` on ``labels`` cases, split and batches of ``seed``."""

    arm: str
    labels: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm}__{self.labels}_labels__seed_{self.seed}"

    def __str__(self) -> str:
        return f"{self.arm}, {self.labels} labelled case{'s' if self.labels > 1 else ''}, seed {self.seed}"


@dataclass(frozen=True)
class Design:
    """What every training of a comparison shares: with another value of these, results do not belong together."""

    dataset: str  # full name
    configuration: str
    plans: str
    trainer: str
    settings: str  # hash of the configuration in the plans
    iterations: int | None
    points: int
    fold: int
    training: tuple[str, ...]  # from which labelled cases are drawn
    test: tuple[str, ...]

    def cases(self, labels: int, seed: int) -> list[str]:
        """The labelled cases of a split. Those of fewer labels are among those of more: the step from 1 to 2 adds one."""
        order = stream("compared cases", seed).permutation(len(self.training))
        return [self.training[n] for n in order[:labels]]

    def keep(self, folder: Path) -> None:
        """Note the design in ``folder``, or check that the results there are of the same.

        Raises:
            ValueError: they are of another one; names what differs.
        """
        file, mine = folder / "design.json", json.loads(json.dumps(asdict(self)))
        if not file.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            return write_json(file, mine)
        there = read_object(file)
        changed = [k for k in mine if there.get(k) != mine[k]]
        if changed:
            listing = "; ".join(f"{k}: {_short(there.get(k))} there, {_short(mine[k])} now" for k in changed)
            raise ValueError(f"{folder} holds results of another comparison ({listing}). Choose another `folder`, or delete it.")


def _short(value: Any) -> str:
    return f"{len(value)} cases" if isinstance(value, list) else str(value)


def settings_hash(configuration: dict[str, Any]) -> str:
    """Of a configuration with all it inherits, as far as it is nnU-Net's."""
    nnunets = {k: v for k, v in configuration.items() if not k.startswith("cva")}
    return hashlib.sha256(json.dumps(nnunets, sort_keys=True).encode()).hexdigest()[:12]


def jobs(arms: Sequence[str], labels: Sequence[int], seeds: int, part: int = 0, parts: int = 1) -> list[Job]:
    """All trainings, or those of one of several parts: those that are paired stand beside each other, so that what is finished
    early can be compared early."""
    every = [Job(arm, n, seed) for seed in range(seeds) for n in labels for arm in arms]
    return every[part::parts]


def epochs_of(iterations: int) -> int:
    """Into how many epochs a training of ``iterations`` is cut.

    Raises:
        ValueError: not a multiple of 10.
    """
    if iterations < 10 or iterations % 10:
        raise ValueError(f"`iterations`: expected a multiple of 10, found {iterations}.")
    if iterations == STOCK_EPOCHS * 250:
        return STOCK_EPOCHS
    return max(n for n in range(1, EPOCHS + 1) if iterations % n == 0)


def curve_epochs(epochs: int, points: int) -> list[int]:
    """After which epochs (counted from 1) the test cases are segmented: evenly, the last always."""
    return sorted({max(1, round(epochs * k / points)) for k in range(1, points + 1)})
