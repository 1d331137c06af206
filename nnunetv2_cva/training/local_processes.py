"""One process for each device of this machine. Unlike torchrun it passes every signal on, waits for the run to be saved, and ends
with the code that the processes ended with."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from time import monotonic, sleep
from types import FrameType

from nnunetv2_cva.signals import SIGNALS

GRACE = 20.0  # seconds that the others get to say why they end when one has ended


def run_on_every_device(command: Sequence[str], processes: int) -> int:
    """Run ``command`` ``processes`` times, told who is who as torchrun does it. Returns the first code other than 0."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    started: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in started:
            process.send_signal(number)

    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    before = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        for rank in map(str, range(processes)):
            # A session of its own: Ctrl-C reaches it once, from here.
            own = {**common, "RANK": rank, "LOCAL_RANK": rank}
            started.append(subprocess.Popen(command, env=own, start_new_session=True))
        return _code_of(started)
    finally:
        for process in started:
            process.kill()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _code_of(started: Sequence[subprocess.Popen[bytes]]) -> int:
    first, until = 0, float("inf")
    while any([p.poll() is None for p in started]) and monotonic() < until:
        codes = [p.returncode for p in started if p.returncode]
        if codes and not first:
            first, until = codes[0], monotonic() + GRACE
        sleep(0.1)
    first = first or next((p.returncode for p in started if p.returncode), 0)
    return first if first >= 0 else 128 - first
