"""What does pretraining pay? A small ResEnc U-Net on the hippocampus (MSD Task04): recipe x pretraining seed x split x labels.

    python benchmarks/evidence.py --raw FOLDER_WITH_Dataset004_Hippocampus --folder WORK --run first optimiser ...
    python benchmarks/evidence.py --list
    python benchmarks/evidence.py --folder WORK --table [first optimiser ...]

An experiment is a list of pretrainings and of fine-tunings from them (see light.py); a fine-tuning is paired with the one from
scratch on the same labelled cases and batches. The test cases are the same everywhere and in no pretraining. One line per item
goes to WORK/evidence.jsonl, weights to WORK/weights; what is done is not done again, so a run may be killed and started anew.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import light
import numpy as np
import torch
from hippocampus import NAME, prepare
from light import Protocol, Recipe
from nulls import nulls
from scipy import stats

TEST = 20
ADAMW: dict[str, Any] = {"optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.01, "warmup_epochs": 2, "mask_block": 8}
INDEPENDENT = {**ADAMW, "spatial": "independent"}
MAE = {**ADAMW, "consistency_weight": 0.0, "contrastive_weight": 0.0}
SCRATCH = "scratch"
RECIPES = {
    "sgd": Recipe(),  # the default recipe as it is: blocks of 16, SGD 1e-2
    "adamw": Recipe(ADAMW),
    "independent": Recipe(INDEPENDENT),
    "mae": Recipe(MAE),
    "ccva": Recipe({**INDEPENDENT, "consistency": "nt_xent", "consistency_weight": 0.2, "contrastive_weight": 0.0}),
    "misaligned": Recipe(ADAMW, misaligned=True),
    # one factor each
    "sgd block 8": Recipe({"mask_block": 8}),
    "adamw block 16": Recipe({**ADAMW, "mask_block": 16}),
    "adamw no contrast": Recipe({**ADAMW, "contrastive_weight": 0.0}),
    "independent no contrast": Recipe({**INDEPENDENT, "contrastive_weight": 0.0}),
    "adamw 3e-3": Recipe({**ADAMW, "learning_rate": 3e-3}),
    "adamw 3e-4": Recipe({**ADAMW, "learning_rate": 3e-4}),
    "sgd 1e-3": Recipe({"mask_block": 8, "learning_rate": 1e-3}),
    "adamw 400": Recipe(ADAMW, iterations=400),
    "adamw 40 images": Recipe(ADAMW, images=40),
    "adamw 2 cases": Recipe(ADAMW, cases=2),
}


@dataclass(frozen=True)
class Experiment:
    """``expected``: written before the run."""

    expected: str
    recipes: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    splits: tuple[int, ...] = (0, 1, 2, 3, 4)
    labels: tuple[int, ...] = (1, 4)
    protocol: Protocol = field(default_factory=Protocol)
    against: str | None = None  # the recipe that the others are compared with; None: scratch


MAIN = (SCRATCH, "sgd", "adamw", "independent", "mae")
STOCK = Protocol(iterations=500, deep_supervision=True)
QUICK = Protocol(iterations=200, rate=1e-3, optimizer="adamw")
EXPERIMENTS = {
    "first": Experiment(
        "SGD loses to scratch, AdamW gains 0.1 to 0.2, independent views about as much as shared, MAE half of it.",
        MAIN,
        labels=(4,),
    ),
    "one label": Experiment("As with four labels: in so few iterations they hardly matter.", MAIN, labels=(1,)),
    "stock": Experiment(
        "With twice the iterations and deep supervision everything gains less, AdamW still above scratch.",
        MAIN,
        splits=(0, 1, 2),
        labels=(4,),
        protocol=STOCK,
    ),
    "quick": Experiment(
        "Fine-tuned with AdamW: less scatter, the same order as with SGD.",
        MAIN,
        labels=(4,),
        protocol=QUICK,
    ),
    "quick, one label": Experiment("As with four labels, lower.", MAIN, labels=(1,), protocol=QUICK),
    "objectives": Experiment(
        "C-CVA near the independent views; misaligned as good as exact shared views, since both learn places.",
        (SCRATCH, "adamw", "independent", "ccva", "misaligned", "mae"),
        labels=(4,),
    ),
    "factors": Experiment(
        "Half of the iterations cost half of the gain; 40 images, 2 cases a step and blocks of 16 cost little.",
        (SCRATCH, "adamw", "adamw 400", "adamw 40 images", "adamw 2 cases", "adamw block 16", "sgd block 8", "adamw no contrast"),
        seeds=(0,),
        labels=(4,),
    ),
}


def items(experiment: Experiment, seeds: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """What has to be done, in an order in which every prefix is balanced over the recipes."""
    how = {k: v for k, v in asdict(experiment.protocol).items()}
    for seed in seeds:
        for recipe in experiment.recipes:
            if recipe != SCRATCH:
                yield {"kind": "pretrain", "recipe": recipe, "seed": seed}
                yield {"kind": "nulls", "recipe": recipe, "seed": seed}
            for split in experiment.splits:
                for labels in experiment.labels:
                    arm = {"recipe": recipe, "seed": 0 if recipe == SCRATCH else seed}
                    yield {"kind": "fine-tune", **arm, "split": split, "labels": labels, **how}


class Bench:
    """Does items, each in a line of ``evidence.jsonl``."""

    def __init__(self, raw: Path, folder: Path) -> None:
        prepare(raw.resolve(), folder.resolve())
        self.folder = folder
        (folder / "weights").mkdir(exist_ok=True)
        cases = folder / "pre" / NAME / "nnUNetPlans_3d_fullres"
        keys = sorted(p.name[:-5] for p in cases.glob("*.b2nd") if not p.name.endswith("_seg.b2nd"))
        order = np.random.default_rng(0).permutation(keys).tolist()
        self.test, self.rest = order[:TEST], order[TEST:]
        self.cases, self.data = light.Cases(cases, keys), light.load(cases, keys)

    def labelled(self, split: int, labels: int) -> list[str]:
        """Of one split, fewer labels are the first of more."""
        return np.random.default_rng(1 + split).permutation(self.rest).tolist()[:labels]

    def weights(self, recipe: str, seed: int) -> Path:
        return self.folder / "weights" / f"{recipe.replace(' ', '_')}_{seed}.pth"

    def do(self, item: dict[str, Any]) -> dict[str, Any]:
        recipe = RECIPES.get(item["recipe"], Recipe())
        if item["kind"] == "pretrain":
            found = light.pretrain(recipe, item["seed"], self.cases, self.rest)
            torch.save(found.states(), self.weights(item["recipe"], item["seed"]))
            return {**item, "seconds": round(found.seconds, 1), "curve": found.curve}
        if item["kind"] == "nulls":
            states = torch.load(self.weights(item["recipe"], item["seed"]), weights_only=True)
            return {**item, **nulls(recipe, states, self.cases, self.rest, self.test)}
        protocol = Protocol(**{k: item[k] for k in asdict(Protocol())})
        scratch = item["recipe"] == SCRATCH
        states = None if scratch else torch.load(self.weights(item["recipe"], item["seed"]), weights_only=True)
        keys = self.labelled(item["split"], item["labels"])
        found = light.fine_tune(protocol, recipe, states, self.data, keys, self.test, item["split"])
        return {**item, **found}


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def run(names: list[str], seeds: list[int] | None, raw: Path, folder: Path) -> None:
    bench, file = Bench(raw, folder), folder / "evidence.jsonl"
    done = read(file)
    for name in names:
        e = EXPERIMENTS[name]
        for item in items(e, tuple(s for s in e.seeds if seeds is None or s in seeds)):
            if any(item.items() <= d.items() for d in done):
                continue
            done.append(bench.do(item))
            with open(file, "a") as f:
                f.write(json.dumps(done[-1]) + "\n")


# ---- tables


def value(row: dict[str, Any], what: str) -> float:
    """``dice`` or ``foreground`` at the end of a fine-tuning, or ``area`` of its foreground."""
    return light.area(row["points"], row["foreground"]) if what == "area" else row[what][-1]


def matrix(rows: list[dict[str, Any]], recipe: str, labels: tuple[int, ...], what: str) -> dict[tuple[int, int], float]:
    """(seed, split) -> mean over the numbers of labels, where all of them are there."""
    found: dict[tuple[int, int], dict[int, float]] = {}
    for r in rows:
        if r["recipe"] == recipe and r["labels"] in labels:
            found.setdefault((r["seed"], r["split"]), {})[r["labels"]] = value(r, what)
    return {key: float(np.mean([*v.values()])) for key, v in found.items() if len(v) == len(labels)}


@dataclass(frozen=True)
class Difference:
    mean: float
    half: float  # of the 95 % interval; nan with a single seed and split
    ahead: int  # splits, mean over the seeds
    splits: int
    seeds: int

    def __str__(self) -> str:
        return f"{self.mean:+.3f} ± {self.half:.3f}, {self.ahead} of {self.splits}"


def difference(first: dict[tuple[int, int], float], second: dict[tuple[int, int], float]) -> Difference | None:
    """first - second, paired by split and pretraining seed (scratch, which has one seed, by split).

    The interval counts seeds and splits as two samples, since another user has another of both: variance of the seeds' means
    over their number plus the same of the splits, Welch-Satterthwaite's degrees of freedom. With one seed it is that of the
    splits, and says nothing about other pretrainings.
    """
    alone = {seed for seed, _ in second} == {0}
    partner = {key: (0 if alone else key[0], key[1]) for key in first}
    pairs = {key: first[key] - second[partner[key]] for key in first if partner[key] in second}
    splits, seeds = sorted({s for _, s in pairs}), sorted({s for s, _ in pairs})
    if not pairs:
        return None
    by_split = [np.mean([d for (_, s), d in pairs.items() if s == split]) for split in splits]
    by_seed = [np.mean([d for (s, _), d in pairs.items() if s == seed]) for seed in seeds]
    samples = [s for s in (by_split, by_seed) if len(s) > 1]
    parts = [(np.var(s, ddof=1) / len(s), len(s) - 1) for s in samples]
    variance = sum(v for v, _ in parts)
    freedom = variance**2 / sum(v**2 / n for v, n in parts) if variance > 0 else 1
    half = float(stats.t.ppf(0.975, freedom) * variance**0.5) if parts else float("nan")
    return Difference(float(np.mean([*pairs.values()])), half, int(sum(m > 0 for m in by_split)), len(splits), len(seeds))


def table(name: str, results: list[dict[str, Any]]) -> str:
    """One experiment: every recipe against scratch, and against the first other one."""
    e = EXPERIMENTS[name]
    wanted = asdict(e.protocol)
    rows = [r for r in results if r["kind"] == "fine-tune" and all(r[k] == v for k, v in wanted.items())]
    rows = [r for r in rows if r["seed"] in e.seeds and r["split"] in e.splits]
    against = e.against or SCRATCH
    lines = [
        f"### {name}", "", f"Expected: {e.expected}", "",
        f"{e.protocol}, labels {e.labels}, pretraining seeds {e.seeds}, splits {e.splits}", "",
        "| pretraining | labels | seeds | Dice | foreground | "
        f"Dice - {against} | foreground - {against} | area - {against} | per seed, Dice - {against} |", "|---" * 9 + "|",
    ]  # fmt: skip
    for recipe in e.recipes:
        for labels in [(n,) for n in e.labels] + ([e.labels] if len(e.labels) > 1 else []):
            own = {what: matrix(rows, recipe, labels, what) for what in ("dice", "foreground", "area")}
            if not own["dice"]:
                continue
            means = [f"{np.mean([*own[what].values()]):.3f}" for what in ("dice", "foreground")]
            other = {what: matrix(rows, against, labels, what) for what in own}
            gaps = [str(difference(own[w], other[w])) if recipe != against else "" for w in own]
            seeds = sorted({s for s, _ in own["dice"]})
            each = [difference({k: v for k, v in own["dice"].items() if k[0] == s}, other["dice"]) for s in seeds]
            per_seed = " ".join(f"{d.mean:+.3f}" for d in each if d) if recipe != against else ""
            cells = [recipe, ", ".join(map(str, labels)), "" if recipe == SCRATCH else str(len(seeds)), *means, *gaps, per_seed]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--run", nargs="+", choices=EXPERIMENTS)
    parser.add_argument("--seeds", type=int, nargs="+", help="of the pretraining; default: the experiment's")
    parser.add_argument("--table", nargs="*", choices=EXPERIMENTS)
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.run:
        run(args.run, args.seeds, args.raw, args.folder)
    if args.table is not None:
        results = read(args.folder / "evidence.jsonl")
        print("\n\n".join(table(name, results) for name in args.table or EXPERIMENTS))
    if args.list:
        print("\n".join(f"{name}: {', '.join(e.recipes)}. {e.expected}" for name, e in EXPERIMENTS.items()))


if __name__ == "__main__":
    main()
