"""Work spread over processes that do not outlive this one."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
Item = TypeVar("Item")
Result = TypeVar("Result")
Progress = Callable[[str, int, int], Any]  # called with what is being done, how many are done, of how many


def for_each(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    processes: int,
    done: Callable[[Result], None],
    died: Callable[[Item], Result],
    progress: Progress,
    what: str,
) -> None:
    """Call ``done(function(item))`` for every item, in the order in which they finish; ``done`` runs in this process.

    ``function`` and the items must be picklable. Never more than a few items per process are in flight, so a long list costs
    no memory. ``progress(what, finished, all)`` is called before the first and after each. When a process is killed (by the
    system for want of memory, by a reader that aborts), the items that were in flight are done one at a time; ``died(item)``
    stands for the result of one whose process is killed even then.

    Raises:
        ValueError: no process stays alive, whatever it does.
    """
    finished = 0
    progress(what, finished, len(items))

    def counted(result: Result) -> None:
        nonlocal finished
        done(result)
        finished += 1
        progress(what, finished, len(items))

    if processes <= 1:
        for item in items:
            counted(function(item))
        return
    waiting = iter(items)
    while suspects := _until_one_is_killed(function, waiting, processes, counted):
        _one_at_a_time(function, suspects, counted, died)


def _pool(processes: int) -> ProcessPoolExecutor:
    # As nnU-Net: forking a process that has used torch's threads may hang.
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin)


def _until_one_is_killed(
    function: Callable[[Item], Result], items: Iterator[Item], processes: int, done: Callable[[Result], None]
) -> list[Item]:
    """The items that were in flight when a process was killed; none when all are done."""
    running: dict[Future[Result], Item] = {}
    with _pool(processes) as pool:
        try:
            for item in items:
                try:
                    running[pool.submit(function, item)] = item
                except BrokenProcessPool:
                    return [*running.values(), item]
                if len(running) >= 3 * processes:
                    _collect(running, done)
            while running:
                _collect(running, done)
        except BrokenProcessPool:
            return list(running.values())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return []


def _collect(running: dict[Future[Result], Item], done: Callable[[Result], None]) -> None:
    """Take what is finished out of ``running``. Raises BrokenProcessPool when a process was killed."""
    finished, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in finished:
        result = future.result()
        del running[future]
        done(result)


def _one_at_a_time(
    function: Callable[[Item], Result], items: Sequence[Item], done: Callable[[Result], None], died: Callable[[Item], Result]
) -> None:
    rest = list(items)
    while rest:
        with _pool(1) as pool:
            try:
                pool.submit(int).result()
            except BrokenProcessPool:
                raise ValueError(
                    "Processes that share the work are killed as soon as they start. Run the same again with `processes=1`; what "
                    "is finished is kept."
                ) from None
            while rest:
                try:
                    result = pool.submit(function, rest[0]).result()
                except BrokenProcessPool:
                    done(died(rest.pop(0)))
                    break
                rest.pop(0)
                done(result)


def _begin() -> None:
    """In a new worker: one thread each, quiet readers, and an end when the parent is killed (nobody would tell the worker)."""
    os.environ.update({name: "1" for name in THREADS})  # read when torch and numpy's libraries are imported, in a moment
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
