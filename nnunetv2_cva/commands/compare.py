"""``nnUNetv2_cva compare``: whether pretrained weights are worth it on one's own labelled data."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnunetv2_cva.comparing.job import Result
    from nnunetv2_cva.comparing.run import TimeLeft

HELP = "Fine-tune from pretrained weights and from scratch on few labelled cases, and say what the difference is worth."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``nnUNetv2_cva compare``."""
    parser.description = (
        f"{HELP} Both sides are trained by stock nnU-Net, on the same cases and the same batches. What is finished is kept: the "
        "same command goes on after a stop."
    )
    parser.add_argument("-d", dest="dataset", required=True, metavar="DATASET", help="labelled, planned and preprocessed")
    parser.add_argument("-c", dest="configuration", required=True, metavar="CONFIGURATION", help="for example 3d_fullres")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", metavar="PLANS", help="default: nnUNetPlans")
    parser.add_argument("-tr", dest="trainer", default="nnUNetTrainer", metavar="TRAINER", help="default: stock nnUNetTrainer")
    parser.add_argument("--weights", nargs="+", required=True, metavar="FILE", help="one or more; whatever `export` takes")
    parser.add_argument(
        "--labels", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N", help="labelled cases, default: 1 2 4 8"
    )
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="splits per number of labels, default: 5")
    parser.add_argument(
        "-f",
        dest="fold",
        type=int,
        default=0,
        help="test cases are this fold's validation cases, default: 0 (see plan --hold-out)",
    )
    parser.add_argument("--test", type=int, metavar="N", help="so many of the fold's validation cases, default: all")
    parser.add_argument("--iterations", type=int, metavar="N", help="of every training, default: as many as the trainer has")
    parser.add_argument("--points", type=int, default=5, metavar="N", help="of the learning curve, default: 5")
    parser.add_argument("-o", dest="folder", metavar="FOLDER", help="default: in nnUNet_results, beside the dataset's trainings")
    parser.add_argument("-part", dest="part", type=int, default=0, metavar="I", help="do this part of the trainings (from 0)")
    parser.add_argument("-parts", dest="parts", type=int, default=1, metavar="N", help="of so many parts")
    parser.add_argument("-np", dest="processes", type=int, default=1, metavar="N", help="trainings at a time, default: 1")
    parser.add_argument("-device", choices=("cuda", "cpu", "mps"), default="cuda", help="default: cuda")


def run(args: argparse.Namespace) -> int:
    """Train, print the table and what may be said."""
    from nnunetv2_cva.commands.options import request
    from nnunetv2_cva.commands.progress import Bar
    from nnunetv2_cva.comparing.design import CompareRequest
    from nnunetv2_cva.comparing.run import JSON, PICTURE
    from nnunetv2_cva.comparing.run import run as compare

    with Bar() as bar:
        outcome = compare(request(CompareRequest, args), print, bar, _trained)
    if outcome.table:
        print(f"\n{outcome.table}\n")
    for sentence in outcome.sentences:
        print(sentence)
    if outcome.sentences:
        print("Intervals are over splits of these labelled cases. Another pretraining with the same recipe may differ by more.")
    if outcome.unfinished:
        are = "training is" if outcome.unfinished == 1 else "trainings are"
        print(f"{outcome.unfinished} {are} not finished: this is what the others say.")
    print(f"\n{outcome.folder / JSON}\n{outcome.folder / PICTURE}")
    return 0


def _trained(result: Result, pace: TimeLeft) -> None:
    last = result.points[-1]["foreground"].values()
    known = [v for v in last if v is not None]
    dice = f"{sum(known) / len(known):.3f}" if known else "none"
    left = f", about {_time(pace.remaining)} left" if pace.finished < pace.total else ""
    print(
        f"{pace.finished} of {pace.total}: {result.task.job}: foreground Dice {dice}, {_time(result.seconds)}{left}", flush=True
    )


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
