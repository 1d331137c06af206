"""``nnUNetv2_cva info``: what a checkpoint is and where it comes from."""

from __future__ import annotations

import argparse
import json

HELP = "Print what a checkpoint holds: network, data, plans, settings, metrics, licence, citations."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``nnUNetv2_cva info``."""
    parser.add_argument("weights", metavar="FILE", help="a checkpoint of nnunetv2_cva, nnU-Net, nnssl or OpenMind, or exported")
    parser.add_argument("--trust", action="store_true", help="open files that hold more than weights; may execute code in them")
    parser.add_argument("--json", action="store_true", help="everything that the file states, as JSON")
    parser.add_argument("--plans", action="store_true", help="print the whole plans of the pretraining, too")


def run(args: argparse.Namespace) -> int:
    """Print one line per fact, what the file does not state left out, and what to type for the targets of its plan."""
    from nnunetv2_cva.commands.export import advised
    from nnunetv2_cva.training.about import about

    with advised():
        told = about(args.weights, args.trust)
    found = told.description
    if args.json:
        print(json.dumps(found.everything, indent=2))
        return 0
    for name, value in found.facts:
        print(f"{name:14} {value}")
    print("\n".join(told.next), end="\n" if told.next else "")
    if args.plans:
        print(json.dumps(found.plans, indent=2))
    return 0
