"""The nine objectives side by side: one small U-Net and one small Primus, same data, same number of steps.

    python benchmarks/objectives.py --raw FOLDER_WITH_Dataset004_Hippocampus --folder WORK [--seeds 3] [--iterations 300]

Every recipe trains through the trainer that users get, with a smaller network and fewer iterations. Then, on cases that it has
not seen and the same for all:

alignment, retrieval   of the encoder's features of two views, augmented as in training; "mirrored": with views that are mirrored
                       and scaled independently, where the place in the view tells nothing
effective_rank         of these features
linear, k-NN           Dice of `nnUNetv2_cva probe` on frozen features: random windows of 8 labelled cases (another 8 per seed),
                       scored on random windows of 32 others; all rows of a seed see the same windows

"untrained" is the network as nnU-Net initialises it, "position" and "intensity" are the probe without a network. MAE has one view
per case and step, all others two. What is done is not done again: one line per run in WORK/objectives.jsonl, weights in
WORK/weights, the tables on standard output.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from backbones.small_primus import SmallPrimus
from small_project import NAME, VIEW, configure, hold_out, make_trainer, prepare, recipe

CONFIGURATION, CASES, EPOCHS = "objectives", 3, 10
CHEAP = {"head_width": 256, "predictor_width": 64, "precision": "bf16", "channels_last": True, "watched_cases": 4}
HELD_BACK, LABELLED = 40, 8
UNTRAINED = "untrained"
BACKBONES = Path(__file__).with_name("backbones")  # where nnU-Net finds the small Primus by its name
ROWS = {
    UNTRAINED: None,
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
COLUMNS = ("alignment", "retrieval", "mirrored alignment", "mirrored retrieval", "effective_rank")
CLASSIFIERS = ("linear", "k-NN")


def trainer_class(row: str, family: str) -> Any:
    """The recipe's class; for a Primus that of Primus-M with the small one in its place."""
    name = "_".join(part for part in ("nnUNetTrainerCVA", ROWS[row], "PrimusM" if family == "Primus" else "") if part)
    return recipe(name) if family == "U-Net" else type(name, (recipe(name),), {"backbone_trainer": SmallPrimus})


def train(row: str, family: str, seed: int, iterations: int) -> Any:
    """The trainer after training, or initialised only."""
    settings: dict[str, Any] = {"epochs": EPOCHS, "iterations_per_epoch": iterations // EPOCHS, "seed": seed, "check_seconds": 0}
    settings["set_aside"] = True  # what a killed run has left
    if family == "Primus":
        settings["warmup_epochs"] = 2
    trainer = make_trainer(trainer_class(row, family), CONFIGURATION, settings)
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


def run(row: str, family: str, seed: int, iterations: int, test: list[str], weights: Path) -> dict[str, Any]:
    """One line of results: how well features agree. The weights go to a file."""
    trainer = train(row, family, seed, iterations)
    found = agreement(trainer, test)
    if row != UNTRAINED:
        (Path(trainer.output_folder) / "checkpoint_final.pth").rename(weights)
    shutil.rmtree(trainer.output_folder)
    return {"row": row, "family": family, "seed": seed, "iterations": iterations, **found}


def probe(files: dict[str, Path], seed: int, cases: list[str]) -> dict[str, dict[str, float]]:
    """Row -> Dice of the package's own voxel probe: random windows, 8 labelled cases, all rows on the same ones."""
    from nnunetv2_cva.seeing.frozen import load_frozen, untrained
    from nnunetv2_cva.seeing.labelled import labelled_cases
    from nnunetv2_cva.seeing.probing import probe_voxels

    networks = {UNTRAINED: untrained(next(iter(files.values()))), **{row: load_frozen(file) for row, file in files.items()}}
    dataset = labelled_cases(NAME, 1)
    images = dataset.chosen(cases).read(networks[UNTRAINED])
    return probe_voxels(images, networks, [*dataset.labels.values()], LABELLED, seed)


def table(results: list[dict[str, Any]], probes: list[dict[str, Any]], family: str) -> str:
    """Mean and standard deviation over the seeds; the gain over the untrained network is taken seed by seed."""
    probes = [p for p in probes if p["family"] == family]
    header = (*COLUMNS, *CLASSIFIERS, *(f"{c}, gain" for c in CLASSIFIERS))
    lines = [
        f"{family}, pretraining seeds: {len(probes)}",
        "",
        "| objective | " + " | ".join(header) + " |",
        "|---" * (len(header) + 1) + "|",
    ]
    for row in ("position", "intensity", *ROWS):
        runs = [r for r in results if r["row"] == row and r["family"] == family]
        cells = [_cell([r[c] for r in runs], 1 if c == "effective_rank" else 3) for c in COLUMNS]
        found = [p["dice"] for p in probes if row in p["dice"]]
        cells += [_cell([d[row][c] for d in found], 3) for c in CLASSIFIERS]
        cells += [_cell([d[row][c] - d[UNTRAINED][c] for d in found] if row != UNTRAINED else [], 3, "+") for c in CLASSIFIERS]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
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
    (args.folder / "weights").mkdir(parents=True, exist_ok=True)
    prepare(args.raw.resolve(), args.folder.resolve())
    configure(args.folder / "pre" / NAME, CONFIGURATION, {"batch_size": CASES, "cva": CHEAP})
    held_back = hold_out(args.folder / "pre" / NAME, HELD_BACK)
    os.environ["nnUNet_extTrainer"] = str(BACKBONES)
    torch.set_num_threads(1)
    file, probes = args.folder / "objectives.jsonl", args.folder / "probes.jsonl"
    for seed, family in itertools.product(args.seeds, args.families):
        key = {"family": family, "seed": seed, "iterations": args.iterations}
        weights = {row: args.folder / "weights" / f"{family}_{row}_{args.iterations}_{seed}.pth" for row in ROWS}
        for row in ROWS:
            if not any({"row": row, **key}.items() <= r.items() for r in read(file)):
                append(file, run(row, family, seed, args.iterations, held_back, weights[row]))
        if not any(key.items() <= p.items() for p in read(probes)):
            del weights[UNTRAINED]
            append(probes, {**key, "dice": probe(weights, seed, held_back)})
    for family in args.families:
        runs, found = ([r for r in read(f) if r["iterations"] == args.iterations] for f in (file, probes))
        print("\n" + table(runs, found, family))


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def append(file: Path, found: dict[str, Any]) -> None:
    print(line := json.dumps(found), flush=True)
    with open(file, "a") as f:
        f.write(line + "\n")


if __name__ == "__main__":
    main()
