"""``nnUNetv2_cva bench``: how fast a training would be on this machine, and what holds it up."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator

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
    """Measure, print the table, the bottleneck and what to do. Nothing is written where results are."""
    if not args.seconds > 0:
        raise ValueError(f"--seconds: expected a positive number, found {args.seconds:g}.")
    import torch

    from nnunetv2_cva.training.bench import advice, bench_trainer, measure, table, warnings
    from nnunetv2_cva.transfer.target import find_target
    from nnunetv2_cva.views.resources import CGROUPS, usable_cores

    target = find_target(args.d, args.c, args.p, args.tr)
    print(f"{target.label} on {args.device}: about {args.seconds:.0f} s after the start.", flush=True)
    device = torch.device(args.device)
    with (
        _threads(args.device),
        bench_trainer(target.trainer, target.plans, args.c, target.dataset_json, device) as (trainer, said),
    ):
        found = measure(trainer, args.seconds, lambda line: print(f"measuring: {line}", flush=True))
        print("\n" + "\n".join(table(found, trainer)))
        other = found.loader / found.device if found.bottleneck == "device" else found.device / found.loader
        comparison = "The loader is" if found.bottleneck == "device" else "The device would be"
        print(f"\nBottleneck: the {found.bottleneck}. {comparison} {other:.1f} times as fast. What would help:")
        for line in (*advice(found, trainer, usable_cores(os.environ, CGROUPS)), *warnings(said)):
            print(f"  {line}")
    return 0


@contextlib.contextmanager
def _threads(device: str) -> Iterator[None]:
    """As many threads as nnUNetv2_train gives torch."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1 if device == "cuda" else os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
