"""``nnUNetv2_cva report``: one page about a pretraining, also while it runs."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "Write a page about a pretraining: verdict, curves, views, matches, settings. Also while it runs."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``nnUNetv2_cva report``."""
    parser.add_argument("folder", metavar="FOLDER", help="of a pretraining, in nnUNet_results: .../fold_all")


def run(args: argparse.Namespace) -> int:
    """Write the page, print the verdict."""
    from nnunetv2_cva.seeing.verdict import verdict
    from nnunetv2_cva.training.report import read_epochs, write_report

    folder = Path(args.folder)
    print(verdict(read_epochs(folder)))
    print(f"Wrote {write_report(folder)}.")
    return 0
