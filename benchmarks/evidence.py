"""What does pretraining pay? A small ResEnc U-Net on the hippocampus (MSD Task04): recipe x pretraining seed x split x labels.

    python benchmarks/evidence.py --raw FOLDER_WITH_Dataset004_Hippocampus --folder WORK --run first quick ...
    python benchmarks/evidence.py --list
    python benchmarks/evidence.py --folder WORK --table [first quick ...]

An experiment is a list of pretrainings and of fine-tunings from them (see light.py); a fine-tuning is paired with the one from
scratch on the same labelled cases and batches. The test cases are the same everywhere and in no pretraining. One line per item
goes to WORK/evidence.jsonl, weights to WORK/weights; what is done is not done again, so a run may be killed and started anew.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import light
import numpy as np
import torch
import windows
from arms import DEMO, EXPERIMENTS, RECIPES, SCRATCH, WIDE, items
from hippocampus import NAME, prepare
from light import Protocol, Recipe
from nulls import nulls
from tables import comparisons, null_table, rows_of, table

TEST = {"hippocampus": 20, "hippocampus, wide": 20, "made up": 10}  # cases in no training
SCORED = {"hippocampus": 12, "hippocampus, wide": 12, "made up": 6}  # of these, after a fine-tuning
SCRATCHES = {"hippocampus": Recipe(), "hippocampus, wide": Recipe(widths=WIDE), "made up": Recipe(**DEMO)}  # network and view


class Bench:
    """Does items, each in a line of ``evidence.jsonl``."""

    def __init__(self, data: str, raw: Path, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name, self.folder = data, folder
        (folder / "weights").mkdir(exist_ok=True)
        if data != "made up":
            prepare(raw.resolve(), folder.resolve())
            cases, structures = folder / "pre" / NAME / "nnUNetPlans_3d_fullres", 2
        else:
            cases, structures = made_up(folder / "made_up"), 5
        keys = sorted(p.name[:-5] for p in cases.glob("*.b2nd") if not p.name.endswith("_seg.b2nd"))
        order = np.random.default_rng(0).permutation(keys).tolist()
        self.test, self.rest = order[: TEST[data]], order[TEST[data] :]
        self.cases, self.data = light.Cases(cases, keys), light.load(cases, keys, structures)

    def labelled(self, split: int, labels: int) -> list[str]:
        """Of one split, fewer labels are the first of more."""
        return np.random.default_rng(1 + split).permutation(self.rest).tolist()[:labels]

    def weights(self, recipe: str, seed: int) -> Path:
        begin = "made_up_" if self.name == "made up" else ""
        return self.folder / "weights" / f"{begin}{recipe.replace(' ', '_')}_{seed}.pth"

    def do(self, item: dict[str, Any]) -> dict[str, Any]:
        recipe = RECIPES.get(item["recipe"], SCRATCHES[self.name])
        if item["kind"] == "pretrain":
            found = light.pretrain(recipe, item["seed"], self.cases, self.rest)
            torch.save(found.states(), self.weights(item["recipe"], item["seed"]))
            return {**item, "seconds": round(found.seconds, 1), "curve": found.curve}
        if item["kind"] == "nulls":
            states = torch.load(self.weights(item["recipe"], item["seed"]), weights_only=True)
            return {**item, **nulls(recipe, states, self.cases, self.rest, self.test)}
        if item["kind"] == "probe":
            states = torch.load(self.weights(item["recipe"], item["seed"]), weights_only=True)
            return {**item, "rows": windows.probe(recipe, states["network"], item["seed"], self.data, self.test)}
        protocol = Protocol(**{k: item[k] for k in asdict(Protocol())})
        scratch = item["recipe"] == SCRATCH
        states = None if scratch else torch.load(self.weights(item["recipe"], item["seed"]), weights_only=True)
        keys = self.labelled(item["split"], item["labels"])
        found = light.fine_tune(protocol, recipe, states, self.data, keys, self.test[: SCORED[self.name]], item["split"])
        return {**item, **found}


def made_up(folder: Path, cases: int = 60) -> Path:
    """The demo's anatomy (body, liver, kidneys, vessel, lesion) as nnU-Net would preprocess it, without resampling."""
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    from nnunetv2_cva.demo.anatomy import make_case

    folder.mkdir(exist_ok=True)
    for number in range(cases):
        name = folder / f"case_{number:03d}"
        if not name.with_suffix(".pkl").exists():
            image, labels = make_case(0, number)
            image = (image.astype(np.float32) - image.mean()) / image.std()
            nnUNetDatasetBlosc2.save_case(image[None], labels[None].astype(np.int8), {}, str(name))
    return folder


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def run(args: argparse.Namespace, raw: Path, folder: Path) -> None:
    names, seeds, recipes = args.run, args.seeds, args.recipes
    file = folder / "evidence.jsonl"
    done = read(file)
    for name in names:
        e = EXPERIMENTS[name]
        bench = Bench(e.data, raw, folder)
        for item in items(e, tuple(s for s in e.seeds if seeds is None or s in seeds)):
            left_out = args.labels is not None and item.get("labels", args.labels[0]) not in args.labels
            if left_out or (recipes is not None and item["recipe"] not in recipes):
                continue
            if any(item.items() <= d.items() for d in done):
                continue
            done.append(bench.do(item))
            append(file, done[-1])


def probe(raw: Path, folder: Path) -> None:
    """All pretrainings of the hippocampus that are there."""
    file = folder / "evidence.jsonl"
    bench = Bench("hippocampus", raw, folder)
    for done in read(file):
        item = {**done, "kind": "probe"}
        item = {k: item[k] for k in ("kind", "data", "recipe", "seed") if k in item}
        wanted = (done["kind"], done.get("data")) == ("pretrain", bench.name)
        if wanted and not any(item.items() <= d.items() for d in read(file)):
            append(file, bench.do(item))


def append(file: Path, found: dict[str, Any]) -> None:
    with open(file, "a") as f:
        f.write(json.dumps(found) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--run", nargs="+", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, nargs="+", help="of the pretraining; default: the experiment's")
    parser.add_argument("--recipes", nargs="+", choices=[SCRATCH, *RECIPES])
    parser.add_argument("--labels", type=int, nargs="+", help="labelled cases; default: the experiment's")
    parser.add_argument("--table", nargs="*", choices=EXPERIMENTS)
    parser.add_argument("--probe", action="store_true", help="the frozen features of what has been pretrained")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.run:
        run(args, args.raw, args.folder)
    if args.probe:
        probe(args.raw, args.folder)
    if args.table is not None:
        results = read(args.folder / "evidence.jsonl")
        print("\n\n".join(table(name, results) for name in args.table or EXPERIMENTS if rows_of(name, results)))
        print("\n" + comparisons(results) + "\n")
        print(null_table(results, "hippocampus") + "\n\n### random windows\n\n" + windows.table(results, [*RECIPES]))
    if args.list:
        print("\n".join(f"{name}: {', '.join(e.recipes)}. {e.expected}" for name, e in EXPERIMENTS.items()))


if __name__ == "__main__":
    main()
