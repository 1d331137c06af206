"""``nnUNetv2_cva report``: one page about a pretraining, also while it runs."""

from __future__ import annotations

import argparse

HELP = "Write a page about a pretraining: verdict, curves, views, matches, settings. Also while it runs."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``nnUNetv2_cva report``."""
    parser.add_argument("folder", metavar="FOLDER", help="of a pretraining, in nnUNet_results: .../fold_all")


def run(args: argparse.Namespace) -> int:
    """Write the page, print the verdict."""
    from nnunetv2_cva.training.report import report

    print("\n".join(report(args.folder)))
    return 0
