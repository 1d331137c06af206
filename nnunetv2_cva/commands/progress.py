"""Progress bars for work that tells how far it is."""

from __future__ import annotations

from types import TracebackType
from typing import Any


class Bar:
    """Called with what is done, how many of it and of how many: one bar for each kind of work, none for no work."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    def __call__(self, what: str, finished: int, of: int) -> None:
        """Show it, or move it on."""
        if self._bar is not None:
            self._bar.update(finished - self._bar.n)
        elif of:
            from tqdm import tqdm

            self._bar = tqdm(total=of, initial=finished, desc=what)
        if finished == of:
            self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
