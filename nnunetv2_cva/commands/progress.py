"""A progress bar whose length is known only once work has been found."""

from __future__ import annotations

from types import TracebackType
from typing import Any


class Bar:
    """``start(n)`` shows it (not for 0), ``tick()`` advances it."""

    def __init__(self, label: str) -> None:
        self.label = label
        self._bar: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def start(self, total: int) -> None:
        """Show the bar."""
        if total:
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=self.label)

    def tick(self, steps: int = 1) -> None:
        """``steps`` more are done."""
        if self._bar is not None:
            self._bar.update(steps)
