"""``nnUNetv2_cva look``: places of one image found in others, by the trained network and by the same one untrained."""

from __future__ import annotations

import argparse

from nnunetv2_cva.commands.embed import add_weights
from nnunetv2_cva.commands.options import in_options, request
from nnunetv2_cva.commands.plan import positive
from nnunetv2_cva.commands.progress import Bar

HELP = "Show what a network has learned: points of one image found in others, features as colours, labels carried over."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``nnUNetv2_cva look``."""
    add = parser.add_argument
    add_weights(parser)
    add("-i", dest="images", nargs="+", default=[], metavar="IMAGE", help="two or more images; with --target: names of its cases")
    add("-o", dest="output", required=True, metavar="FOLDER", help="where look.png, look.html and look.json go")
    add("--points", metavar="FILE", help="CSV of points i,j,k in voxels of the first image's array (default: chosen, spread out)")
    add("--count", type=positive, default=4, metavar="N", help="how many points are chosen (default 4)")
    add(
        "--target",
        metavar="D",
        help="a labelled dataset in nnUNet_raw: errors in mm, the first case's labels carried to the others, and labels carried "
        "between random windows",
    )
    add("--against", metavar="WEIGHTS", help="a second file of weights, a row of its own")
    add("--pairs", type=positive, default=20, metavar="N", help="of random windows that labels are carried between (default 20)")


def run(args: argparse.Namespace) -> int:
    """Write picture, page and numbers; with labels print the tables, too."""
    from nnunetv2_cva.seeing.look_at import look_at
    from nnunetv2_cva.seeing.requests import LookRequest

    with Bar() as bar:
        said = look_at(request(LookRequest, args), bar)
    print(in_options("\n".join(said), args))
    return 0
