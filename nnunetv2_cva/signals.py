"""A signal that comes while the program starts or after the run is saved: nothing can be lost, so it ends at once, with the code
that asks for another start. Imports nothing slow: it has to be there first."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

EXIT_CODE = 75  # sysexits.h: try again later
SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")


@contextmanager
def ending_with_the_code() -> Iterator[None]:
    """End the program with ``EXIT_CODE`` at a signal, wherever the training does not notice signals itself."""
    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    before = {number: signal.signal(number, _end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> None:
    """Without clean-up: an exception could be caught by whatever is being imported."""
    with suppress(Exception):
        sys.stdout.flush()
    name = signal.Signals(number).name
    with suppress(OSError):
        os.write(2, f"nnunetv2_cva: {name} came outside the training: start the same command again. Exit code 75.\n".encode())
    os._exit(EXIT_CODE)
