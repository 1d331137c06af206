"""Does pretraining put more into the features than the untrained network has? Voxel probes of three pretraining seeds.

    python benchmarks/probes.py --raw FOLDER_WITH_Dataset004_Hippocampus --folder WORK [--seeds 0 1 2]

Per seed: the small ResEnc U-Net of evidence.py (8, 16, 32, 64 channels, one block per stage, views of 24x32x24), untrained, after
800 iterations of 4 cases of nnUNetTrainerCVA_MAE and after as many of nnUNetTrainerCVA, all with the recipes' own settings but
narrower heads and bf16. The probe is `nnUNetv2_cva probe`'s, on 40 cases that no pretraining saw: 4 labelled, 36 scored, the same
5 draws of cases and windows for every row. The trainings stay in WORK/<row>_<seed>__..., scores go to WORK/probes.jsonl, a line
for each draw, the table to standard output. What is done is not done again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import small_project
import torch
from small_project import FEATURES, NAME, PLANS, hold_out, make_trainer, prepare, recipe, resenc

CONFIGURATION, HELD_OUT, LABELLED, DRAWS = "probes", 40, 4, 5
EPOCHS, ITERATIONS, CASES = 32, 25, 4
RECIPES = {"untrained": "nnUNetTrainerCVA", "MAE": "nnUNetTrainerCVA_MAE", "CVA": "nnUNetTrainerCVA"}


def configure(dataset: Path) -> list[str]:
    """Add configuration and split; the cases that are held out, the first of them those of evidence.py."""
    cva = {
        **{"head_width": 256, "predictor_width": 64, "epochs": EPOCHS, "iterations_per_epoch": ITERATIONS},
        **{"precision": "bf16", "channels_last": True, "check_seconds": 0},
    }
    small_project.configure(dataset, CONFIGURATION, {"batch_size": CASES, "architecture": resenc(FEATURES), "cva": cva})
    return hold_out(dataset, HELD_OUT)


def weights(row: str, seed: int, folder: Path) -> Path:
    """The checkpoint, made where it is missing."""
    kept = folder / f"{row}_{seed}__{PLANS}__{CONFIGURATION}"
    file = kept / "fold_0" / "checkpoint_final.pth"
    if file.is_file():
        return file
    trainer = make_trainer(recipe(RECIPES[row]), CONFIGURATION, {"seed": seed, "set_aside": True})  # what a killed one has left
    if row == "untrained":
        trainer.on_train_start()
        trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    else:
        trainer.run_training()
    Path(trainer.output_folder).parent.rename(kept)  # the next one of this class would be refused there
    return file


def probe(files: dict[str, Path], held_out: list[str]) -> list[dict[str, Any]]:
    """One line for every row, classifier and draw."""
    from nnunetv2_cva.seeing.frozen import load_frozen
    from nnunetv2_cva.seeing.labelled import labelled_cases
    from nnunetv2_cva.seeing.probing import probe_voxels

    networks = {row: load_frozen(file, label=row) for row, file in files.items()}
    first = next(iter(networks.values()))
    dataset = labelled_cases("4", first.channels)
    cases, found = dataset.chosen(held_out).read(first), []
    for draw in range(DRAWS):
        for row, scores in probe_voxels(cases, networks, list(dataset.labels.values()), LABELLED, draw).items():
            found += [{"row": row, "draw": draw, "by": by, "dice": round(value, 4)} for by, value in scores.items()]
    return found


def table(lines: list[dict[str, Any]]) -> str:
    """Means over pretraining seeds, each the mean over the draws, and their 95 % interval. Position and intensity have no seed:
    theirs is that of the draws."""
    from nnunetv2_cva.seeing.propagation import mean_and_interval

    def of(row: str, by: str) -> np.ndarray:
        """(seeds, draws)"""
        rows = sorted({x["row"] for x in lines if x["row"].rsplit(" ", 1)[0] == row})
        return np.array([[x["dice"] for x in lines if (x["row"], x["by"]) == (r, by)] for r in rows])

    def interval(values: np.ndarray) -> str:
        mean, half = mean_and_interval(values.tolist())
        return f"{mean:.3f} ± {half:.3f}"

    kinds = ("linear", "k-NN")
    said = ["| features | linear | per seed | k-NN | per seed |", "|---|---|---|---|---|"]
    for row in ("position", "intensity", *RECIPES):
        cells = []
        for by in kinds:
            scores = of(row, by)
            means = scores.mean(1)
            alone = len(means) == 1
            cells += [interval(scores[0] if alone else means), "" if alone else " ".join(f"{m:.3f}" for m in means)]
        said.append(f"| {row} | {' | '.join(cells)} |")
    for row, other in (("MAE", "untrained"), ("CVA", "untrained"), ("CVA", "MAE")):
        cells = []
        for by in kinds:
            gains = (of(row, by) - of(other, by)).mean(1)
            cells += [interval(gains), " ".join(f"{g:+.3f}" for g in gains)]
        said.append(f"| {row} - {other} | {' | '.join(cells)} |")
    return "\n".join(said)


def main() -> None:
    """Pretrain what is missing, probe, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    prepare(args.raw.resolve(), args.folder.resolve())
    held_out = configure(args.folder / "pre" / NAME)
    file = args.folder / "probes.jsonl"
    if not file.exists():
        files = {f"{row} {seed}": weights(row, seed, args.folder) for seed in args.seeds for row in RECIPES}
        file.write_text("".join(json.dumps(line) + "\n" for line in probe(files, held_out)))
    print(table([json.loads(line) for line in file.read_text().splitlines()]))


if __name__ == "__main__":
    main()
