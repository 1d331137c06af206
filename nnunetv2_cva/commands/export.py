"""``nnUNetv2_cva export``: a weights file that fits a target by construction."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from nnunetv2_cva.transfer.adapt import Transfer
    from nnunetv2_cva.transfer.read import Source
    from nnunetv2_cva.transfer.target import Target

PLANS, TRAINER = "nnUNetPlans", "nnUNetTrainer"
HELP = "Write the weights of any checkpoint so that they fit a target of nnU-Net (or in the nnssl format)."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``nnUNetv2_cva export``."""
    add_source_arguments(parser)
    add_target_arguments(parser, required=False)
    parser.add_argument("-o", metavar="FILE", required=True, help="the file to write")
    parser.add_argument(
        "--format",
        choices=("nnunet", "nnssl"),
        default="nnunet",
        help="nnunet: for nnUNetv2_train -pretrained_weights (default); nnssl: as OpenMind and the SSL3D challenge "
        "exchange weights, for the network of the pretraining itself (no -d, -c, -p, -tr)",
    )
    parser.add_argument("--allow-partial", action="store_true", help="write even when much of the encoder stays random")
    parser.add_argument("--dry-run", action="store_true", help="print the table, write nothing")
    parser.add_argument("--licence", metavar="TEXT", help="licence of the weights, kept in the file, for example CC-BY-4.0")


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """What says where the weights come from and which of them are wanted."""
    parser.add_argument("weights", metavar="CHECKPOINT", help="of nnunetv2_cva, nnU-Net, nnssl or OpenMind, or exported before")
    parser.add_argument(
        "--branch",
        choices=("student", "teacher"),
        default="student",
        help="student (default): what -pretrained_weights reads from the same file and what the decoder was trained with; "
        "teacher: its moving average, encoder only",
    )
    parser.add_argument(
        "--decoder",
        choices=("keep", "fresh"),
        help="default: keep where it was trained (a U-Net by reconstruction or segmentation: it already fits the encoder), "
        "fresh where it was not (pretraining trains a decoder of its own beside a Primus). The output layer is always the "
        "target's own",
    )
    parser.add_argument("--source-patch-size", type=int, nargs=3, metavar="N", help="of a Primus whose file does not state it")
    parser.add_argument("--trust", action="store_true", help="open files that hold more than weights; may execute code in them")


def add_target_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    """nnU-Net's names for dataset, configuration, plans and trainer."""
    parser.add_argument("-d", metavar="DATASET", required=required, help="target dataset, number or name")
    parser.add_argument("-c", metavar="CONFIGURATION", required=required, help="for example 3d_fullres")
    parser.add_argument("-p", metavar="PLANS", help=f"plans of the target (default: {PLANS})")
    parser.add_argument("-tr", metavar="TRAINER", help=f"trainer of the target (default: {TRAINER})")


def run(args: argparse.Namespace) -> int:
    """Print the table, write the file, check it; nothing is written when anything is wrong."""
    from nnunetv2_cva.transfer.read import read
    from nnunetv2_cva.transfer.saving import check_writable

    if args.format == "nnssl":
        _refuse_target(args)
    elif args.d is None or args.c is None:
        raise ValueError("-d and -c are needed: the file is made for a target. Only --format nnssl has none.")
    source = read(args.weights, args.branch, args.trust)
    check_writable(args.o, source.path)  # before the target, whose trainer is looked up for 10 s
    return _export_nnssl(args, source) if args.format == "nnssl" else _export_nnunet(args, source)


def _export_nnunet(args: argparse.Namespace, source: Source) -> int:
    target = describe(args, source)
    network, transfer, hint = matched(args, source, target)
    reason = transfer.refusal()
    if reason is not None and not args.allow_partial:
        raise ValueError(f"{reason}. {f'{hint}. ' if hint else ''}Nothing was written; --allow-partial writes it all the same.")
    if args.dry_run:
        print(f"\nDry run: {args.o} was not written.")
        return 0
    from nnunetv2_cva.transfer.adapt import fill
    from nnunetv2_cva.transfer.write import write_for_nnunet

    fill(network, transfer)
    write_for_nnunet(args.o, network, transfer, target, args.licence)
    trainer = "" if args.tr in (None, TRAINER) else f" -tr {args.tr}"
    print(f"\nWrote {args.o}; nnU-Net's loader takes it and every tensor is the same under every name. To use it:")
    print(f"nnUNetv2_train {args.d} {args.c} FOLD -p {args.p or PLANS}{trainer} -pretrained_weights {args.o}")
    return 0


def describe(args: argparse.Namespace, source: Source) -> Target:
    """Find the target, and print which weights go where."""
    from nnunetv2_cva.transfer.target import find_target

    target = find_target(args.d, args.c, args.p or PLANS, args.tr or TRAINER)
    print(f"Weights: {source.path} ({source.kind}, {source.layout})")
    print(f"Target:  {target.label}\n")
    return target


def matched(args: argparse.Namespace, source: Source, target: Target) -> tuple[nn.Module, Transfer, str | None]:
    """The target's network, the transfer, and what to run where the plans differ; printed with what differs between the data."""
    from nnunetv2_cva.transfer.adapt import match
    from nnunetv2_cva.transfer.hints import same_plans
    from nnunetv2_cva.transfer.table import data_warnings, table

    network = target.build()
    view = tuple(args.source_patch_size) if args.source_patch_size else None
    transfer = match(source, network, target.view, args.decoder, view)
    hint = same_plans(transfer, target)
    print("\n".join([*table(transfer), *([f"Note: {hint}."] if hint else [])]))
    for warning in data_warnings(source.card, target.settings, target.dataset_json):
        print(f"Warning: {warning}.")
    return network, transfer, hint


def _refuse_target(args: argparse.Namespace) -> None:
    """Raise ValueError for options that say something about a target."""
    options = {
        "-d": args.d,
        "-c": args.c,
        "-p": args.p,
        "-tr": args.tr,
        "--source-patch-size": args.source_patch_size,
        "--allow-partial": args.allow_partial or None,
    }
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(
            f"--format nnssl describes the pretraining itself, not a target: leave out {', '.join(given)}. Its consumers adapt "
            "the weights to their targets."
        )


def _export_nnssl(args: argparse.Namespace, source: Source) -> int:
    from nnunetv2_cva.transfer.nnssl import adaptation_plan, filled_with_itself, own_target, write_for_nnssl
    from nnunetv2_cva.transfer.table import table

    target = own_target(source)
    network, transfer = filled_with_itself(source, target, args.decoder)
    print(f"Weights: {source.path} ({source.kind}, {source.layout})")
    print(f"Network: {target.label}\n")
    print("\n".join(table(transfer)))
    plan = adaptation_plan(network, target, transfer.target.channels)
    if args.dry_run:
        print(f"\nDry run: {args.o} was not written.")
        return 0
    write_for_nnssl(args.o, network, transfer, target, args.licence)
    print(f"\nWrote {args.o} as {plan['architecture_plans']['arch_class_name']}; it opens with weights_only=True, and encoder")
    print(f"({plan['key_to_encoder']}) and stem ({plan['key_to_stem']}) load strictly.")
    return 0
