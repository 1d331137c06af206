"""What the demo found, in words: tables in plain text, what they mean, and what to type next."""

from __future__ import annotations

from typing import Any

import numpy as np

from nnunetv2_cva.demo.workspace import CONFIGURATION, DATASET, DATASET_ID, PLANS, PRETRAINED, RECIPE, SCRATCH, Workspace
from nnunetv2_cva.training.metrics import METRICS

SHOWN = ("alignment", "retrieval", "feature_alignment", "feature_retrieval", "effective_rank")


def dice_table(dice: dict[str, dict[str, list[float]]]) -> str:
    """Mean Dice per structure from scratch and pretrained, and in how many cases the mean over structures is better."""
    scratch, pretrained = (np.array(list(dice[run].values())) for run in (SCRATCH, PRETRAINED))  # (structures, cases)
    lines = [f"{'Dice':<10}{'from scratch':>14}{'pretrained':>12}{'difference':>12}"]
    for name, a, b in zip((*dice[SCRATCH], "mean"), _means(scratch), _means(pretrained), strict=True):
        lines.append(f"{name:<10}{a:>14.3f}{b:>12.3f}{b - a:>+12.3f}")
    gains = pretrained.mean(0) - scratch.mean(0)
    lines.append(f"Pretrained is better in {(gains > 0).sum()} of {len(gains)} test cases (mean over structures).")
    return "\n".join(lines)


def _means(values: np.ndarray) -> np.ndarray:
    """Mean of every structure, and of all."""
    per_structure = values.mean(1)
    return np.append(per_structure, per_structure.mean())


def features_table(before: dict[str, float], after: dict[str, float]) -> str:
    """The metrics of the watched pairs before and after the pretraining."""
    shown = {key: METRICS[key].meaning for key in SHOWN if key in after}
    lines = [f"{'Features':<20}{'before':>9}{'after':>9}   pretraining, on cases that it was not trained on"]
    lines += [f"{key:<20}{before[key]:>9.3f}{after[key]:>9.3f}   {text}" for key, text in shown.items()]
    return "\n".join(lines)


def caveats(test: int, seed: int) -> str:
    """What such a run can and cannot say."""
    return f"""\
What this says: everything between images and a fine-tuned nnU-Net works on this machine.
What it does not say: how much pretraining will gain on your data. This is one seed ({seed}), {test} test cases from the
generator that also made the pretraining images, and training some hundred times shorter than in earnest: which small
structures have been told apart by then decides, and one that is not counts 0. Four such comparisons with the same data
were 0.26, 0.20 and 0.02 worse and 0.06 better than from scratch: at this budget, on these images, pretraining does not
pay. Repeat with another seed and longer training before you read more into it."""


def predict_command() -> str:
    """What a user types to segment the test cases."""
    task = f"-d {DATASET_ID} -c {CONFIGURATION} -f 0 -p {PLANS}"
    return f"nnUNetv2_predict {task} -i demo_raw/{DATASET}/imagesTs -o FOLDER --disable_tta"


def by_hand(workspace: Workspace) -> str:
    """What to set to repeat the commands that were shown, and what to type for other data."""
    plans = "nnUNetResEncUNetLPlans"
    weights = f"$nnUNet_results/DATASET/{RECIPE}__{plans}__{CONFIGURATION}/fold_all/checkpoint_final.pth"
    return f"""\
To repeat one of the commands above by hand:
  cd {workspace.folder}
  export nnUNet_raw=$PWD/{workspace.raw.name} nnUNet_preprocessed=$PWD/{workspace.preprocessed.name}
  export nnUNet_results=$PWD/demo_results/by_hand

The same on your own data (DATASET: its full name, such as Dataset004_Hippocampus, in nnU-Net's raw format):
  nnUNetv2_cva hook install      # once: nnU-Net finds our trainers
  nnUNetv2_plan_and_preprocess -d DATASET -c {CONFIGURATION} -pl nnUNetPlannerResEncL
  nnUNetv2_train DATASET {CONFIGURATION} all -p {plans} -tr {RECIPE}
  nnUNetv2_train DATASET {CONFIGURATION} 0 -p {plans} -pretrained_weights {weights}"""


def summary(numbers: dict[str, Any], seconds: dict[str, float]) -> str:
    """Both tables and how long everything took."""
    times = ", ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items())
    tables = (dice_table(numbers["dice"]), features_table(numbers["untrained"], numbers["pretrained"]))
    return "\n\n".join((*tables, f"Time: {sum(seconds.values()) / 60:.1f} minutes ({times})."))
