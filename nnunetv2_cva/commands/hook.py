"""``nnUNetv2_cva hook``: nnU-Net finds our trainers in this environment; ``nnUNetv2_cva env``: the same for one shell."""

from __future__ import annotations

import argparse

from nnunetv2_cva.installation import hook

HELP = "Make nnU-Net find our trainers in this Python environment, or undo that."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``nnUNetv2_cva hook``."""
    parser.add_argument(
        "action",
        choices=("install", "remove", "status"),
        help=f"install: write {hook.FILE_NAME} into this environment's site-packages; remove: delete it; "
        "status: exit code 0 where it is installed, 1 where it is missing or stale",
    )


def run(args: argparse.Namespace) -> int:
    """Do what ``args.action`` says; only ``status`` returns other than 0."""
    if args.action == "status":
        good, found = hook.status()
        print(found)
        return 0 if good else 1
    print("\n".join(hook.install() if args.action == "install" else hook.remove()))
    return 0


class env:  # noqa: N801  named like its command
    """``nnUNetv2_cva env``."""

    HELP = 'Print the line that does the same for one shell: eval "$(nnUNetv2_cva env)".'

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        """None."""

    @staticmethod
    def run(args: argparse.Namespace) -> int:
        """Print the export line, with what the variable holds now before our folder."""
        print(hook.export_line())
        return 0
