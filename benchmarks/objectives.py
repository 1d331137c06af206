"""The nine objectives side by side: one small U-Net and one small Primus, same data, same number of steps.

    python benchmarks/objectives.py --raw FOLDER_WITH_Dataset004_Hippocampus --folder WORK [--seeds 3] [--iterations 300]

Every recipe trains through the trainer that users get, with a smaller network and fewer iterations. Then, on cases that it has
not seen and the same for all:

alignment, retrieval   of the encoder's features of two views, augmented as in training; "mirrored": with views that are mirrored
                       and scaled independently, where the place in the view tells nothing
effective_rank         of these features
voxel Dice             of a linear voxel probe: logistic regression on the frozen features at the voxels of 8 labelled cases
                       (another 8 per seed), scored on 24 others

"untrained" is the network as nnU-Net initialises it, the same in all rows of a seed; "intensity" is the probe without a network,
on the voxel's value and two blurred ones. MAE has one view per case and step, all others two. What is done is not done again: one
line per run in WORK/objectives.jsonl, the tables on standard output.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hippocampus import NAME, PLANS, VIEW, prepare

CONFIGURATION, CASES, EPOCHS = "objectives", 3, 10
TEST, POOL, LABELLED, PER_CASE = 24, 16, 8, 2000
TOKEN = (4, 4, 4)  # voxels; of 8 voxels a view of this size has 36 tokens, 9 of them visible
ROWS = {
    "intensity": None,
    "untrained": None,
    "AE": "AE",
    "MAE": "MAE",
    "MAE+CVA": "MAE_CVA",
    "MAE+C-CVA": "MAE_CCVA",
    "MAE+Cont": "MAE_Cont",
    "MAE+CVA+Cont": "",
    "MAE+C-CVA+Cont": "MAE_CCVA_Cont",
    "Gram": "Gram",
    "Cont": "Cont",
}
FAMILIES = ("U-Net", "Primus")
COLUMNS = ("alignment", "retrieval", "mirrored alignment", "mirrored retrieval", "effective_rank", "voxel Dice")


def small_primus() -> type:
    """A trainer that builds a Primus which CPUs can bear; a user's own backbone_trainer looks like this."""
    from dynamic_network_architectures.architectures.primus import Primus
    from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import AbstractPrimus

    class SmallPrimus(AbstractPrimus):
        @staticmethod
        def build_network_architecture(plans, configuration, channels, classes, deep_supervision=True):
            return Primus(
                channels,
                192,
                TOKEN,
                classes,
                4,
                4,
                configuration.patch_size,
                drop_path_rate=0.2,
                scale_attn_inner=True,
                init_values=0.1,
            )

    return SmallPrimus


def recipe(row: str, family: str) -> type:
    """The recipe's class; for a Primus that of Primus-M with the small one in its place."""
    from nnunetv2_cva.trainers import nnUNetTrainerCVA, nnUNetTrainerCVA_objectives, nnUNetTrainerCVA_Primus

    parts = ["nnUNetTrainerCVA", ROWS[row] or "", "PrimusM" if family == "Primus" else ""]
    name = "_".join(part for part in parts if part)
    modules = (nnUNetTrainerCVA, nnUNetTrainerCVA_objectives, nnUNetTrainerCVA_Primus)
    found = next(getattr(m, name) for m in modules if hasattr(m, name))
    return found if family == "U-Net" else type(name, (found,), {"backbone_trainer": small_primus()})


def train(row: str, family: str, seed: int, iterations: int) -> Any:
    """The trainer after training, or initialised only."""
    dataset = Path(os.environ["nnUNet_preprocessed"]) / NAME
    plans = {**json.loads((dataset / f"{PLANS}.json").read_text()), "continue_training": False}
    settings: dict[str, Any] = {"epochs": EPOCHS, "iterations_per_epoch": iterations // EPOCHS, "seed": seed, "check_seconds": 0}
    if family == "Primus":
        settings["warmup_epochs"] = 2
    os.environ["nnUNet_cva"] = json.dumps(settings)
    json_file = json.loads((dataset / "dataset.json").read_text())
    trainer = recipe(row, family)(plans, CONFIGURATION, 0, json_file, torch.device("cpu"))
    trainer.disable_checkpointing = True
    if ROWS[row] is None:
        trainer.initialize()
    else:
        trainer.run_training()
    return trainer


@torch.no_grad()
def agreement(trainer: Any, keys: list[str]) -> dict[str, float]:
    """The encoder's features of pairs of views: do corresponding bins agree, and do bins differ?"""
    from nnunetv2_cva.config import CVAConfig
    from nnunetv2_cva.training.metrics import collapse_metrics, pair_metrics, standardised
    from nnunetv2_cva.training.objective import by_view, prepare
    from nnunetv2_cva.views.loader import Cases, PairDataset

    found: dict[str, float] = {}
    trainer.student.eval()
    for prefix, spatial in (("", "shared"), ("mirrored ", "independent")):
        config = CVAConfig(mask_ratio=0.0, spatial=spatial)  # the same pairs for all rows, also for those that train on one view
        cases = Cases(trainer.preprocessed_dataset_folder, keys)
        pairs = PairDataset(cases, keys, VIEW, config, len(keys), (0, len(keys)), seed=7)
        batch = prepare(pairs[0], config, (16, 16, 16), torch.device("cpu"), 7)
        features = by_view(trainer.student.features(batch.views, batch.rois))
        metrics = pair_metrics(*by_view(standardised(features.flatten(0, 1))))
        found.update({prefix + name: value for name, value in metrics.items()})
        if not prefix:
            found["effective_rank"] = collapse_metrics(features.flatten(0, 2))["effective_rank"]
    return found


@torch.no_grad()
def voxels(trainer: Any, keys: list[str], intensity: bool) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per case: features (V, C) and labels (V,) of all voxels of its central view, every tap sampled at the voxels' centres."""
    from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
    from scipy.ndimage import gaussian_filter

    from nnunetv2_cva.model.roi_align import roi_align_3d

    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder, list(keys))
    backbone, found = trainer.student.backbone.eval(), []
    whole = torch.tensor([[[0.0] * 3, [1.0] * 3]])
    for key in keys:
        data, labels, _, _ = dataset.load_case(key)
        begin = [(n - v) // 2 for n, v in zip(data.shape[1:], VIEW)]
        box = [[b, b + v] for b, v in zip(begin, VIEW)]
        view = np.asarray(crop_and_pad_nd(data, box), np.float32)
        if intensity:
            rows = np.stack([view[0], *(gaussian_filter(view[0], sigma) for sigma in (1, 2))]).reshape(3, -1).T
        else:
            maps, _ = backbone.encode(backbone.averaged(), torch.from_numpy(view)[None])
            sampled = [
                roi_align_3d(m, whole, tuple(VIEW), view_size=tuple(VIEW), stride=tap.stride, offset=tap.offset, samples=1)
                for m, tap in zip(maps, backbone.taps)
            ]
            rows = torch.cat(sampled, dim=1)[0].flatten(1).T.numpy()
        found.append((rows, np.clip(crop_and_pad_nd(labels, box)[0].reshape(-1), 0, 2)))
    return found


def linear_probe(trainer: Any, labelled: list[str], test: list[str], seed: int, intensity: bool) -> float:
    """Mean Dice of both structures over the test cases."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(seed)
    rows, labels = [], []
    for features, truth in voxels(trainer, labelled, intensity):
        chosen = rng.choice(len(truth), PER_CASE, replace=False)  # as frequent as they are: no shift between fit and score
        rows.append(features[chosen])
        labels.append(truth[chosen])
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    probe.fit(np.concatenate(rows), np.concatenate(labels))
    dice = []
    for features, truth in voxels(trainer, test, intensity):
        found = probe.predict(features)
        for c in (1, 2):
            size = (found == c).sum() + (truth == c).sum()
            dice.append(2 * ((found == c) & (truth == c)).sum() / size if size else np.nan)
    return float(np.nanmean(dice))


def run(row: str, family: str, seed: int, iterations: int, test: list[str], pool: list[str]) -> dict[str, Any]:
    """One line of results."""
    trainer = train(row, family, seed, iterations)
    labelled = np.random.default_rng(seed).choice(pool, LABELLED, replace=False).tolist()
    intensity = row == "intensity"
    found = {} if intensity else agreement(trainer, test)
    found["voxel Dice"] = linear_probe(trainer, labelled, test, seed, intensity)
    return {"row": row, "family": family, "seed": seed, "iterations": iterations, **found}


def table(results: list[dict[str, Any]], family: str) -> str:
    """Mean and standard deviation over the seeds; the gain is taken seed by seed."""
    untrained = {r["seed"]: r["voxel Dice"] for r in results if (r["row"], r["family"]) == ("untrained", family)}
    seeds = len(untrained)
    header = (*COLUMNS, "gain over untrained")
    lines = [f"{family}, {seeds} seeds:", "", "| objective | " + " | ".join(header) + " |", "|---" * (len(header) + 1) + "|"]
    for row in ROWS:
        runs = [r for r in results if r["row"] == row and r["family"] == family and r["seed"] in untrained]
        if not runs:
            continue
        gains = [r["voxel Dice"] - untrained[r["seed"]] for r in runs]
        cells = [_cell([r[c] for r in runs if c in r], 1 if c == "effective_rank" else 3) for c in COLUMNS]
        lines.append(f"| {row} | " + " | ".join([*cells, "" if row == "untrained" else _cell(gains, 3, "+")]) + " |")
    return "\n".join(lines)


def _cell(values: list[float], digits: int, sign: str = "") -> str:
    if not values:
        return ""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.{digits}f}{spread}"


def main() -> None:
    """Train what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--iterations", type=int, default=300)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    prepare(args.raw.resolve(), args.folder.resolve())
    test, pool = configure(args.folder / "pre" / NAME)
    file = args.folder / "objectives.jsonl"
    for seed in args.seeds:
        for family in args.families:
            for row in ROWS:
                key = {"row": row, "family": family, "seed": seed, "iterations": args.iterations}
                if not any(key.items() <= r.items() for r in read(file)):
                    line = json.dumps(run(row, family, seed, args.iterations, test, pool))
                    with open(file, "a") as f:
                        f.write(line + "\n")
                    print(line, flush=True)
    results = [r for r in read(file) if r["iterations"] == args.iterations]
    for family in FAMILIES:
        print("\n" + table(results, family))


def configure(dataset: Path) -> tuple[list[str], list[str]]:
    """Add the configuration and the split; returns the cases for tests and those that labelled ones are drawn from."""
    plans = json.loads((dataset / f"{PLANS}.json").read_text())
    plans["configurations"][CONFIGURATION] = {"inherits_from": "small", "batch_size": CASES, "cva": {"mask_block": 8}}
    (dataset / f"{PLANS}.json").write_text(json.dumps(plans, indent=2))
    names = sorted(p.name[:-5] for p in (dataset / "nnUNetPlans_3d_fullres").glob("*.b2nd") if "_seg" not in p.name)
    order = np.random.default_rng(0).permutation(names).tolist()
    held_back = order[: TEST + POOL]
    (dataset / "splits_final.json").write_text(json.dumps([{"train": order[TEST + POOL :], "val": held_back}]))
    return held_back[:TEST], held_back[TEST:]


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


if __name__ == "__main__":
    main()
