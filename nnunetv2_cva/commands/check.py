"""``nnUNetv2_cva check``: whether weights fit a target, and what would become of them."""

from __future__ import annotations

import argparse

from nnunetv2_cva.commands.export import add_source_arguments, add_target_arguments, advised, place_of, weights_of

HELP = "Say whether and how the weights of a file fit a target; exit code 0: they do, 1: not well, 2: an error."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``nnUNetv2_cva check``."""
    add_source_arguments(parser)
    add_target_arguments(parser, required=True)


def run(args: argparse.Namespace) -> int:
    """Print the table of ``export`` and a verdict."""
    from nnunetv2_cva.transfer.export import check

    with advised():
        found = check(weights_of(args), place_of(args))
    print("\n".join(found.lines))
    if found.refusal is not None:
        print(f"\nDoes not fit: {found.refusal}.")
        return 1
    if found.obstacle is None:
        print("\nFits: nnU-Net's -pretrained_weights takes this file as it is.")
    else:
        print(f"\nFits after `nnUNetv2_cva export`; nnU-Net's own loader would refuse the file: {found.obstacle}.")
    return 0
