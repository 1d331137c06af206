"""What follows a plan: the same plans in the targets, and what to type for pretraining and fine-tuning."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2_cva.commands.holdout import comparing_voxels, warn_or_leave_out

if TYPE_CHECKING:
    from nnunetv2_cva.datasets.targets import FineTuned
    from nnunetv2_cva.datasets.written import Recipe

PLANS, CONFIGURATION = "nnUNetPlansCVA", "3d_fullres"
STOCK = "nnUNetTrainer"


def by(numbers: Any) -> str:
    """Numbers as ``160x160x160``."""
    return "x".join(f"{n:.4g}" for n in numbers)


def checked_for_targets(
    args: argparse.Namespace, plans: dict[str, Any], targets: Sequence[FineTuned]
) -> list[tuple[FineTuned, dict[str, Any]]]:
    """The fixed plans for every target that needs them. Raises ValueError where one has other plans of this name."""
    from nnunetv2_cva.datasets.targets import check_fixed_plans, fixed_plans

    fixed = [(target, fixed_plans(plans, args.configuration, target, args.configuration)) for target in targets]
    for target, theirs in fixed:
        check_fixed_plans(theirs, target)
    return fixed


def write_into_targets(args: argparse.Namespace, fixed: Sequence[tuple[FineTuned, dict[str, Any]]]) -> None:
    """The fixed plans into the targets that need them."""
    from nnunetv2_cva.datasets.plan import resolved
    from nnunetv2_cva.datasets.targets import write_fixed_plans

    for target, plans in fixed:
        path = write_fixed_plans(plans, target)
        print(f"Wrote the same network and spacing, with {target.name}'s own normalisation, into {path}.")
        spacing = resolved(plans, args.configuration)["spacing"]
        own = resolved(target.plans, args.configuration)["spacing"]
        if any(not 0.5 <= a / b <= 2 for a, b in zip(spacing, own)):
            print(f"NOTE: {target.name} by itself is planned at {by(own)} mm, these plans at {by(spacing)} mm.")


def warn_of_kept(args: argparse.Namespace, plans: dict[str, Any], folder: Path, targets: Sequence[FineTuned]) -> None:
    """Warn where later targets validate on images that the kept plans' dataset holds."""
    from nnunetv2_cva.datasets.heldout import by_name
    from nnunetv2_cva.datasets.inspect import Finding
    from nnunetv2_cva.datasets.inventory import CASES, Inventory, read_accepted
    from nnunetv2_cva.datasets.plan import resolved
    from nnunetv2_cva.views.index import read_index

    if (folder / CASES).is_file():
        warn_or_leave_out(targets, None, comparing_voxels(read_accepted(folder), folder, args.processes))
        return
    index = read_index(folder / resolved(plans, args.configuration)["data_identifier"])
    if index is None:
        raise ValueError(f"{folder} holds no list of cases. Run `nnUNetv2_cva plan -d {folder.name}` without --keep-plans first.")
    found = [Finding(str(key), (), index.datasets[code], "", "", ()) for key, code in zip(index.keys, index.dataset_of)]
    warn_or_leave_out(targets, None, lambda target: by_name(target, Inventory(tuple(found), ())))


def say_next(
    args: argparse.Namespace,
    plans: dict[str, Any],
    recipe: Recipe,
    adopted: bool,
    written: Sequence[FineTuned],
    targets: Sequence[FineTuned],
) -> None:
    """What to type for the pretraining and for every fine-tuning after it. ``written``: the targets that have the same plans."""
    from nnunetv2_cva.nnunet import PRETRAINING

    name, configuration = plans["dataset_name"], args.configuration + PRETRAINING
    options = "" if args.plans == PLANS else f" -p {args.plans}"
    options += "" if args.configuration == CONFIGURATION else f" -c {configuration}"
    print("Next:")
    if not adopted:
        print(f"  nnUNetv2_cva preprocess -d {int(name[7:10])}{options}")
    print(f"  nnUNetv2_train {int(name[7:10])} {configuration} all -tr {recipe.name} -p {args.plans}")
    checkpoint = f"$nnUNet_results/{name}/{recipe.name}__{args.plans}__{configuration}/fold_all/checkpoint_final.pth"
    channels = len(plans["foreground_intensity_properties_per_channel"])
    trainer = "" if recipe.trainer == STOCK else f" -tr {recipe.trainer}"
    for target in targets:
        number, chosen = int(target.name[7:10]), args.plans if target in written else args.target_plans
        print(f"After that, for {target.name}:")
        if target in written:
            print(f"  nnUNetv2_preprocess -d {number} -plans_name {chosen} -c {args.configuration}")
        weights = checkpoint
        if recipe.is_primus or target.channels != channels:
            weights = f"weights_for_{number}.pth"
            how = f"-d {number} -c {args.configuration} -p {chosen}{trainer} -o {weights}"
            print(f"  nnUNetv2_cva export {checkpoint} {how}")
        print(f"  nnUNetv2_train {number} {args.configuration} 0 -p {chosen}{trainer} -pretrained_weights {weights}")
