"""Time and memory as the device sees them: a program runs ahead of a GPU, so its own clock says little about the GPU's."""

from __future__ import annotations

import sys
from collections import deque
from time import perf_counter
from typing import Any

import torch

AHEAD = 2  # steps that wait for the device at most


class Clock:
    """Moments on the device: here the device does at once what it is told."""

    def mark(self, hold: bool = True) -> Any:
        """Now, as the device sees it. ``hold``: keep the program from running ahead of the device by many steps."""
        self.wait()
        return perf_counter()

    def between(self, begin: Any, end: Any) -> float:
        """Seconds."""
        return end - begin

    def wait(self) -> None:
        """Until everything is done that the device was told."""

    def peak(self) -> int:
        """Bytes: the whole process on a CPU. 0: not known."""
        if sys.platform == "win32":
            return 0
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

    def available(self) -> int | None:
        """Bytes that the device has."""
        return None


class MPSClock(Clock):
    def wait(self) -> None:
        torch.mps.synchronize()


class CUDAClock(Clock):
    """The host runs ahead of the device, so that the time it waits for a batch is not the time that the device does."""

    def __init__(self) -> None:
        self._pending: deque[torch.cuda.Event] = deque()
        torch.cuda.reset_peak_memory_stats()

    def mark(self, hold: bool = True) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        if hold:
            self._pending.append(event)
            if len(self._pending) > AHEAD:
                self._pending.popleft().synchronize()
        return event

    def between(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1000

    def wait(self) -> None:
        torch.cuda.synchronize()
        self._pending.clear()

    def peak(self) -> int:
        return torch.cuda.max_memory_reserved()

    def available(self) -> int | None:
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory


def make_clock(device: torch.device) -> Clock:
    """The clock of a device; its peak of memory counts from now on."""
    return {"cuda": CUDAClock, "mps": MPSClock}.get(device.type, Clock)()
