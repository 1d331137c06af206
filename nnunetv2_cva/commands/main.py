"""The console command ``nnUNetv2_cva``: one module of this folder per subcommand, or a class in such a module.

It has ``HELP: str``, ``add_arguments(parser)`` and ``run(args) -> int`` (the exit code). It imports whatever
is slow (torch, nnunetv2) inside functions, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import re
import sys
import traceback
import warnings
from collections.abc import Sequence

from nnunetv2_cva import __version__
from nnunetv2_cva.commands.options import in_options, options_of
from nnunetv2_cva.failures import TOLD, sentence

COMMANDS = (
    *("plan", "preprocess", "peek", "train"),
    *("embed", "look", "probe", "report"),
    *("export", "check", "info", "compare"),
    *("demo", "hook", "env", "trainers", "settings", "doctor", "bench"),
)
DEBUG = "--debug"
NAMES = ("d", "c", "p", "tr", "dataset", "configuration", "plans", "trainer", "fold")  # of arguments that are names
WITHIN = {"env": "hook"}  # commands whose parts are a class of this name in the module of another


def main(argv: Sequence[str] | None = None) -> int:
    """Run the subcommand named in ``argv`` and return its exit code; 2 for what the user or the system has to
    mend, shown as one line. ``--debug`` before or after the subcommand shows where it came from."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = DEBUG in argv
    argv = [a for a in argv if a != DEBUG]
    _speak_any_name()
    args = make_parser(argv).parse_args(argv)
    warnings.filterwarnings("ignore", ".*torch.jit.interface.* is deprecated", FutureWarning)  # in timm, when it is imported
    try:
        _check_names(args)
        code = int(args.run(args))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except TOLD as e:
        if debug:
            traceback.print_exc()
        print(f"nnUNetv2_cva: error: {in_options(sentence(e), args)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("nnUNetv2_cva: interrupted", file=sys.stderr)
        return 130


def _check_names(args: argparse.Namespace) -> None:
    """That what names something in nnU-Net's folders leads nowhere else.

    Raises:
        ValueError: it holds a slash or the like.
    """
    for name in NAMES:
        value = getattr(args, name, None)
        for given in value if isinstance(value, list) else [value]:
            if isinstance(given, str) and (re.search(r"[/\\\x00-\x1f]", given) or given in (".", "..") or len(given) > 200):
                shown = given if len(given) <= 60 else f"{given[:60]}..."
                raise ValueError(f"`{name}`: expected a name, found {shown!r}. Names hold no slashes and at most 200 characters.")


def _speak_any_name() -> None:
    """Names of files may hold what the terminal's encoding cannot show."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def make_parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for ``argv``: of the subcommand it begins with, else of all of them (for ``--help`` and errors)."""
    parser = argparse.ArgumentParser(
        prog="nnUNetv2_cva",
        description="Pretrain nnU-Net's own networks without labels by Consistent View Alignment.",
        epilog="Training itself is nnU-Net's: nnUNetv2_train DATASET 3d_fullres all -tr nnUNetTrainerCVA",
    )
    parser.add_argument(DEBUG, action="store_true", help="show where an error came from")
    parser.add_argument("--version", action="version", version=f"nnUNetv2_cva {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name in argv[:1] if argv and argv[0] in COMMANDS else COMMANDS:
        module = importlib.import_module(f"nnunetv2_cva.commands.{WITHIN.get(name, name)}")
        command = getattr(module, name) if name in WITHIN else module
        subparser = subparsers.add_parser(name, help=command.HELP, description=command.HELP)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run, options=options_of(subparser))
    return parser
