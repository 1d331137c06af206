"""``nnUNetv2_cva preprocess``: the planned images into nnU-Net's preprocessed format, without segmentations."""

from __future__ import annotations

import argparse

from nnunetv2_cva.commands.options import in_options, request
from nnunetv2_cva.commands.plan import PLANS, add_processes
from nnunetv2_cva.commands.progress import Bar

HELP = "Preprocess the images of a planned pretraining dataset. Can be killed and repeated."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``nnUNetv2_cva preprocess``."""
    add = parser.add_argument
    add("-d", dest="dataset", required=True, metavar="D", help="pretraining dataset")
    add("-p", dest="plans", default=PLANS, metavar="NAME", help=f"plans (default {PLANS})")
    add("-c", dest="configuration", default="3d_fullres_cva", metavar="NAME", help="configuration (default 3d_fullres_cva)")
    add("-part", type=int, default=0, metavar="I", help="for job arrays: which part of the cases, 0 to PARTS - 1")
    add("-parts", type=int, default=1, metavar="N", help="for job arrays: how many parts")
    add("--storage", choices=("float32", "float16"), default="float32", help="float16 takes half the disk")
    add_processes(parser)


def run(args: argparse.Namespace) -> int:
    """Preprocess what is missing; exit code 1 when a case failed."""
    from nnunetv2_cva.datasets.preprocessing import PreprocessRequest, preprocess_dataset

    with Bar() as bar:
        done = preprocess_dataset(request(PreprocessRequest, args), bar)
    print(in_options("\n".join(done.said), args))
    return 1 if done.failed else 0
