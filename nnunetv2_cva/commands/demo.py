"""``nnUNetv2_cva demo``: pretraining and what follows, from images to Dice, on synthetic data in minutes on a CPU."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

HELP = "Pretrain, fine-tune, compare and look on a small synthetic dataset: up to six minutes on two CPU cores, no download."

QUIET_SECONDS = 30.0  # between progress lines where there is no terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``nnUNetv2_cva demo``."""
    parser.add_argument("--folder", default="nnunetv2_cva_demo", help="where everything is written (default: ./%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the images and of all training (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="default: the best there is")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that holds something else, too")


def run(args: argparse.Namespace) -> int:
    """Everything; 1 if a step failed, 130 if it was interrupted."""
    # Before torch is imported. Threads that spin while they wait stall each other as soon as anything else runs.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from nnunetv2_cva.demo.flow import play

    return play(args.folder, args.seed, args.device, args.overwrite, StepsShown)


@dataclass
class Meter:
    """A progress bar that can be moved: redrawn in place on a terminal, a line now and then elsewhere."""

    total: int
    terminal: TextIO

    def __post_init__(self) -> None:
        self.done, self.began, self.shown = 0, time.monotonic(), 0.0
        self.moving = self.terminal.isatty()
        if self.moving:
            self.show()

    def tick(self) -> None:
        self.done += 1
        if time.monotonic() - max(self.began, self.shown) > (0.1 if self.moving else QUIET_SECONDS):
            self.show()

    def show(self) -> None:
        from tqdm import tqdm

        self.shown = time.monotonic()
        text = "      {percentage:3.0f} % |{bar}| {n_fmt}/{total_fmt} [{elapsed}, {remaining} left]"
        line = tqdm.format_meter(self.done, self.total, self.shown - self.began, ncols=90, ascii=True, bar_format=text)
        print(line, end="\r" if self.moving else "\n", file=self.terminal, flush=True)

    def finish(self) -> float:
        """Fill the bar and go to the next line. Returns the seconds since it was made."""
        self.done = self.total
        self.show()
        print(end="\n" if self.moving else "", file=self.terminal, flush=True)
        return self.shown - self.began


@dataclass
class StepsShown:
    """Shows the steps on the terminal and remembers which of them is under way and what they took. ``shares``: of the steps in
    the whole time, by which the time that remains is judged."""

    terminal: TextIO
    shares: Mapping[str, float]

    def __post_init__(self) -> None:
        self.current = ""
        self.seconds: dict[str, float] = {}

    def say(self, text: str) -> None:
        print(text, file=self.terminal, flush=True)

    @contextmanager
    def step(self, name: str, total: int, title: str, command: str = "") -> Iterator[Callable[[], None]]:
        """One step with its progress bar; yields what moves the bar on by one of ``total``."""
        number = f"{len(self.seconds) + 1} of {len(self.shares)}"
        self.current = f"step {number} ({name})"
        head = f"[{number.replace(' of ', '/')}] {title}{self.clock()}"
        self.say(head + (f"\n      $ {command}" if command else ""))
        bar = Meter(total, self.terminal)
        yield bar.tick
        self.seconds[name] = bar.finish()

    def clock(self) -> str:
        """How long the finished steps took, and how long the others will at this pace."""
        done = sum(self.shares[name] for name in self.seconds)
        if done == 0:
            return ""
        spent = sum(self.seconds.values())
        left = spent * (sum(self.shares.values()) - done) / done
        return f" ({spent / 60:.1f} min so far, about {left / 60:.0f} to go)"
