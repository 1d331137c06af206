"""The metrics of every epoch: a list of plain dicts, in ``metrics.jsonl``, in ``progress.png`` and in checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.files import write_text
from nnunetv2_cva.training.curves import draw_curves


class History:
    """``epochs``: their metrics, in order."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.epochs: list[dict[str, Any]] = []

    def restore(self, epochs: list[dict[str, Any]]) -> None:
        """Go on after these epochs (none: a new run). Epochs that a killed run logged and did not save leave the file."""
        self.epochs = list(epochs)
        self.write()

    def write(self) -> None:
        """Write ``metrics.jsonl``: one line per epoch."""
        write_text(self.folder / "metrics.jsonl", "".join(json.dumps(epoch) + "\n" for epoch in self.epochs))

    def plot(self, config: CVAConfig) -> None:
        """Draw ``progress.png``."""
        draw_curves(self.epochs, config, self.folder / "progress.png")
