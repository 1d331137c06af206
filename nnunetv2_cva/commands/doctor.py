"""``nnUNetv2_cva doctor``: what has to be right before nnU-Net reaches our code, one line per check."""

from __future__ import annotations

import argparse

from nnunetv2_cva.installation.doctor import EXPLANATIONS, examine

HELP = "Check this installation: one line per check, OK or what to do. Exit code 1 if there is something to do."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``nnUNetv2_cva doctor``."""
    parser.add_argument("--explain", action="store_true", help="explain errors that nnU-Net raises before our code runs")


def run(args: argparse.Namespace) -> int:
    """Print the diagnoses as they come; 1 if one of them is a FIX."""
    if args.explain:
        print("\n\n".join(f"{message}\n    {meaning}" for message, meaning in EXPLANATIONS))
        return 0
    healthy = True
    for diagnosis in examine():
        print(diagnosis, flush=True)
        healthy = healthy and not diagnosis.to_do
    print("Errors of nnU-Net explained: nnUNetv2_cva doctor --explain")
    return 0 if healthy else 1
