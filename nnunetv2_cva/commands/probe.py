"""``nnUNetv2_cva probe``: what a simple classifier finds in the features of files of weights, beside the untrained network."""

from __future__ import annotations

import argparse

from nnunetv2_cva.commands.embed import add_device
from nnunetv2_cva.commands.options import in_options, request
from nnunetv2_cva.commands.plan import positive
from nnunetv2_cva.commands.progress import Bar

HELP = "Score frozen features: of voxels of a labelled dataset, or of whole images. The untrained network is always among them."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``nnUNetv2_cva probe``."""
    add = parser.add_argument
    add("weights", nargs="+", metavar="WEIGHTS", help="files of weights; images are preprocessed as the first one's plans say")
    add("-o", dest="output", required=True, metavar="FOLDER", help="where probe.csv and probe.png go")
    add("-d", dest="dataset", metavar="D", help="voxels: a labelled dataset in nnUNet_raw")
    add("--labelled", type=positive, default=4, metavar="N", help="voxels: cases that the classifiers are fitted to (default 4)")
    add(
        "--csv",
        metavar="FILE",
        help="images: a table with the columns path, label and optionally subject; of several channels, path is any of the files",
    )
    add("--seeds", type=positive, default=5, metavar="N", help="voxels: repetitions with other cases and windows (default 5)")
    add("--folds", type=positive, default=5, metavar="N", help="images: folds of the cross-validation (default 5)")
    add("--branch", choices=("student", "teacher"), default="student", help="default: student")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Print the table; write it and the plot."""
    from nnunetv2_cva.seeing.probe_weights import probe_weights
    from nnunetv2_cva.seeing.requests import ProbeRequest

    with Bar() as bar:
        said = probe_weights(request(ProbeRequest, args), bar)
    print(in_options("\n".join(said), args))
    return 0
