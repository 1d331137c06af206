"""``nnUNetv2_cva env``: the environment variable instead of the hook."""

from __future__ import annotations

import argparse
import os
import shlex

from nnunetv2_cva.commands.hook import VARIABLE, recipes_folder, with_folder

HELP = 'Print the line that does the same for one shell: eval "$(nnUNetv2_cva env)".'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``nnUNetv2_cva env`` has no arguments."""


def run(args: argparse.Namespace) -> int:
    """Print the export line, with what the variable holds now before our folder."""
    print(f"export {VARIABLE}={shlex.quote(with_folder(os.environ.get(VARIABLE), recipes_folder()))}")
    return 0
