"""``nnUNetv2_cva trainers``: the recipes that ``nnUNetv2_train -tr`` finds, one line each."""

from __future__ import annotations

import argparse

from nnunetv2_cva.installation.recipes import all_recipes

HELP = "List the recipes for nnUNetv2_train -tr, one line each."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``nnUNetv2_cva trainers`` has no arguments."""


def run(args: argparse.Namespace) -> int:
    """Print name and first line of every recipe."""
    found = all_recipes()
    width = max(map(len, found))
    for name, line in found.items():
        print(f"{name:{width}}  {line}")
    return 0
