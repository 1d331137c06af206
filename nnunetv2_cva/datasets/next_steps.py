"""What to type after a plan: for pretraining, and for every fine-tuning after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nnunetv2_cva.datasets.targets import FineTuned
from nnunetv2_cva.datasets.user_changes import Recipe
from nnunetv2_cva.nnunet import PRETRAINING, dataset_argument

PLANS, CONFIGURATION = "nnUNetPlansCVA", "3d_fullres"


@dataclass(frozen=True)
class Steps:
    """Commands to type one after the other, and what for."""

    title: str
    commands: tuple[str, ...]


def next_steps(
    plans: dict[str, Any],
    configuration: str,
    recipe: Recipe,
    adopted: bool,
    targets: Sequence[FineTuned],
    written: Sequence[FineTuned],
    target_plans: str,
) -> list[Steps]:
    """Pretraining, then every target. ``adopted``: nothing is to be preprocessed; ``written``: the targets that have the same
    plans; ``target_plans``: the plans of the others."""
    name, plans_name, ours = plans["dataset_name"], plans["plans_name"], configuration + PRETRAINING
    options = "" if plans_name == PLANS else f" -p {plans_name}"
    options += "" if configuration == CONFIGURATION else f" -c {ours}"
    preprocess = () if adopted else (f"nnUNetv2_cva preprocess -d {dataset_argument(name)}{options}",)
    train = f"nnUNetv2_train {dataset_argument(name)} {ours} all -tr {recipe.name} -p {plans_name}"
    steps = [Steps("Next:", (*preprocess, train))]
    checkpoint = f"$nnUNet_results/{name}/{recipe.name}__{plans_name}__{ours}/fold_all/checkpoint_final.pth"
    channels = len(plans["foreground_intensity_properties_per_channel"])
    trainer = "" if recipe.trainer == Recipe.trainer else f" -tr {recipe.trainer}"
    for target in targets:
        number, chosen = dataset_argument(target.name), plans_name if target in written else target_plans
        commands, weights = [], checkpoint
        if target in written:
            commands.append(f"nnUNetv2_preprocess -d {number} -plans_name {chosen} -c {configuration}")
        if recipe.is_primus or target.channels != channels:
            weights = f"weights_for_{number}.pth"
            how = f"-d {number} -c {configuration} -p {chosen}{trainer} -o {weights}"
            commands.append(f"nnUNetv2_cva export {checkpoint} {how}")
        commands.append(f"nnUNetv2_train {number} {configuration} 0 -p {chosen}{trainer} -pretrained_weights {weights}")
        steps.append(Steps(f"After that, for {target.name}:", tuple(commands)))
    return steps
