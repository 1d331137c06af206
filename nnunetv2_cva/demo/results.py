"""What the demo found, in words: tables in plain text, what they mean, and what to type next."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from nnunetv2_cva.demo.pipeline import Size
from nnunetv2_cva.demo.workspace import CONFIGURATION, RECIPE, Workspace

WIDTH = 120
MEANINGS = {
    "position": "the label at the same place of the other window: what needs no image",
    "intensity": "the label of the voxels with the most similar intensities",
    "untrained": "the most similar features of the same network with random weights",
    "pretrained": "the most similar features after the pretraining",
}


def carried_table(found: Mapping[str, Sequence[float]], windows: int) -> str:
    """Dice of labels carried over, ``row: (mean, half of its 95 % interval)``."""
    lines = [f"Labels of one case carried to another, Dice over {windows} random windows of test cases (95 % interval):"]
    for row, meaning in MEANINGS.items():
        mean, half = found[row]
        lines.append(f"  {row:<12}{mean:.3f} +- {half:.3f}   {meaning}")
    return "\n".join(lines)


def compared(table: str, sentences: Sequence[str], size: Size) -> str:
    """From scratch and from the weights, and what may be said about it."""
    head = f"Fine-tuned by stock nnU-Net for {size.fine_tuning} iterations on {size.labels} labelled cases, {size.splits} splits:"
    return "\n".join((head, textwrap.indent(table, "  "), "", *(textwrap.fill(s, WIDTH) for s in sentences)))


def caveats(seed: int) -> str:
    """What such a run can and cannot say."""
    return f"""\
What this says: everything between images and a fine-tuned nnU-Net works on this machine, and what this network has learned.
What it does not say: what pretraining gains on your data. The images are synthetic, this is one pretraining (seed {seed}), and
all trainings are some hundred times shorter than in earnest. On your data, `nnUNetv2_cva compare` says it."""


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
