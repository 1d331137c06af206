"""``nnUNetv2_cva export``: a weights file that fits a target by construction."""

from __future__ import annotations

import argparse
import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnunetv2_cva.transfer.export import Place, Weights

PLANS, TRAINER = "nnUNetPlans", "nnUNetTrainer"
ADVICE = {
    "trust": "If you trust where the file comes from, pass --trust.",
    "source_view": "Pass it, for example --source-patch-size 128 160 96.",
}
HELP = "Write the weights of any checkpoint so that they fit a target of nnU-Net (or in the nnssl format)."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``nnUNetv2_cva export``."""
    add_source_arguments(parser)
    add_target_arguments(parser, required=False)
    written = parser.add_mutually_exclusive_group(required=True)
    written.add_argument("-o", metavar="FILE", help="the file to write, or the name of the plans")
    written.add_argument(
        "--hub-folder",
        metavar="FOLDER",
        help="write what one uploads to the Hugging Face hub: weights of the pretraining itself, plans, model card (no -d, -c, "
        "-p, -tr)",
    )
    parser.add_argument(
        "--format",
        choices=("nnunet", "nnssl", "plans"),
        default="nnunet",
        help="nnunet: for nnUNetv2_train -pretrained_weights (default); nnssl: as OpenMind and the SSL3D challenge "
        "exchange weights, for the network of the pretraining itself (no -d, -c, -p, -tr); plans: plans for the target with "
        "the network of the file, named by -o",
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
    if args.hub_folder or args.format == "nnssl":
        _refuse_target(args)
    elif args.d is None or args.c is None:
        raise ValueError("-d and -c are needed: what is written is made for a target. Only --format nnssl has none.")
    from nnunetv2_cva.transfer.export import Output, export

    output = Output(args.hub_folder or args.o, args.allow_partial, args.dry_run, args.licence)
    with advised():
        place = None if args.hub_folder or args.format == "nnssl" else place_of(args)
        found = export("hub" if args.hub_folder else args.format, weights_of(args), place, output)
    print("\n".join(found.lines))
    if found.refusal is not None:
        raise ValueError(f"{found.refusal} Nothing was written; --allow-partial writes it all the same.")
    if not found.written:
        print(f"\nDry run: {output.file} was not written.")
    elif args.hub_folder:
        print(f"\nWrote {args.hub_folder}; both files of weights come back the same. Read README.md, then upload it:")
        print(f"hf upload ORGANISATION/{Path(args.hub_folder).name} {args.hub_folder}")
    elif found.configuration is not None:
        print(f"\nWrote plans {args.o}. Preprocess with them, then use -p {args.o} -c {found.configuration}:")
        print(f"nnUNetv2_preprocess -d {args.d} -plans_name {args.o} -c {found.configuration}")
    elif found.plan is not None:
        name = found.plan["architecture_plans"]["arch_class_name"]
        print(f"\nWrote {args.o} as {name}; it opens with weights_only=True, and encoder")
        print(f"({found.plan['key_to_encoder']}) and stem ({found.plan['key_to_stem']}) load strictly.")
    else:
        trainer = "" if args.tr in (None, TRAINER) else f" -tr {args.tr}"
        print(f"\nWrote {args.o}; nnU-Net's loader takes it and every tensor is the same under every name. To use it:")
        where = f"{shlex.quote(args.d)} {shlex.quote(args.c)} FOLD -p {shlex.quote(args.p or PLANS)}{trainer}"
        print(f"nnUNetv2_train {where} -pretrained_weights {shlex.quote(args.o)}")
    return 0


def weights_of(args: argparse.Namespace) -> Weights:
    """What ``add_source_arguments`` has asked for."""
    from nnunetv2_cva.transfer.export import Weights

    return Weights(args.weights, args.branch, args.decoder, args.trust)


def place_of(args: argparse.Namespace) -> Place:
    """What ``add_target_arguments`` has asked for."""
    from nnunetv2_cva.transfer.export import Place

    view = tuple(args.source_patch_size) if args.source_patch_size else None
    return Place(args.d, args.c, args.p or PLANS, args.tr or TRAINER, view)


@contextlib.contextmanager
def advised() -> Iterator[None]:
    """Errors that an option would avoid say which one."""
    from nnunetv2_cva.transfer.weights import NeedsOption

    try:
        yield
    except NeedsOption as e:
        raise ValueError(f"{e} {ADVICE[e.option]}") from None


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
        what = "--hub-folder" if args.hub_folder else "--format nnssl"
        raise ValueError(
            f"{what} describes the pretraining itself, not a target: leave out {', '.join(given)}. Its consumers adapt "
            "the weights to their targets."
        )
