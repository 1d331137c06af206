"""``nnUNetv2_cva bench``: how fast a training would be on this machine, and what holds it up."""

from __future__ import annotations

import argparse

HELP = "Measure how fast a training would be here: loader, device, both; say what holds it up and what to set."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``nnUNetv2_cva bench``, named as nnUNetv2_train names them."""
    parser.add_argument("-d", metavar="DATASET", required=True, help="number or name")
    parser.add_argument("-c", metavar="CONFIGURATION", required=True, help="for example 3d_fullres_cva")
    parser.add_argument("-p", metavar="PLANS", default="nnUNetPlans", help="default: nnUNetPlans")
    parser.add_argument("-tr", metavar="TRAINER", default="nnUNetTrainerCVA", help="default: nnUNetTrainerCVA")
    parser.add_argument("-device", choices=("cuda", "cpu", "mps"), default="cuda", help="default: cuda")
    parser.add_argument("--seconds", type=float, default=100.0, help="how long to measure (default: 100); starting comes on top")


def run(args: argparse.Namespace) -> int:
    """Print the table, the bottleneck and what to do. Nothing is written where results are."""
    if not args.seconds > 0:
        raise ValueError(f"--seconds: expected a positive number, found {args.seconds:g}.")
    from nnunetv2_cva.training.bench import bench

    for line in bench(args.d, args.c, args.p, args.tr, args.device, args.seconds, lambda text: print(text, flush=True)):
        print(line)
    return 0
