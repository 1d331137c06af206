"""The console command ``nnUNetv2_cva``: one module of this folder per subcommand.

Such a module has ``HELP: str``, ``add_arguments(parser)`` and ``run(args) -> int`` (the exit code). It imports whatever
is slow (torch, nnunetv2) inside functions, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from nnunetv2_cva import __version__

COMMANDS = ("plan", "preprocess", "peek", "export", "check", "info", "embed", "look", "probe", "report") + (
    "demo",
    "hook",
    "env",
    "trainers",
    "doctor",
    "bench",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand named in ``argv`` and return its exit code; 2 for a ``ValueError``, shown as one line."""
    argv = sys.argv[1:] if argv is None else argv
    args = make_parser(argv).parse_args(argv)
    try:
        return int(args.run(args))
    except ValueError as e:
        print(f"nnUNetv2_cva: error: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("nnUNetv2_cva: interrupted", file=sys.stderr)
        return 130


def make_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for ``argv``: of the subcommand it begins with, else of all of them (for ``--help`` and errors)."""
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_cva",
        description="Pretrain nnU-Net's own networks without labels by Consistent View Alignment.",
        epilog="Training itself is nnU-Net's: nnUNetv2_train DATASET 3d_fullres all -tr nnUNetTrainerCVA",
    )
    parser.add_argument("--version", action="version", version=f"nnUNetv2_cva {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in argv[:1] if argv and argv[0] in COMMANDS else COMMANDS:
        command = importlib.import_module(f"nnunetv2_cva.commands.{name}")
        subparser = subparsers.add_parser(name, help=command.HELP, description=command.HELP)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser
