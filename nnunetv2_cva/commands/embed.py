"""``nnUNetv2_cva embed``: what a network makes of images, as vectors or as maps."""

from __future__ import annotations

import argparse
from pathlib import Path

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


def device_of(args: argparse.Namespace) -> str:
    """The device that was asked for, else the best there is."""
    import torch

    return str(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def run(args: argparse.Namespace) -> int:
    """Compute what is missing."""
    from nnunetv2_cva.seeing import embedding
    from nnunetv2_cva.seeing.frozen import load_frozen
    from nnunetv2_cva.seeing.images import find_images

    if not 0 <= args.part < args.parts:
        expected = f"a part from 0 to {args.parts - 1}" if args.parts > 0 else "-parts 1 or more"
        raise ValueError(f"-part {args.part} -parts {args.parts}: expected {expected}.")
    network = load_frozen(args.weights, args.branch, args.trust, device_of(args))
    images = find_images(args.images, network.channels)
    taps = None if args.taps is None else tuple(args.taps)
    wanted = embedding.Wanted(args.level, Path(args.output), taps, args.format, args.overlap)
    settle(args)
    todo = embedding.missing(images[args.part :: args.parts], wanted, network)
    with Bar() as bar:
        tick = bar.counting("Embedding", len(todo))
        for found in todo:
            embedding.embed(found, network, wanted)
            tick()
    left = embedding.missing(images, wanted, network)
    if left:
        print(f"{len(left)} of {len(images)} images are still missing: those of the other parts.")
        return 0
    if args.level == "image":
        embedding.gather(images, wanted)
        print(f"Wrote {wanted.folder / embedding.TABLE} and {embedding.VECTORS}: {len(images)} images.")
    else:
        print(f"The features of {len(images)} images are in {wanted.folder}.")
    return 0


def settle(args: argparse.Namespace) -> None:
    """Make the folder and note what it holds.

    Raises:
        ValueError: it holds features that were computed otherwise.
    """
    from nnunetv2_cva.files import read_object, write_json

    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    weights = Path(args.weights).resolve()
    now = {
        "weights": str(weights),
        "written": weights.stat().st_mtime,
        "branch": args.branch,
        "level": args.level,
        "taps": args.taps,
        "format": args.format if args.level == "dense" else None,
        "overlap": args.overlap,
    }
    path = folder / "settings.json"
    if path.is_file():
        before = read_object(path)
        changed = [k for k in now if before.get(k) != now[k]]
        if changed:
            listing = "; ".join(f"{k}: {before.get(k)}, now {now[k]}" for k in changed)
            raise ValueError(f"{folder} holds features computed otherwise ({listing}). Choose another folder (-o).")
    else:
        write_json(path, now)
