"""Batches that are copied to the GPU while it computes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from nnunetv2_cva.views.loader import Batches

COPIED = ("views", "rois", "inside")  # of a batch


class Event(Protocol):
    """A place in what a stream was told to do."""

    def synchronize(self) -> None:
        """Wait until the stream is past it."""


class Lane:
    """A CUDA stream for copies, beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def room(self, like: Tensor) -> Tensor:
        """Memory of the device for such a tensor."""
        return torch.empty_like(like, device=self.device)

    def now(self) -> Event:
        """Behind everything that the computation has been told so far."""
        return torch.cuda.current_stream(self.device).record_event()

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Event) -> Event:
        """Copy ``(destination, source)`` when the computation is past ``after``. Returns the place where all are copied."""
        self._stream.wait_event(after)  # type: ignore[arg-type]
        with torch.cuda.stream(self._stream):
            for destination, source in pairs:
                destination.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def hold(self, copied: Event) -> None:
        """What the computation is told from now on waits for ``copied``."""
        torch.cuda.current_stream(self.device).wait_event(copied)  # type: ignore[arg-type]


class DeviceBatches:
    """Iterator over ``batches`` whose tensors of views lie on the device, in one of two places that take turns.

    A batch is copied while the device still computes the step before it, and may be changed until the next one is asked for.
    Asking for the next one waits for the last copy, because the loader may write into its source again; the copy itself waits
    for the last step but one, so a program is never further ahead of the device than two steps.
    """

    def __init__(self, batches: Batches, lane: Lane) -> None:
        self.batches = batches
        self._lane = lane
        self._places: list[dict[str, Tensor]] = []
        self._free: list[Event] = []  # where the computation is past the last step that reads the place
        self._turn = 0
        self._copied: Event | None = None

    @property
    def waited(self) -> float:
        """Seconds spent waiting for the loader since it was last set to 0."""
        return self.batches.waited

    @waited.setter
    def waited(self, seconds: float) -> None:
        self.batches.waited = seconds

    @property
    def workers(self) -> int:
        """Processes that load."""
        return self.batches.workers

    @property
    def prepared(self) -> int:
        """Batches that may lie ready."""
        return self.batches.prepared

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        """Raises what ``batches`` raises."""
        if self._copied is not None:
            self._copied.synchronize()
            self._free[self._turn] = self._lane.now()
        batch = next(self.batches)
        if not self._places:
            self._places = [{name: self._lane.room(batch[name]) for name in COPIED} for _ in range(2)]
            self._free = [self._lane.now()] * 2
        self._turn = 1 - self._turn
        place = self._places[self._turn]
        self._copied = self._lane.copy([(place[name], batch[name]) for name in COPIED], self._free[self._turn])
        self._lane.hold(self._copied)
        return {**batch, **place}

    def close(self) -> None:
        """End the loader's processes. Idempotent."""
        if self._copied is not None:
            self._copied.synchronize()
        self.batches.close()
