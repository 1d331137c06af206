"""Stopping in good order: signals and a limit of time are noticed between two steps, by all ranks after the same step."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from nnunetv2_cva.signals import EXIT_CODE, SIGNALS


class Stopped(SystemExit):
    """The training was stopped before its end and saved. Ends the program with ``EXIT_CODE``."""

    def __init__(self) -> None:
        super().__init__(EXIT_CODE)


class Stopping:
    """Asked after every step whether to stop. ``after``: minutes from ``began``
    (``monotonic``), None: no limit."""

    def __init__(self, after: float | None, began: float) -> None:
        self._end = None if after is None else began + 60 * after
        self._after = after
        self._signal = ""
        # Of its own and on the CPU: asking must not wait for the device.
        self._group: Any = dist.new_group(backend="gloo") if dist.is_available() and dist.is_initialized() else None

    @contextmanager
    def noticing(self) -> Iterator[None]:
        """Notice signals meanwhile. The first one is remembered; a second one ends the program at once, as it would have."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        before = {number: signal.signal(number, self._notice) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if self._signal:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._signal = signal.Signals(number).name

    def reason(self) -> str:
        """Why to stop now, in words; empty: go on. With several ranks all of them have to ask, and get the same answer."""
        mine = self._signal or ("" if self._end is None or monotonic() < self._end else f"{self._after:g} minutes are over")
        if self._group is None:
            return mine
        wanted = torch.tensor([bool(mine)], dtype=torch.int32)
        dist.all_reduce(wanted, dist.ReduceOp.MAX, group=self._group)
        return (mine or "another process was told to") if wanted.item() else ""
