"""The nine objectives side by side: one small U-Net and one small Primus, same data, same budget.

    python benchmarks/objectives.py --raw FOLDER_WITH_Dataset004_Hippocampus --folder WORK [--seeds 2] [--iterations 60]

Every recipe trains through the trainer that users get, only with a smaller network and fewer iterations. Then, on cases that it
has not seen and the same for all: alignment, retrieval and effective rank of the encoder's features of two views (augmented as in
training), and a linear voxel probe: logistic regression on frozen features of 8 labelled cases, Dice on 16 others. "untrained" is
the network as nnU-Net initialises it. One line per run goes to WORK/objectives.jsonl, the tables to standard output.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from hippocampus import NAME, PLANS, VIEW, prepare

CONFIGURATION = "objectives"
HELD_BACK, LABELLED = 24, 8
ROWS = {
    "untrained": None, "AE": "nnUNetTrainerCVA_AE", "MAE": "nnUNetTrainerCVA_MAE", "MAE+CVA": "nnUNetTrainerCVA_MAE_CVA",
    "MAE+C-CVA": "nnUNetTrainerCVA_MAE_CCVA", "MAE+Cont": "nnUNetTrainerCVA_MAE_Cont", "MAE+CVA+Cont": "nnUNetTrainerCVA",
    "MAE+C-CVA+Cont": "nnUNetTrainerCVA_MAE_CCVA_Cont", "Gram": "nnUNetTrainerCVA_Gram", "Cont": "nnUNetTrainerCVA_Cont",
}  # fmt: skip


def small_primus() -> type:
    """A trainer that builds a Primus which CPUs can bear; a user's own backbone_trainer looks like this."""
    from dynamic_network_architectures.architectures.primus import Primus
    from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import AbstractPrimus

    class SmallPrimus(AbstractPrimus):
        @staticmethod
        def build_network_architecture(plans, configuration, channels, classes, deep_supervision=True):
            return Primus(
                channels, 192, (8, 8, 8), classes, 4, 4, configuration.patch_size, drop_path_rate=0.2, scale_attn_inner=True,
                init_values=0.1,
            )  # fmt: skip

    return SmallPrimus


def recipe(row: str, family: str) -> type:
    """The recipe's class, with the small Primus in place of Primus-M."""
    from nnunetv2_cva.trainers import nnUNetTrainerCVA, nnUNetTrainerCVA_objectives

    name = ROWS[row] or "nnUNetTrainerCVA"
    found = getattr(nnUNetTrainerCVA, name, None) or getattr(nnUNetTrainerCVA_objectives, name)
    if family == "U-Net":
        return found
    config = replace(
        found.config, optimizer="adamw", learning_rate=3e-4, weight_decay=5e-2, gradient_clip=1.0, warmup_epochs=1
    )
    return type(name, (found,), {"config": config, "backbone_trainer": small_primus()})


def train(row: str, family: str, seed: int, iterations: int):
    """The trainer after training (or initialised only)."""
    dataset = Path(os.environ["nnUNet_preprocessed"]) / NAME
    plans = {**json.loads((dataset / f"{PLANS}.json").read_text()), "continue_training": False}
    epochs = 5
    os.environ["nnUNet_cva"] = json.dumps({"epochs": epochs, "iterations_per_epoch": iterations // epochs, "seed": seed})
    json_file = json.loads((dataset / "dataset.json").read_text())
    trainer = recipe(row, family)(plans, CONFIGURATION, 0, json_file, torch.device("cpu"))
    trainer.disable_checkpointing = True
    if row == "untrained":
        trainer.initialize()
    else:
        trainer.run_training()
    return trainer


@torch.no_grad()
def agreement(trainer, keys: list[str]) -> dict[str, float]:
    """Alignment, retrieval and effective rank of the encoder's features of two views of the held-back cases."""
    from nnunetv2_cva.config import CVAConfig
    from nnunetv2_cva.training.monitor import collapse_metrics, pair_metrics, standardised
    from nnunetv2_cva.training.objective import by_view, prepare
    from nnunetv2_cva.views.loader import Cases, PairDataset

    config = CVAConfig(mask_ratio=0.0)  # the same two views for all rows, also for those that train on one
    pairs = PairDataset(Cases(trainer.preprocessed_dataset_folder, keys), keys, VIEW, config, len(keys), (0, len(keys)), 7)
    batch = prepare(pairs[0], config, (16, 16, 16), torch.device("cpu"), 7)
    trainer.student.eval()
    features = by_view(trainer.student.features(batch.views, batch.rois))
    found = pair_metrics(*by_view(standardised(features.flatten(0, 1))))
    return {**found, "effective_rank": collapse_metrics(features.flatten(0, 2))["effective_rank"]}


@torch.no_grad()
def voxels(trainer, keys: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per case: features (V, C) and labels (V,) of all voxels of its central view. Taps are sampled at voxel centres."""
    from nnunetv2_cva.model.branches import align

    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, list(keys))
    backbone, found = trainer.student.backbone.eval(), []
    for key in keys:
        data, labels, _, _ = dataset.load_case(key)
        begin = [(n - v) // 2 for n, v in zip(data.shape[1:], VIEW)]
        box = np.array([[b, b + v] for b, v in zip(begin, VIEW)])
        from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd

        view = torch.from_numpy(crop_and_pad_nd(data, box.tolist()))[None]
        maps, _ = backbone.encode(backbone.averaged(), view)
        whole = torch.tensor([[[0.0] * 3, [1.0] * 3]])
        rows = align(maps, backbone.taps, whole, tuple(VIEW), view.shape[2:])[0]
        found.append((rows.numpy(), np.clip(crop_and_pad_nd(labels, box.tolist())[0].reshape(-1), 0, 2)))
    return found


def linear_probe(trainer, keys: list[str], seed: int) -> float:
    """Mean Dice of both structures over the cases that the logistic regression has not seen."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    cases = voxels(trainer, keys)
    rng = np.random.default_rng(seed)
    rows, labels = [], []
    for features, truth in cases[:LABELLED]:
        for label in range(3):
            where = np.flatnonzero(truth == label)
            chosen = rng.choice(where, min(300, len(where)), replace=False)
            rows.append(features[chosen])
            labels.append(truth[chosen])
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)).fit(np.concatenate(rows), np.concatenate(labels))
    dice = []
    for features, truth in cases[LABELLED:]:
        found = probe.predict(features)
        dice += [2 * ((found == c) & (truth == c)).sum() / max(1, (found == c).sum() + (truth == c).sum()) for c in (1, 2)]
    return float(np.mean(dice))


def table(results: list[dict], family: str) -> str:
    """Mean and, behind the plus-minus, half the range over the seeds."""
    columns = ("alignment", "retrieval", "effective_rank", "voxel_dice", "seconds")
    lines = [f"{family}:", "", "| objective | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in ROWS:
        runs = [r for r in results if r["row"] == row and r["family"] == family]
        if runs:
            cells = []
            for column in columns:
                values = [r[column] for r in runs]
                digits = 0 if column == "seconds" else 1 if column == "effective_rank" else 3
                cells.append(f"{np.mean(values):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}")
            lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=60)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    prepare(args.raw.resolve(), args.folder.resolve())
    dataset = args.folder / "pre" / NAME
    plans = json.loads((dataset / f"{PLANS}.json").read_text())
    plans["configurations"][CONFIGURATION] = {"inherits_from": "small", "batch_size": 3}
    (dataset / f"{PLANS}.json").write_text(json.dumps(plans, indent=2))
    names = sorted(p.name[:-5] for p in (dataset / "nnUNetPlans_3d_fullres").glob("*.b2nd") if "_seg" not in p.name)
    order = np.random.default_rng(0).permutation(names).tolist()
    held_back = order[:HELD_BACK]
    (dataset / "splits_final.json").write_text(json.dumps([{"train": order[HELD_BACK:], "val": held_back}]))
    file = args.folder / "objectives.jsonl"
    results = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(r["row"], r["family"], r["seed"]) for r in results}
    for seed in range(args.seeds):
        for family in ("U-Net", "Primus"):
            for row in ROWS:
                if (row, family, seed) in done:
                    continue
                began = perf_counter()
                trainer = train(row, family, seed, args.iterations)
                seconds = perf_counter() - began
                found = {**agreement(trainer, held_back), "voxel_dice": linear_probe(trainer, held_back, seed)}
                results.append({"row": row, "family": family, "seed": seed, "seconds": seconds, **found})
                with open(file, "a") as f:
                    f.write(json.dumps(results[-1]) + "\n")
                print(json.dumps(results[-1]), flush=True)
    for family in ("U-Net", "Primus"):
        print("\n" + table(results, family))


if __name__ == "__main__":
    main()
