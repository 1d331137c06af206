"""The metrics of every epoch: a list of plain dicts, in ``metrics.jsonl``, in ``progress.png`` and in checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nnunetv2_cva.files import write_text, written_whole
from nnunetv2_cva.training.metrics import panels


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

    def plot(self) -> None:
        """Write ``progress.png``: the panels of the table of metrics over the epochs."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        shown = panels(self.epochs[-1])
        figure = Figure(figsize=(9, 16), layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (title, keys) in zip(figure.subplots(len(shown), 1), shown.items()):
            for key in keys:
                points = [(e["epoch"], e[key]) for e in self.epochs if key in e]
                if points:
                    axes.plot(*zip(*points), label=key, marker="." if len(points) < 30 else None)
            axes.set(title=title, xlabel="epoch")
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))  # beside the curves, not on them
        with written_whole(self.folder / "progress.png") as partial:
            figure.savefig(partial, dpi=110, format="png")
