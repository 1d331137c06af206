"""``nnUNetv2_cva preprocess``: the planned images into nnU-Net's preprocessed format, without segmentations."""

from __future__ import annotations

import argparse

from nnunetv2_cva.commands.gather import dataset_of, preprocessed_folder, read_plans
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
    from nnunetv2_cva.datasets import preprocessed
    from nnunetv2_cva.datasets.inventory import CASES, REJECTED, read_accepted
    from nnunetv2_cva.datasets.plan import resolved
    from nnunetv2_cva.datasets.preprocess import preprocess
    from nnunetv2_cva.views.index import INDEX

    if not 0 <= args.part < args.parts:
        expected = f"a part from 0 to {args.parts - 1}" if args.parts > 0 else "-parts 1 or more"
        raise ValueError(f"-part {args.part} -parts {args.parts}: expected {expected}.")
    folder = preprocessed_folder() / dataset_of(args.dataset)
    plans = read_plans(folder, args.plans)
    resolved(plans, args.configuration)
    target = preprocessed.Target(folder, plans, args.configuration, args.storage)
    if not (folder / CASES).is_file() and (target.folder / INDEX).is_file():
        print(f"{folder.name} uses preprocessed data where it lies: nothing to do.")
        return 0
    cases = read_accepted(folder)
    part = cases[args.part :: args.parts]
    preprocessed.prepare(target, cases)
    todo = preprocessed.missing(target, part)
    if todo:
        size = preprocessed.needed_bytes(target, todo) / 2**30
        print(f"{len(todo)} of {len(part)} cases are to be preprocessed into {target.folder}, about {size:.2g} GB.")
    with Bar("Preprocessing") as bar:
        bar.start(len(todo))
        preprocess(target, todo, args.processes, bar.tick)
    done = preprocessed.finish(target)
    if done is None:
        print(f"{len(preprocessed.missing(target, cases))} of {len(cases)} cases are still missing: those of the other parts.")
        return 0
    print(f"{done.ready} cases are ready in {target.folder}.")
    if done.splits_kept:
        print(f"WARNING: your splits_final.json had other cases. New ones were written; yours are kept in {done.splits_kept}.")
    if done.failed:
        print(f"{done.failed} cases could not be preprocessed; {folder / REJECTED} has the reasons.")
    return 1 if done.failed else 0
