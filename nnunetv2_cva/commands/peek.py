"""``nnUNetv2_cva peek``: what is in a pretraining dataset, as a table and as pictures."""

from __future__ import annotations

import argparse

from nnunetv2_cva.commands.options import in_options, request
from nnunetv2_cva.commands.plan import PLANS, positive

HELP = "Show what is in a pretraining dataset: a table, a contact sheet, and views as the network gets them."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``nnUNetv2_cva peek``."""
    add = parser.add_argument
    add("-d", dest="dataset", required=True, metavar="D", help="pretraining dataset, planned or preprocessed")
    add("-p", dest="plans", default=PLANS, metavar="NAME", help=f"plans (default {PLANS})")
    add("-c", dest="configuration", default="3d_fullres_cva", metavar="NAME", help="configuration (default 3d_fullres_cva)")
    add("-o", dest="output", metavar="FOLDER", help="where the pictures go (default: the dataset's preprocessed folder)")
    add("--cases", type=positive, default=40, metavar="N", help="cases on the contact sheet (default 40, evenly spread)")
    add("--pairs", type=positive, default=6, metavar="N", help="pairs of views (default 6)")


def run(args: argparse.Namespace) -> int:
    """Print the table; write the contact sheet, and the views once there is preprocessed data."""
    from nnunetv2_cva.peek import PeekRequest, peek

    print(in_options("\n".join(peek(request(PeekRequest, args))), args))
    return 0
