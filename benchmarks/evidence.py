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
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import light
import numpy as np
import stock
import torch
import windows
from arms import DEMO, EXPERIMENTS, RECIPES, SCRATCH, WIDE, items
from light import Protocol, Recipe
from nulls import nulls
from small_project import CASES, NAME, made_up, prepare, shuffled
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
        prepare(raw.resolve(), folder.resolve())
        self.dataset = made_up(folder / "pre") if data == "made up" else folder / "pre" / NAME
        order, structures = shuffled(self.dataset), 5 if data == "made up" else 2
        self.test, self.rest = order[: TEST[data]], order[TEST[data] :]
        cases, keys = self.dataset / CASES, sorted(order)
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
        who = self.labelled(item["split"], item["labels"]), self.test[: SCORED[self.name]], item["split"]
        if protocol.trainer is None:
            return {**item, **light.fine_tune(protocol, recipe, states, self.data, *who)}
        return {**item, **stock.fine_tune(protocol, recipe, states, self.dataset, self.data.structures, *who)}


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@dataclass(frozen=True)
class Only:
    """What of an experiment is done now; None: all of it."""

    seeds: Collection[int] | None = None  # of the pretraining
    recipes: Collection[str] | None = None
    labels: Collection[int] | None = None

    def __contains__(self, item: dict[str, Any]) -> bool:
        asked = {"seed": self.seeds, "recipe": self.recipes, "labels": self.labels}
        return all(values is None or k not in item or item[k] in values for k, values in asked.items())


def run(names: Iterable[str], only: Only, raw: Path, folder: Path) -> None:
    file = folder / "evidence.jsonl"
    done = read(file)
    for name in names:
        e = EXPERIMENTS[name]
        bench = Bench(e.data, raw, folder)
        for item in items(e):
            if item in only and not any(is_of(d, item) for d in done):
                done.append(bench.do(item))
                append(file, done[-1])


def is_of(done: dict[str, Any], item: dict[str, Any]) -> bool:
    """Whether a line is of this item; what a line does not say, as those of an earlier state of this script, is None."""
    return all(done.get(k) == v for k, v in item.items())


def probe(raw: Path, folder: Path) -> None:
    """All pretrainings of the hippocampus that are there."""
    file = folder / "evidence.jsonl"
    bench = Bench("hippocampus", raw, folder)
    for done in read(file):
        item = {**done, "kind": "probe"}
        item = {k: item[k] for k in ("kind", "data", "recipe", "seed") if k in item}
        wanted = (done["kind"], done.get("data")) == ("pretrain", bench.name)
        if wanted and not any(is_of(d, item) for d in read(file)):
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
        run(args.run, Only(args.seeds, args.recipes, args.labels), args.raw, args.folder)
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
