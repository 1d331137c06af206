"""``nnUNetv2_cva settings``: what can be set, its default, its range, what it means."""

from __future__ import annotations

import argparse

HELP = "List the settings of the pretraining and of the fine-tuning with default, range and meaning; or explain one."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``nnUNetv2_cva settings``."""
    parser.add_argument("name", nargs="?", help="a setting or the beginning of its name; default: all")
    parser.add_argument("--markdown", action="store_true", help="the whole of docs/settings.md")


def run(args: argparse.Namespace) -> int:
    """Print the settings whose name begins so, or the document."""
    from nnunetv2_cva.config import explanations

    print("\n".join(explanations(args.name or "", args.markdown)))
    return 0
