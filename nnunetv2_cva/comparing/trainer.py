"""nnU-Net's trainers with what a comparison has to fix: cases, seeds, length, and when the test cases are looked at.

Network, loss, optimizer, schedule, augmentation and sampling are the trainer's own.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnunetv2_cva.comparing.design import STOCK_EPOCHS, epochs_of
from nnunetv2_cva.seeding import stream

LOADERS = "nnUNet_n_proc_DA"
CACHED = 2  # batches per loader process


class Numbered:
    """Batches of an nnU-Net loader, the n-th of which follows from seed and n alone: the same for every arm, and for any
    number of loader processes, among which MultiThreadedAugmenter deals batches in turn."""

    def __init__(self, loader: Any, seed: int, processes: int) -> None:
        self.loader, self.seed, self.step, self.number = loader, seed, max(1, processes), 0

    def set_thread_id(self, process: int) -> None:
        """Called in every loader process, counted from 0."""
        self.number = process

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        seed_everything("compared batch", self.seed, self.number)
        self.number += self.step
        return next(self.loader)


def seed_everything(purpose: str, *numbers: int) -> None:
    """nnU-Net draws from all three of these."""
    seed = int(stream(purpose, *numbers).integers(2**32))
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def fixed(
    stock: type[nnUNetTrainer], training: Sequence[str], test: Sequence[str], seed: int, after_epoch: Callable[[Any], None]
) -> type[nnUNetTrainer]:
    """A trainer like ``stock`` under the same name, for these cases and this seed. ``after_epoch(trainer)`` is called when an
    epoch has ended, ``trainer.current_epoch`` of them so far."""

    class Fixed(stock):
        def do_split(self) -> tuple[list[str], list[str]]:
            return list(training), list(test)

        def get_dataloaders(self) -> tuple[Any, Any]:
            """nnU-Net's loaders, numbered."""
            processes = 0 if self.device.type == "cpu" else get_allowed_n_proc_DA()
            with _set(LOADERS, "0"):
                both = super().get_dataloaders()
            if not all(isinstance(b, SingleThreadedAugmenter) for b in both):
                raise ValueError(
                    f"{stock.__name__} loads in a way of its own: batches cannot be fixed. Compare another `trainer`."
                )
            numbered = [Numbered(b.data_loader, seed, p) for b, p in zip(both, (processes, 0))]
            validation = SingleThreadedAugmenter(numbered[1], None)
            if processes == 0:
                return SingleThreadedAugmenter(numbered[0], None), validation
            pinned = self.device.type == "cuda"
            return MultiThreadedAugmenter(numbered[0], None, processes, CACHED, None, pinned, wait_time=0.002), validation

        def on_epoch_end(self) -> None:
            super().on_epoch_end()
            after_epoch(self)

    Fixed.__name__ = Fixed.__qualname__ = stock.__name__
    return Fixed


def set_length(trainer: Any, iterations: int | None) -> None:
    """Cut a training to ``iterations``, its schedule in proportion. Fewer validation patches: nothing depends on them."""
    trainer.num_val_iterations_per_epoch = 1
    trainer.disable_checkpointing = True  # the result is all that is kept
    trainer.logger.plot_progress_png = lambda *_: None
    if iterations is None:
        return
    epochs = epochs_of(iterations)
    trainer.num_epochs, trainer.num_iterations_per_epoch = epochs, iterations // epochs
    if hasattr(trainer, "warmup_duration_whole_net"):  # epochs, of nnU-Net's trainers with a warm-up
        trainer.warmup_duration_whole_net = max(1, round(trainer.warmup_duration_whole_net * epochs / STOCK_EPOCHS))


@contextmanager
def _set(variable: str, value: str) -> Iterator[None]:
    before = os.environ.get(variable)
    os.environ[variable] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
