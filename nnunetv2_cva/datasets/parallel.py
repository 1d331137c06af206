"""Work spread over processes that do not outlive this one."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
Item = TypeVar("Item")
Result = TypeVar("Result")


def for_each(function: Callable[[Item], Result], items: Iterable[Item], processes: int, done: Callable[[Result], None]) -> None:
    """Call ``done(function(item))`` for every item, in the order in which they finish; ``done`` runs in this process.

    ``function`` and the items must be picklable. Never more than a few items per process are in flight, so a long list costs
    no memory.

    Raises:
        ValueError: a process was killed from outside.
    """
    if processes <= 1:
        for item in items:
            done(function(item))
        return
    context = multiprocessing.get_context("spawn")  # as nnU-Net: forking a process that has used torch's threads may hang
    with ProcessPoolExecutor(processes, context, _begin) as pool:
        running: set[Future[Result]] = set()
        try:
            for item in items:
                running.add(pool.submit(function, item))
                if len(running) >= 3 * processes:
                    running = _collect(running, done)
            while running:
                running = _collect(running, done)
        except BrokenProcessPool:
            raise ValueError(
                "A worker process was killed, most often because memory ran out. Run the same command again with fewer "
                f"processes than -np {processes}; what is finished is kept."
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _collect(running: set[Future[Result]], done: Callable[[Result], None]) -> set[Future[Result]]:
    finished, rest = wait(running, return_when=FIRST_COMPLETED)
    for future in finished:
        done(future.result())
    return rest


def _begin() -> None:
    """In a new worker: one thread each, quiet readers, and an end when the parent is killed (nobody would tell the worker)."""
    os.environ.update({name: "1" for name in THREADS})  # read when torch and numpy's libraries are imported, in a moment
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
