"""What an item of ``gpu.py`` has found, on disk as soon as it is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nnunetv2_cva.files import read_json, write_json


class Report:
    """Called with findings by name. What an earlier attempt has found is there from the start."""

    def __init__(self, path: Path) -> None:
        self.path, self._content = path, read_json(path)

    def __call__(self, **values: Any) -> None:
        self._content["found"].update(values)
        write_json(self.path, self._content)

    def once(self, label: str, measure: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Report what ``measure`` returns, unless it is known. An error is a result too: the next way may work."""
        if label in self._content["found"]:
            return
        try:
            self(**{label: measure(*args, **kwargs)})
        except Exception as e:
            self(**{label: f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]}"[:200]})
