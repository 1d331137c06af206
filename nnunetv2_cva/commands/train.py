"""``nnUNetv2_cva train``: nnUNetv2_train for one device or many, on one machine or several."""

from __future__ import annotations

import argparse

from nnunetv2_cva.commands.options import request
from nnunetv2_cva.signals import ending_with_the_code

HELP = "Train as nnUNetv2_train does, also as one of several processes that torchrun or srun starts; finds our recipes itself."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of nnUNetv2_train."""
    parser.add_argument("dataset", help="number or name")
    parser.add_argument("configuration", help="for example 3d_fullres_cva")
    parser.add_argument("fold", help='"all", or 0 to 4')
    parser.add_argument("-tr", dest="trainer", metavar="TRAINER", default="nnUNetTrainerCVA", help="default: nnUNetTrainerCVA")
    parser.add_argument("-p", dest="plans", metavar="PLANS", default="nnUNetPlans", help="default: nnUNetPlans")
    parser.add_argument("-pretrained_weights", metavar="FILE", help="of an nnU-Net checkpoint to start from")
    parser.add_argument("-num_gpus", type=int, default=1, metavar="N", help="processes on this machine, one for each GPU")
    parser.add_argument("--npz", action="store_true", help="fine-tuning: keep the probabilities of the final validation")
    parser.add_argument("--c", dest="continue_training", action="store_true", help="continue; starts anew where nothing is saved")
    parser.add_argument("--val", action="store_true", help="only what comes after training")
    parser.add_argument("--val_best", action="store_true", help="the same with the best checkpoint")
    parser.add_argument("--disable_checkpointing", action="store_true", help="save nothing")
    parser.add_argument("-device", choices=("cuda", "cpu", "mps"), default="cuda", help="default: cuda")


def run(args: argparse.Namespace) -> int:
    """Train. Exit code 0: finished, 75: stopped by a signal or its limit of time, nothing lost, 2: refused."""
    with ending_with_the_code():
        from nnunetv2_cva.training.launch import Training, train

        return train(request(Training, args))
