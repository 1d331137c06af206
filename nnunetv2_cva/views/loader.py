"""Batches of views, read from disk by worker processes.

A dataset item is the whole batch of one global step. What it holds follows from (seed, step, place in the step) and
nothing else: not from the number of workers or processes, nor from what was loaded before.
"""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.context import BaseContext
from time import perf_counter
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.failures import TrainingFailed
from nnunetv2_cva.seeding import stream
from nnunetv2_cva.views.cases import Case, Cases, Checked, check_cases, check_varies
from nnunetv2_cva.views.geometry import Pair, draw_pair
from nnunetv2_cva.views.resample import air_fraction, show, window
from nnunetv2_cva.views.resources import fit_into_memory, memory_report, worker_count

__all__ = ["Batches", "Cases", "Checked", "PairDataset", "check_cases", "make_loader", "worker_count"]

DRAWS = 4  # of a pair, before mostly air is accepted


class PairDataset(Dataset):
    """Item ``step`` is the batch of that global step, or this process's part of it.

    ``views`` (N, C, I, J, K) float32, ``rois`` (N, 2, 3) float32, ``inside`` (N, 1, I, J, K) bool: view-major, row
    ``v * B + b`` is view v of case b. ``keys``: the names of the B cases, all different. ``overlap`` (B,) float32: what
    the views really share. ``step``.

    N = 2B, but when no loss compares views N = B: then there is one view per case, which leaves the case only where it
    does not fit by itself.
    """

    def __init__(
        self,
        cases: Cases,
        keys: Sequence[str],
        size: Sequence[int],
        config: CVAConfig,
        batch_total: int,
        rank_slice: tuple[int, int],
        seed: int,
        weights: np.ndarray | None = None,
    ) -> None:
        """``keys``: the cases to draw from; ``weights`` (len(keys),): how likely each is drawn, None: all alike.

        A step draws ``batch_total`` over all processes; this one loads those from ``rank_slice[0]`` to before
        ``rank_slice[1]``.

        Raises:
            ValueError: fewer cases than a step needs.
        """
        if batch_total > len(keys):
            raise ValueError(
                f"A step needs {batch_total} cases (batch_size of the plans), found {len(keys)}. The cases of a step "
                "are different cases: lower batch_size or add cases."
            )
        assert 0 <= rank_slice[0] < rank_slice[1] <= batch_total and len(size) == 3
        self.cases, self.keys = cases, np.array(keys, dtype=str)
        self.size = (int(size[0]), int(size[1]), int(size[2]))
        self.per_case = 2 if config.needs_second_view else 1
        # Two views that overlap entirely fit wherever one does.
        self.config = config if config.needs_second_view else replace(config, overlap=(1.0, 1.0), spatial="shared")
        self.batch_total, self.rank_slice, self.seed, self.weights = batch_total, rank_slice, seed, weights
        self.channels = cases.open(self.keys[0]).channels
        self._memory: Iterator[tuple[Tensor, ...]] | None = None

    @property
    def batch_bytes(self) -> int:
        """Bytes of one item."""
        views = self.per_case * (self.rank_slice[1] - self.rank_slice[0])
        return views * int(np.prod(self.size)) * (4 * self.channels + 1)

    def keep_memory(self, items: int) -> None:
        """Write into the same shared memory in turn from now on: an item is overwritten ``items`` items later.

        The kernel provides fresh shared memory page by page, which takes longer than reading a pair of plain crops.
        """
        self._memory = itertools.cycle([tuple(part.share_memory_() for part in self._new_memory()) for _ in range(items)])

    def _new_memory(self) -> tuple[Tensor, ...]:
        """``views`` and ``inside`` of an item, not yet written."""
        count = self.per_case * (self.rank_slice[1] - self.rank_slice[0])
        return torch.empty(count, self.channels, *self.size), torch.empty(count, 1, *self.size, dtype=torch.bool)

    def __getitem__(self, step: int) -> dict[str, Any]:
        """Raises ValueError, naming the file, when a case cannot be read, holds NaN or Inf, or is constant."""
        chosen = stream("cases", self.seed, step).choice(len(self.keys), self.batch_total, replace=False, p=self.weights)
        begin, end = self.rank_slice
        count = end - begin
        keys = [str(self.keys[c]) for c in chosen[begin:end]]
        views, inside = self._new_memory() if self._memory is None else next(self._memory)
        pairs = [
            self._load(key, stream("views", self.seed, step, begin + b), views[b::count], inside[b::count, 0])
            for b, key in enumerate(keys)
        ]
        rois = np.concatenate([[p.rois[v] for p in pairs] for v in range(self.per_case)])
        overlap = torch.tensor([p.overlap for p in pairs], dtype=torch.float32)
        return {"views": views, "rois": torch.from_numpy(rois), "inside": inside, "keys": keys, "overlap": overlap, "step": step}

    def _load(self, key: str, rng: np.random.Generator, views: Tensor, inside: Tensor) -> Pair:
        """Draw a pair of a case and write its views. A pair of mostly air is drawn again; the least airy is kept."""
        case = self.cases.open(key)
        if case.channels != self.channels:
            raise ValueError(f"{case.path}: has {case.channels} channels, the other cases have {self.channels}.")
        least = np.inf
        for _ in range(DRAWS):
            drawn = draw_pair(case.shape, self.size, self.config, rng)
            windows = [window(drawn, v) for v in range(self.per_case)]
            # The boxes around rotated views are large: the second one is read when the first view is done.
            voxels = _read(case, windows if drawn.rotation is None else windows[:1])
            air = air_fraction(voxels[0], windows[0], drawn) if self.config.max_air < 1 else 0.0
            if air < least:
                least, pair, boxes, read = air, drawn, windows, voxels
            if air <= self.config.max_air:
                break
        if least == 1:  # nothing but air in every draw
            check_varies(case)
        del voxels
        for v, box in enumerate(boxes):
            show(read.pop(0) if read else case.read(box), box, pair, v, views[v], inside[v])
        return pair


def _read(case: Case, boxes: list[np.ndarray]) -> list[np.ndarray]:
    """The voxels of every box; read at once where the box around them touches fewer blocks than they do by themselves."""
    union = np.stack([np.min(boxes, axis=0)[:, 0], np.max(boxes, axis=0)[:, 1]], axis=1)
    if case.blocks(union) > sum(case.blocks(box) for box in boxes):
        return [case.read(box) for box in boxes]
    voxels = case.read(union)
    parts = [[slice(b, e) for b, e in box - union[:, :1]] for box in boxes]
    return [voxels[:, i, j, k] for i, j, k in parts]


def _keep_memory(items: int, worker: int) -> None:
    """At the start of a worker."""
    dataset: Any = get_worker_info().dataset  # type: ignore[union-attr]
    dataset.keep_memory(items)


def _as_it_is(item: Any) -> Any:
    return item


def make_loader(
    dataset: PairDataset,
    first_step: int,
    last_step: int,
    workers: int,
    prefetch: int,
    pin_memory: bool = False,
    context: str | BaseContext | None = None,
    processes: int = 1,
) -> tuple[DataLoader, str | None]:
    """A loader of the steps ``first_step`` to before ``last_step``, and a note if memory allows less than asked for.

    ``prefetch``: steps that every worker prepares ahead. ``processes``: training processes that share this machine's
    memory. ``context``: how workers are started (fork, spawn, forkserver), None for the platform's default.
    """
    workers, prefetch, note = fit_into_memory(dataset.batch_bytes * processes, workers, prefetch)
    parallel: dict[str, Any] = {}
    if workers:
        # Workers take turns. A worker has been asked for `prefetch` items after the one that is in use.
        start = partial(_keep_memory, prefetch + 1)
        parallel = {"prefetch_factor": prefetch, "multiprocessing_context": context, "worker_init_fn": start}
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=range(first_step, last_step),
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else the loader would draw from the global one
        **parallel,
    )
    return loader, note


class Batches:
    """Iterator over a loader's batches that measures how long it waits and explains why a worker died.

    A batch is the caller's until the next one is asked for. Its memory may then be written again: copies have to be done.
    ``waited``: seconds spent in ``next`` since it was last set to 0. Workers start at once; ``close`` ends them.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.waited = 0.0
        self._loader = loader
        self._waiting = False
        self._died: RuntimeError | None = None
        self._iterator: Any = iter(loader)
        self._torch_handler: Any = None
        if loader.num_workers and hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
            self._torch_handler = signal.signal(signal.SIGCHLD, self._child_ended)

    @property
    def workers(self) -> int:
        """Processes that load; 0: the main process does."""
        return self._loader.num_workers

    @property
    def prepared(self) -> int:
        """Batches that may lie ready."""
        return self.workers * (self._loader.prefetch_factor or 0)

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, Any]:
        """Raises what the dataset raised, with its traceback, or TrainingFailed when a worker died."""
        if self._iterator is None:
            raise StopIteration
        began = perf_counter()
        self._waiting = True
        try:
            if self._died is not None:
                raise self._died
            return next(self._iterator)
        except BaseException as e:
            self.close()
            text = str(e)
            died = text.startswith("DataLoader worker (pid") or "shared memory" in text
            if died and isinstance(e, (RuntimeError, OSError)):
                raise TrainingFailed(self._explain(text)) from e
            raise
        finally:
            self._waiting = False
            self.waited += perf_counter() - began

    def close(self) -> None:
        """End the workers. Idempotent."""
        iterator, self._iterator = self._iterator, None
        self._died = None
        if self._torch_handler is not None and signal.getsignal(signal.SIGCHLD) == self._child_ended:
            signal.signal(signal.SIGCHLD, self._torch_handler)
        self._torch_handler = None
        if hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()

    def _child_ended(self, number: int, frame: FrameType | None) -> None:
        """torch raises from the signal, wherever the program happens to be. Here, it surfaces in ``next``.

        There is no simpler way: torch names the process that died and how in this handler only, and without it ``next`` would
        wait for ever. Left alone, the handler would raise in the middle of a step or of writing a checkpoint.
        """
        if not callable(self._torch_handler):
            return
        try:
            self._torch_handler(number, frame)
        except RuntimeError as e:
            if self._waiting:
                raise
            self._died = e

    def _explain(self, text: str) -> str:
        dataset: Any = self._loader.dataset
        return (
            f"A data loading process died ({text.strip().splitlines()[0]}). When nothing above says why, it was most "
            f"likely ended for want of memory. Now {memory_report()}; each of {self._loader.num_workers} workers holds "
            f"{(self._loader.prefetch_factor or 0) + 1} batches of {dataset.batch_bytes / 2**20:.0f} MB. Use fewer workers "
            "(nnUNet_n_proc_DA=2; 0 loads in the main process) or a smaller batch_size or patch_size; in docker, give "
            "more shared memory (--shm-size=8g or --ipc=host)."
        )
