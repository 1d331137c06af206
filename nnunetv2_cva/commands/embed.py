"""``nnUNetv2_cva embed``: what a network makes of images, as vectors or as maps."""

from __future__ import annotations

import argparse

from nnunetv2_cva.commands.options import in_options, request
from nnunetv2_cva.commands.progress import Bar

HELP = "Compute the features of images: a vector for each, one per window, or maps. Can be killed and repeated."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``nnUNetv2_cva embed``."""
    add = parser.add_argument
    add_weights(parser)
    add("-i", dest="images", nargs="+", required=True, metavar="IMAGE", help="images, or folders of images")
    add("-o", dest="output", required=True, metavar="FOLDER", help="where the features go")
    add(
        "--level",
        choices=("image", "windows", "dense"),
        default="image",
        help="image (default): a vector per image, and embeddings.csv of all; windows: a vector per window of the network's "
        "view; dense: a map per tap",
    )
    add("--taps", type=int, nargs="+", metavar="N", help="which taps, 0 the finest, -1 the coarsest (default: all)")
    add(
        "--format",
        choices=("npz", "b2nd", "nifti"),
        default="npz",
        help="of dense maps: npz (default) and b2nd on the taps' own grids; nifti upsampled to the space of the image",
    )
    add("--overlap", type=float, default=0.5, metavar="SHARE", help="of neighbouring windows (default 0.5)")
    add("-part", type=int, default=0, metavar="I", help="for job arrays: which part of the images, 0 to PARTS - 1")
    add("-parts", type=int, default=1, metavar="N", help="for job arrays: how many parts")


def add_weights(parser: argparse.ArgumentParser) -> None:
    """The file of weights, and which of them."""
    parser.add_argument("weights", metavar="WEIGHTS", help="a checkpoint of nnunetv2_cva, nnU-Net or nnssl, or exported")
    parser.add_argument("--branch", choices=("student", "teacher"), default="student", help="default: student")
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Where it is computed, and whether files are trusted."""
    parser.add_argument("--trust", action="store_true", help="open files that hold more than weights; may execute code in them")
    parser.add_argument("-device", metavar="NAME", help="cpu, cuda, mps (default: cuda where there is one, else cpu)")


def run(args: argparse.Namespace) -> int:
    """Compute what is missing."""
    from nnunetv2_cva.seeing.embed_images import embed_images
    from nnunetv2_cva.seeing.requests import EmbedRequest

    with Bar() as bar:
        said = embed_images(request(EmbedRequest, args), bar)
    print(in_options("\n".join(said), args))
    return 0
