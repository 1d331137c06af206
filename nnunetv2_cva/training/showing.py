"""What a user can watch beside the log while a training runs: a bar on a terminal, TensorBoard, pictures, the verdict."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunetv2_cva.model.branches import Student
from nnunetv2_cva.training.objective import Prepared
from nnunetv2_cva.training.pictures import SHOWN, draw_views
from nnunetv2_cva.training.report import VIEWS, write_report

EVERY = 5  # epochs between pictures of views; the first and the last epoch have one, too


class RunBar:
    """A progress bar for the whole run, with the time it will still take, where standard error is a terminal; else nothing."""

    def __init__(self, steps: int, done: int, shown: bool = True) -> None:
        self._bar: Any = None
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=done, desc="Pretraining", unit="it", smoothing=0.05, dynamic_ncols=True)

    def tick(self) -> None:
        """One step more."""
        if self._bar is not None:
            self._bar.update()

    def aside(self) -> AbstractContextManager:
        """While others write lines."""
        return nullcontext() if self._bar is None else self._bar.external_write_mode(file=sys.stdout)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


class Board:
    """TensorBoard's writer for the run's folder where tensorboard is installed, else nothing."""

    def __init__(self, folder: str | Path, used: bool = True) -> None:
        self._writer: Any = None
        if used and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(Path(folder) / "tensorboard"))

    def log(self, name: str, value: float, epoch: int) -> None:
        """One number of an epoch."""
        if self._writer is not None:
            self._writer.add_scalar(name, value, epoch)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close()


class Views:
    """views.png: of a few cases of the last step of every fifth epoch."""

    def __init__(self, folder: str | Path, epochs: int) -> None:
        self.path, self.last = Path(folder) / VIEWS, epochs - 1
        self._kept: tuple[Prepared, tuple[str, ...], Tensor | None] | None = None

    def due(self, epoch: int) -> bool:
        """Whether this epoch has a picture."""
        return epoch % EVERY == 0 or epoch == self.last

    def keep(self, batch: Prepared, keys: Sequence[str], overlap: Tensor) -> None:
        """Copy the first cases, which are called ``keys``: the loader uses the memory of the batch again."""
        cases = len(keys)
        per_case, shown = len(batch.views) // cases, min(SHOWN, cases)
        rows = [view * cases + case for view in range(per_case) for case in range(shown)]
        # One by one: a list of numbers would have to be copied to the device, which waits for it.
        tensors = {name: torch.stack([value[row] for row in rows]) for name, value in vars(batch).items() if value is not None}
        self._kept = replace(batch, **tensors), tuple(keys[:shown]), overlap[:shown].clone() if per_case > 1 else None

    def draw(self, student: Student, autocast: Callable[[], AbstractContextManager]) -> None:
        """Draw what was kept, if anything. Raises OSError where it cannot be written."""
        if self._kept is not None:
            batch, keys, overlap = self._kept
            names = [key if overlap is None else f"{key}, overlap {float(overlap[n]):.2f}" for n, key in enumerate(keys)]
            draw_views(student, batch, names, autocast, self.path)
            self._kept = None


def report_quietly(folder: str | Path, say: Callable[[str], None]) -> None:
    """The page at the end of a training: it is worth no run, so whatever is wrong with it is only said."""
    try:
        say(f"What was learned, on one page: {write_report(Path(folder))}")
    except Exception as e:  # noqa: BLE001  a picture of odd images, a full disk, a display library: the weights are safe already
        say(f"WARNING: the report could not be written ({type(e).__name__}: {e}). Again: nnUNetv2_cva report {folder}")
