"""What the verdict says about runs that are known: nine objectives that learn, and seven runs that are made to collapse.

    python benchmarks/verdicts.py --raw FOLDER_WITH_Dataset004_Hippocampus --folder WORK [--seeds 0 1 2]
        [--record tests/recorded_runs.jsonl --also WORK_OF_probes.py]

Every run is short: 8 epochs of 10 iterations of AdamW in bf16, a U-Net of three stages, views of 16x24x16; the default objective
also with the paper's optimizer and views, for 8 epochs and for 30 of 20 iterations. Its metrics go, one line for a run, to
WORK/verdicts.jsonl; the table of what the verdict said, epoch by epoch, to standard output. What is done is not done again.
``--record`` writes what the verdict reads of them, a list per metric, for its test; ``--also``: with the trainings of 32 epochs
of probes.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import small_project
import torch
from small_project import NAME, PLANS, hold_out, make_trainer, prepare, recipe

from nnunetv2_cva.seeing.verdict import MOVES

CONFIGURATION, STAGES = "verdicts", 3
HEALTHY = ("", "AE", "MAE", "MAE_CVA", "MAE_CCVA", "MAE_Cont", "MAE_CCVA_Cont", "Gram", "Cont")
ALONE = {"reconstruction_weight": 0.0, "contrastive_weight": 0.0, "mask_ratio": 0.0}
COLLAPSING = {
    "no stop-gradient": {**ALONE, "teacher_momentum": 0.0, "learning_rate": 3e-3},
    "no stop-gradient, constant images": {**ALONE, "teacher_momentum": 0.0, "learning_rate": 3e-3},
    "mask 0, constant images": {"mask_ratio": 0.0},
    "huge learning rate": {"learning_rate": 0.3},
    "huge learning rate, MAE": {"learning_rate": 0.3, "consistency_weight": 0.0, "contrastive_weight": 0.0},
    "huge learning rate, Cont": {**ALONE, "learning_rate": 0.3, "consistency_weight": 0.0, "contrastive_weight": 1.0},
    "weight decay only": {"learning_rate": 1e-2, "weight_decay": 20.0},
}
# The default recipe with the paper's optimizer and views; all others have AdamW and views that are independent of each other.
PAPER = {"optimizer": "sgd", "learning_rate": 1e-2, "weight_decay": 3e-5, "warmup_epochs": 0, "spatial": "shared"}
AS_PAPER = {"paper's optimizer": PAPER, "paper's optimizer, 30 epochs": {**PAPER, "epochs": 30, "iterations_per_epoch": 20}}
SETTINGS: dict[str, dict[str, Any]] = {**COLLAPSING, **AS_PAPER}
ORDER = (*COLLAPSING, *HEALTHY, *AS_PAPER)


def trainer_class(name: str) -> type:
    """The recipe of that name, or one that collapses."""
    from nnunetv2_cva.trainers.nnUNetTrainerCVA import nnUNetTrainerCVA

    if name in AS_PAPER:
        return nnUNetTrainerCVA
    if name in HEALTHY:
        return recipe("_".join(part for part in ("nnUNetTrainerCVA", name) if part))

    def shown(batch: dict) -> dict:
        if name.endswith("constant images"):
            batch["views"] = torch.ones_like(batch["views"]) + 1e-3 * torch.randn_like(batch["views"])
        return batch

    class Collapsing(nnUNetTrainerCVA):
        """Made to."""

        def train_step(self, batch: dict) -> dict:
            return super().train_step(shown(batch))

        def watch(self) -> dict:
            if name.startswith("mask 0"):
                for batch in self.watched_batches:
                    shown(batch)
            return super().watch()

        def objective(self, student, teacher, batch, config, cases=None):
            if not name.startswith("no stop-gradient"):
                return original(student, teacher, batch, config, cases)
            first, second = by_view(student["bins"])  # the student's own answers on both sides, both with a gradient
            loss = 2 - 2 * torch.nn.functional.cosine_similarity(first.float(), second.float(), dim=-1).mean()
            return {"consistency": loss, "total": loss}

    from nnunetv2_cva.training.objective import by_view
    from nnunetv2_cva.training.objective import objective as original

    return Collapsing


def run(name: str, seed: int, keep: Path) -> list[dict[str, Any]]:
    """The metrics of every epoch; a run that diverges ends early."""
    trainer = make_trainer(trainer_class(name), CONFIGURATION, {"seed": seed, "set_aside": True, **SETTINGS.get(name, {})})
    try:
        trainer.run_training()
    except RuntimeError as e:
        if "epoch" not in str(e):
            raise
    weights = Path(trainer.output_folder) / "checkpoint_final.pth"
    if weights.is_file():
        weights.rename(keep / f"{name or 'default'}_{seed}.pth".replace(" ", "_").replace(",", ""))
    shutil.rmtree(trainer.output_folder)  # the next one of this class would be refused there
    drop = ("seconds", "data_wait")
    return [{k: _short(v) for k, v in e.items() if k not in drop} for e in trainer.history.epochs]


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def configure(dataset: Path) -> None:
    """Add the configuration and the split."""
    plans = json.loads((dataset / f"{PLANS}.json").read_text())
    architecture = plans["configurations"]["small"]["architecture"]
    arguments = {**architecture["arch_kwargs"], "n_stages": STAGES, "features_per_stage": [8, 16, 32]}
    for name in ("kernel_sizes", "strides", "n_conv_per_stage", "n_conv_per_stage_decoder"):
        arguments[name] = arguments[name][: STAGES - name.endswith("decoder")]
    cva = {
        **{"head_width": 64, "predictor_width": 32, "roi_size": [4, 6, 4]},
        **{"mask_block": 8, "epochs": 8, "iterations_per_epoch": 10, "check_seconds": 0, "warmup_epochs": 1},
        **{"optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.01},
        **{"precision": "bf16", "channels_last": True, "watched_cases": 4},
    }
    changes = {
        "batch_size": 2,
        "patch_size": [16, 24, 16],
        "architecture": {**architecture, "arch_kwargs": arguments},
        "cva": cva,
    }
    small_project.configure(dataset, CONFIGURATION, changes)
    hold_out(dataset, 40)


def recorded(runs: list[dict[str, Any]]) -> str:
    """A line for every run, with a list of every metric that the verdict reads: one number where it never changes."""
    reads = {"effective_rank", "spread", "effective_rank_start", "spread_start", "consistency_loss", "retrieval_chance"}
    reads |= {"teacher_distance", "reconstruction_null", "alignment_null", *MOVES}
    lines = []
    for r in runs:
        metrics = {k: [float(f"{e[k]:.6g}") for e in r["epochs"]] for k in r["epochs"][0] if k in reads}
        short = {k: v[0] if len(set(v)) == 1 else v for k, v in metrics.items()}
        line = {"run": r["run"] or "default", "seed": r["seed"], "epochs": len(r["epochs"]), "metrics": short}
        lines.append(json.dumps(line, separators=(",", ":")) + "\n")
    return "".join(lines)


def longer(folder: Path) -> list[dict[str, Any]]:
    """The trainings of probes.py."""
    found = []
    for file in sorted(folder.glob("[CM]*__*/fold_0/metrics.jsonl")):
        row, seed = file.parts[-3].split("__")[0].split("_")
        epochs = [json.loads(line) for line in file.read_text().splitlines()]
        found.append({"run": f"{'default' if row == 'CVA' else row}, {len(epochs)} epochs", "seed": int(seed), "epochs": epochs})
    return found


def table(runs: list[dict[str, Any]]) -> str:
    """What was said after every epoch."""
    from nnunetv2_cva.seeing.verdict import verdict

    lines = ["| run | seed | verdict, epoch by epoch | the last one's reason |", "|---|---|---|---|"]
    for r in runs:
        said = [verdict(r["epochs"][: n + 1]) for n in range(len(r["epochs"]))]
        names = ", ".join(v.state for n, v in enumerate(said) if n == 0 or v.state != said[n - 1].state)
        lines.append(f"| {r['run'] or 'default'} | {r['seed']} | {names} | {said[-1].reason if said else 'diverged'} |")
    return "\n".join(lines)


def main() -> None:
    """Train what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--record", type=Path)
    parser.add_argument("--also", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    prepare(args.raw.resolve(), args.folder.resolve())
    configure(args.folder / "pre" / NAME)
    file = args.folder / "verdicts.jsonl"
    for seed in args.seeds:
        for name in ORDER:
            done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
            if not any((r["run"], r["seed"]) == (name, seed) for r in done):
                line = json.dumps({"run": name, "seed": seed, "epochs": run(name, seed, args.folder)})
                with open(file, "a") as f:
                    f.write(line + "\n")
    runs = [json.loads(line) for line in file.read_text().splitlines()] + (longer(args.also) if args.also else [])
    if args.record:
        args.record.write_text(recorded(runs))
    print(table(runs))


if __name__ == "__main__":
    main()
