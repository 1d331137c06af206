"""Does pretraining help a small U-Net on few labels? MSD Task04 (hippocampus), CPU, everything stock but the pretraining.

    python benchmarks/hippocampus.py --raw FOLDER_WITH_Dataset004_Hippocampus --folder WORK [--repeats 3]

Pretrains on the images of all cases but the test cases, then trains on 8 labelled cases from these weights and from scratch, with
stock nnU-Net (SGD 1e-2) and with nnUNetTrainerCVAFinetune (1e-3 after a warm-up of a tenth of the epochs), and scores Dice on 40
cases seen by neither. "pretrained encoder": the decoder starts anew. One line per run goes to WORK/results.jsonl, the table to
standard output; what is done is not done again.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
from pathlib import Path
from time import perf_counter

from small_project import NAME, make_trainer, prepare, shuffled

CONFIGURATION, LABELLED, TEST = "small", 8, 40
STOCK, RECIPE = "nnUNetTrainer", "nnUNetTrainerCVAFinetune"
ARMS = {  # what is taken from the pretraining, and the trainer
    "scratch, stock": ("nothing", STOCK),
    "pretrained, stock": ("everything", STOCK),
    "pretrained encoder, stock": ("encoder", STOCK),
    "scratch, fine-tuning recipe": ("nothing", RECIPE),
    "pretrained, fine-tuning recipe": ("everything", RECIPE),
}


def split(folder: Path, repeat: int) -> list[str]:
    """Test cases are the same in all repeats, the 8 labelled ones are not. Fold 0: labelled, test; fold 1: all but test, test."""
    import numpy as np

    order = shuffled(folder / "pre" / NAME)
    test, rest = order[:TEST], order[TEST:]
    labelled = np.random.default_rng(1 + repeat).choice(rest, LABELLED, replace=False).tolist()
    splits = [{"train": labelled, "val": test}, {"train": rest, "val": test}]
    (folder / "pre" / NAME / "splits_final.json").write_text(json.dumps(splits))
    return test


def pretrain(repeat: int, epochs: int, iterations: int) -> Path:
    from nnunetv2_cva.trainers.nnUNetTrainerCVA import nnUNetTrainerCVA_Paper

    settings = {"epochs": epochs, "iterations_per_epoch": iterations, "seed": repeat}
    trainer = make_trainer(nnUNetTrainerCVA_Paper, CONFIGURATION, settings, fold=1)
    kept = Path(trainer.output_folder).with_name(f"repeat_{repeat}")
    if not kept.exists():
        trainer.run_training()
        Path(trainer.output_folder).rename(kept)
    return kept / "checkpoint_final.pth"


def finetune(arm: str, weights: Path, repeat: int, epochs: int, iterations: int, test: list[str]) -> list[float]:
    """The training of one arm; mean Dice of both structures per test case."""
    import numpy as np
    import torch
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2_cva.trainers.nnUNetTrainerCVAFinetune import nnUNetTrainerCVAFinetune

    np.random.seed(repeat)
    torch.manual_seed(repeat)
    os.environ["nnUNet_cva_finetune"] = json.dumps({"epochs": epochs, "iterations_per_epoch": iterations})
    trainer = make_trainer(nnUNetTrainer if ARMS[arm][1] == STOCK else nnUNetTrainerCVAFinetune, CONFIGURATION)
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = epochs, iterations, 1
    trainer.disable_checkpointing = True
    trainer.initialize()
    taken, own = ARMS[arm][0], copy.deepcopy(trainer.network.decoder.state_dict())
    if taken != "nothing":
        load_pretrained_weights(trainer.network, str(weights))
    if taken == "encoder":  # as `export --decoder fresh` does
        own = {key: value for key, value in own.items() if not key.startswith("encoder.")}
        trainer.network.decoder.load_state_dict(own, strict=False)
    trainer.run_training()
    return evaluate(trainer, test)


def evaluate(trainer, test: list[str]) -> list[float]:
    """Mean Dice of both structures, per test case, by nnU-Net's predictor."""
    import numpy as np
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    trainer.set_deep_supervision_enabled(False)
    network, manager = trainer.network.eval(), trainer.plans_manager
    predictor = nnUNetPredictor(
        use_mirroring=False, device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False
    )
    predictor.manual_initialization(network, manager, trainer.configuration_manager, None, trainer.dataset_json, STOCK, None)
    cases = trainer.dataset_class(trainer.preprocessed_dataset_folder, test)
    dice = []
    for key in test:
        data, truth, _, _ = cases.load_case(key)
        found = predictor.predict_sliding_window_return_logits(torch.from_numpy(data[:])).argmax(0).numpy()
        each = [(found == c, truth[0] == c) for c in (1, 2)]
        dice.append(float(np.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in each])))
    return dice


def table(rows: list[dict]) -> str:
    import numpy as np

    lines = ["| arm | Dice, mean over test cases, per repeat | mean | sd over repeats |", "|---|---|---|---|"]
    for arm in ARMS:
        means = [np.mean(r["dice"]) for r in rows if r["arm"] == arm]
        if means:
            per = " ".join(f"{m:.3f}" for m in means)
            lines.append(f"| {arm} | {per} | {np.mean(means):.3f} | {np.std(means, ddof=min(1, len(means) - 1)):.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pretrain", type=int, nargs=2, default=[20, 50], metavar=("EPOCHS", "ITERATIONS"))
    parser.add_argument("--finetune", type=int, nargs=2, default=[20, 75], metavar=("EPOCHS", "ITERATIONS"))
    args = parser.parse_args()
    prepare(args.raw.resolve(), args.folder.resolve())
    results = args.folder / "results.jsonl"
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    for repeat in range(args.repeats):
        test = split(args.folder, repeat)
        began = perf_counter()
        weights = pretrain(repeat, *args.pretrain)
        print(f"repeat {repeat}: pretraining took {perf_counter() - began:.0f} s", flush=True)
        for arm in ARMS:
            if any(r["arm"] == arm and r["repeat"] == repeat for r in rows):
                continue
            dice = finetune(arm, weights, repeat, *args.finetune, test=test)
            rows.append({"arm": arm, "repeat": repeat, "dice": dice})
            with open(results, "a") as f:
                f.write(json.dumps(rows[-1]) + "\n")
            print(table(rows), flush=True)


if __name__ == "__main__":
    main()
