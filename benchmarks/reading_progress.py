"""docs/reading_progress.png: panels of progress.png of a healthy, a collapsing and a too short run, side by side.

    python benchmarks/reading_progress.py --raw FOLDER_WITH_Dataset004_Hippocampus --folder WORK [--picture FILE]

The network and views of verdicts.py, epochs of 20 iterations, seed 0: some minutes on a CPU. What has been trained in WORK is
not trained again.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from pathlib import Path
from typing import Any

import torch
import verdicts
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from small_project import NAME, make_trainer, prepare

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.seeing.verdict import verdict
from nnunetv2_cva.training import metrics
from nnunetv2_cva.training.curves import COLOURS, draw_panel

COMMON = {"seed": 0, "iterations_per_epoch": 20, "warmup_epochs": None, "watched_cases": 8}
RUNS: dict[str, dict[str, Any]] = {
    "healthy: 40 epochs": {"epochs": 40},
    "collapsing: weight_decay 20": {"epochs": 12, "learning_rate": 1e-2, "weight_decay": 20.0},
    "too short: 4 epochs": {"epochs": 4},
}
HEIGHTS = {metrics.PARTS: 5.2, metrics.RETRIEVAL: 0.46, metrics.RANK: 56}  # one scale for a row


def epochs_of(name: str, kept: Path) -> tuple[list[dict[str, Any]], CVAConfig]:
    """The metrics of a run, which is trained where ``kept`` has none, and its settings."""
    trainer = make_trainer(verdicts.trainer_class(""), verdicts.CONFIGURATION, {**COMMON, **RUNS[name]})
    if not kept.exists():
        trainer.run_training()
        Path(trainer.output_folder).rename(kept)
    lines = (kept / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], trainer.config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--picture", type=Path, default=Path("reading_progress.png"))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    prepare(args.raw.resolve(), args.folder.resolve())
    verdicts.configure(args.folder / "pre" / NAME)
    figure = Figure(figsize=(13, 12), layout="constrained")
    FigureCanvasAgg(figure)
    for column, name in zip(figure.subplots(3, 3).T, RUNS):
        epochs, config = epochs_of(name, args.folder / name.partition(":")[0].replace(" ", "_"))
        found = verdict(epochs)
        print(f"{name}: {found}")
        shown = metrics.panels(epochs[-1])
        for axes, (title, height) in zip(column, HEIGHTS.items()):
            draw_panel(axes, title, shown[title], epochs, config)
            axes.set_ylim(0, height)
            axes.set_title("\n".join(textwrap.wrap(title, 48)), fontsize=9)
        words = "\n".join((name, *textwrap.wrap(str(found), 54)))
        column[0].set_title(words, fontsize=9, color=COLOURS[found.state])
    figure.savefig(args.picture, dpi=80)


if __name__ == "__main__":
    main()
