"""``nnUNetv2_cva plan``: look at the images, and write plans for pretraining on them."""

from __future__ import annotations

import argparse
import os
from typing import Any

from nnunetv2_cva.commands.options import in_options, request
from nnunetv2_cva.commands.progress import Bar

PLANS, CONFIGURATION = "nnUNetPlansCVA", "3d_fullres"  # those of the library, which takes seconds to import
HELP = "Look at images without labels and plan a pretraining on them."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``nnUNetv2_cva plan``."""
    images = parser.add_argument_group("images (default: those given before, else nnUNet_raw/DatasetXXX_Name)")
    plans = parser.add_argument_group("where the plans come from (default: nnU-Net's planner, from the images)")
    _argument(
        parser, "-d", "pretraining dataset: id, or DatasetXXX_Name for a new one", dest="dataset", metavar="D", required=True
    )
    _list(images, "--images", "FOLDER|D", "folders, searched to any depth; or datasets in nnUNet_raw, whose labels are not read")
    _argument(images, "--table", "columns path[,dataset][,subject][,modality]; splits are by subject", metavar="CSV")
    _list(images, "--exclude", "PATTERN", "leave out files like '*_seg.nii.gz'")
    _argument(
        images,
        "--channels",
        "files _0000, _0001 of a case: a case each (split, the default), or channels of one case (stack)",
        choices=("split", "stack"),
    )
    _list(images, "--modality", "NAME", "one per channel; CT is normalised as CT, other names by z-score (or as nnU-Net says)")
    _list(images, "--adopt", "FOLDER|D", "use data where it lies: nnssl's folders, or datasets that nnU-Net has preprocessed")
    _argument(images, "--anonymous", "names of cases that say nothing of the patient, and a key file", action="store_true")
    _argument(images, "--headers-only", "with --adopt: do not read the voxels (NaN, duplicates)", action="store_true")
    _list(plans, "--target", "D", "datasets that will be fine-tuned; the first one's plans are used")
    _argument(plans, "--target-plans", "which plans of theirs (default nnUNetPlans)", metavar="NAME", default="nnUNetPlans")
    _argument(plans, "--preset", "shipped plans; they are written into the --target datasets, too", metavar="NAME")
    _argument(plans, "--keep-plans", "leave the plans as they are, only write them into --target", action="store_true")
    _argument(plans, "-pl", "nnU-Net's planner (default nnUNetPlannerResEncL)", dest="planner", metavar="PLANNER")
    _argument(plans, "-c", "configuration to pretrain for", dest="configuration", metavar="NAME", default=CONFIGURATION)
    _argument(parser, "-p", f"name of the plans to write (default {PLANS})", dest="plans", metavar="NAME", default=PLANS)
    _argument(parser, "--view", "voxels of a view (default: proposed)", nargs=3, type=int, metavar="N")
    _argument(parser, "--batch-size", "cases per step (default: the paper's 4)", type=int, metavar="N")
    _argument(parser, "--gpu-memory", "card to plan for (default: the one here, or the planner's)", type=float, metavar="GB")
    _argument(parser, "--hold-out", "leave out the targets' validation images of this fold", type=int, metavar="FOLD")
    add_processes(parser)


def add_processes(parser: argparse.ArgumentParser) -> None:
    """``-np``, with nnU-Net's own default."""
    default = os.environ.get("nnUNet_def_n_proc", "8")
    about = f"processes (default {default}, of nnUNet_def_n_proc if that is set)"
    _argument(parser, "-np", about, dest="processes", type=positive, metavar="N", default=default)


def positive(text: str) -> int:
    """For argparse: a number of things."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, found {text!r}")
    return int(text)


def _argument(parser: Any, flag: str, help: str, **options: Any) -> None:  # noqa: A002
    parser.add_argument(flag, help=help, **options)


def _list(parser: Any, flag: str, metavar: str, help: str) -> None:  # noqa: A002
    parser.add_argument(flag, help=help, metavar=metavar, nargs="+", default=[])


def run(args: argparse.Namespace) -> int:
    """Look, plan, write, and say what to type next."""
    from nnunetv2_cva.plan import PlanRequest, plan

    with Bar() as bar:
        planned = plan(request(PlanRequest, args), bar)
    print(in_options("\n".join(planned.said), args))
    for steps in planned.steps:
        print("\n".join((steps.title, *(f"  {command}" for command in steps.commands))))
    return 0
