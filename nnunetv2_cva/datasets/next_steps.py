"""What to type after a plan: for pretraining, and for every fine-tuning after it. Read from what the plan has written, so that
``plan``, the end of a training and ``info`` say the same."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_cva.datasets.inventory import CASES
from nnunetv2_cva.datasets.targets import FineTuned, load_target
from nnunetv2_cva.datasets.user_changes import Recipe, recipe_of, targets_of
from nnunetv2_cva.files import read_object
from nnunetv2_cva.nnunet import PREPROCESSED, PRETRAINING, RAW, configuration, dataset_argument, fine_tuned
from nnunetv2_cva.nnunet import folder as nnunet_folder

PLANS, CONFIGURATION = "nnUNetPlansCVA", "3d_fullres"
NO_GPU = "torch finds no CUDA GPU here. Add -device cpu (or mps on a Mac), which is enough to try things out, not to pretrain."


@dataclass(frozen=True)
class Steps:
    """Commands to type one after the other, and what for."""

    title: str
    commands: tuple[str, ...]


def pretraining_steps(folder: Path, plans_name: str, name: str) -> list[Steps]:
    """For the pretraining of a planned dataset, in its preprocessed ``folder``, with the configuration ``name``.

    Raises:
        ValueError: no such plans.
    """
    dataset, plans = dataset_argument(folder.name), shlex.quote(plans_name)
    options = "" if plans_name == PLANS else f" -p {plans}"
    options += "" if name == CONFIGURATION + PRETRAINING else f" -c {shlex.quote(name)}"
    preprocess = f"nnUNetv2_cva preprocess -d {dataset}{options}"
    train = f"nnUNetv2_train {dataset} {shlex.quote(name)} all -tr {recipe_of(folder, plans_name).name} -p {plans}{device()}"
    return [Steps("Next:", (*((preprocess,) if (folder / CASES).is_file() else ()), train))]


def fine_tuning_steps(folder: Path, plans_name: str, name: str, checkpoint: str | Path | None = None) -> list[Steps]:
    """For every dataset that these plans were made for: preprocessing where it is missing, a file of weights where the target
    needs one of its own, fine-tuning, prediction.

    ``checkpoint``: of the pretraining; by default where it will be.

    Raises:
        ValueError: no such plans.
    """
    plans = read_object(folder / f"{plans_name}.json")
    recipe, tuned = recipe_of(folder, plans_name), fine_tuned(plans, name)
    channels = len(read_object(folder / "dataset.json")["channel_names"])
    place = f"{folder.name}/{recipe.name}__{plans_name}__{name}/fold_all/checkpoint_final.pth"
    weights = _below("nnUNet_results", place) if checkpoint is None else shlex.quote(str(checkpoint))
    steps = []
    for dataset, its_plans in targets_of(folder, plans_name):
        try:
            target = load_target(dataset, its_plans)
        except ValueError as e:
            steps.append(Steps(f"After that, for {dataset}: {e}", ()))
            continue
        commands = _for_target(target, its_plans, tuned, recipe, channels, weights)
        steps.append(Steps(f"After that, for {dataset}:", tuple(commands)))
    return steps


def _for_target(target: FineTuned, plans_name: str, name: str, recipe: Recipe, channels: int, weights: str) -> list[str]:
    number, plans, chosen = dataset_argument(target.name), shlex.quote(plans_name), shlex.quote(name)
    trainer = "" if recipe.trainer == Recipe.trainer else f" -tr {recipe.trainer}"
    commands = []
    if not _preprocessed(target, name):
        commands.append(f"nnUNetv2_preprocess -d {number} -plans_name {plans} -c {chosen}")
    if recipe.is_primus or target.channels != channels:
        file = f"weights_for_{number}.pth"
        commands.append(f"nnUNetv2_cva export {weights} -d {number} -c {chosen} -p {plans}{trainer} -o {file}")
        weights = file
    commands.append(f"nnUNetv2_train {number} {chosen} 0 -p {plans}{trainer} -pretrained_weights {weights}{device()}")
    raw = Path(os.environ.get(RAW, RAW)) / target.name
    unlabelled = any((raw / "imagesTs").glob("[!.]*"))  # converters leave the folder empty where there are none
    images = _below(RAW, f"{target.name}/{'imagesTs' if unlabelled else 'imagesTr'}")
    predict = f"nnUNetv2_predict -i {images} -o predictions_{number} -d {number} -c {chosen} -p {plans}{trainer} -f 0"
    return [*commands, f"{predict}{device()}"]


def _preprocessed(target: FineTuned, name: str) -> bool:
    """Whether the target's images have been preprocessed for this configuration of its plans."""
    data = nnunet_folder(PREPROCESSED) / target.name / configuration(target.plans, name)["data_identifier"]
    if not data.is_dir():
        return False
    with os.scandir(data) as entries:
        return any(e.name.endswith((".b2nd", ".npz", ".npy")) for e in entries)


def device() -> str:
    """What nnU-Net's commands need here that they do not find out themselves."""
    import torch

    if torch.cuda.is_available():
        return ""
    return " -device mps" if torch.backends.mps.is_available() else " -device cpu"


def _below(variable: str, path: str) -> str:
    """A path in one of nnU-Net's folders, whose own path may hold spaces."""
    escaped = "".join(f"\\{c}" if c in '\\"$`' else c for c in path)
    return f'"${variable}/{escaped}"'
