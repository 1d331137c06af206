"""One pretraining, two targets planned differently, stock fine-tuning, prediction without this package: does it fit together?

    python benchmarks/two_targets.py --raw FOLDER --folder WORK

FOLDER holds Dataset004_Hippocampus and Dataset021_Sarcoma (with labels) and Dataset100_HeadMR (images), as nnU-Net keeps raw
data. Pretrains the preset tiny on some heads, exports the one checkpoint for both targets, trains with stock
nnU-Net from it and predicts a case of each. Training and prediction of the targets run in processes in which nothing of this
package can be imported. A few iterations on a CPU: this shows that the files fit, not that they help. A pretraining that is
finished in WORK is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import torch

from nnunetv2_cva.installation.hook import recipes_folder

HEADS, SOURCE = "Dataset100_HeadMR", "Dataset200_Head"
PLANS, PLANNER, CONFIGURATION = "nnUNetResEncUNetMPlans", "nnUNetPlannerResEncM", "small"
# Target, patch that a CPU can bear. Spacing, kernels and strides are those that nnU-Net plans for it.
TARGETS = {"Dataset004_Hippocampus": [32, 40, 32], "Dataset021_Sarcoma": [16, 64, 64]}
VIEW = [32, 32, 32]
CASES = 8  # of each dataset
WITHOUT_PLUGIN = """
import sys

class Uninstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "nnunetv2_cva":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Uninstalled())
"""
TRAIN = """
import json, os, sys, torch
from pathlib import Path
os.environ["nnUNet_n_proc_DA"] = "0"
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

dataset, plans, configuration, weights, iterations = sys.argv[1:]
folder = Path(str(nnUNet_preprocessed)) / dataset
content = {**json.loads((folder / f"{plans}.json").read_text()), "continue_training": False}
trainer = nnUNetTrainer(content, configuration, 0, json.loads((folder / "dataset.json").read_text()), torch.device("cpu"))
trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, int(iterations), 1
trainer.initialize()
load_pretrained_weights(trainer.network, weights)
trainer.run_training()
trainer.perform_actual_validation()
assert not [m for m in sys.modules if m.startswith("nnunetv2_cva")]
"""


def run(command: list[object], folder: Path, plugin: bool = True) -> str:
    """The output of a console command of this environment (or of ``python``); the whole of it goes to WORK/log.txt."""
    environment = dict(os.environ)
    if plugin:
        environment["nnUNet_extTrainer"] = recipes_folder()
    else:
        environment["PYTHONPATH"] = str(folder / "without")
        environment.pop("nnUNet_extTrainer", None)
    words = [str(Path(sys.executable).with_name(str(command[0]))), *map(str, command[1:])]
    began = perf_counter()
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with open(folder / "log.txt", "a") as f:
        f.write(f"$ {' '.join(map(str, command))}\n{done.stdout}\n")
    shown = " ".join(map(str, command[:4])) if command[0] != "python" else "stock nnUNetTrainer"
    print(f"{perf_counter() - began:6.0f} s  {shown}{'' if plugin else ', without the plugin'}", flush=True)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-3000:]}\nFailed: {' '.join(map(str, command))}")
    return done.stdout


def some_cases(raw: Path, name: str, folder: Path) -> list[str]:
    """A raw dataset of a few cases of ``name``; returns them."""
    content = json.loads((raw / name / "dataset.json").read_text())
    ending = content["file_ending"]
    cases = sorted(p.name.removesuffix(ending) for p in (raw / name / "labelsTr").glob(f"*{ending}"))[:CASES]
    for case in cases:
        for sub, file in (("imagesTr", f"{case}_0000{ending}"), ("labelsTr", f"{case}{ending}")):
            (folder / name / sub).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(raw / name / sub / file, folder / name / sub / file)
    (folder / name / "dataset.json").write_text(json.dumps({**content, "numTraining": len(cases)}))
    return cases


def add_small(file: Path, patch: list[int] | None, cut: bool) -> dict:
    """The target's own 3d_fullres with this patch, two cases per step and, where ``cut``, four narrow stages, the widths of the
    preset tiny; returns the configuration."""
    plans = json.loads(file.read_text())
    planned = plans["configurations"]["3d_fullres"]
    architecture = planned["architecture"]
    arguments = architecture["arch_kwargs"]
    narrow = {
        "n_stages": 4,
        "features_per_stage": [8, 16, 32, 64],
        "n_blocks_per_stage": [1, 1, 2, 2],
        "kernel_sizes": arguments["kernel_sizes"][:4],
        "strides": arguments["strides"][:4],
        "n_conv_per_stage_decoder": [1, 1, 1],
    }
    plans["configurations"][CONFIGURATION] = {
        "inherits_from": "3d_fullres",
        "patch_size": patch or planned["patch_size"],
        "batch_size": 2,
        "architecture": {**architecture, "arch_kwargs": {**arguments, **(narrow if cut else {})}},
    }
    file.write_text(json.dumps(plans, indent=2))
    return {**planned, **plans["configurations"][CONFIGURATION]}


def some_images(raw: Path, folder: Path) -> Path:
    """Some heads in a folder of their own."""
    heads = folder / "heads"
    heads.mkdir(exist_ok=True)
    for image in sorted((raw / HEADS / "imagesTr").iterdir())[:CASES]:
        shutil.copyfile(image, heads / image.name)
    return heads


def pretrain(raw: Path, folder: Path, epochs: int, iterations: int) -> Path:
    finished = list((folder / "results" / SOURCE).rglob("checkpoint_final.pth"))
    if finished:
        return finished[0]
    plan = ["--images", some_images(raw, folder), "--preset", "tiny", "--view", *VIEW, "-np", 2]
    run(["nnUNetv2_cva", "plan", "-d", SOURCE, *plan], folder)
    run(["nnUNetv2_cva", "preprocess", "-d", SOURCE, "-np", 2], folder)
    os.environ["nnUNet_cva"] = json.dumps({"epochs": epochs, "iterations_per_epoch": iterations, "workers": 0})
    trained = ["3d_fullres_cva", "all", "-tr", "nnUNetTrainerCVA", "-p", "nnUNetPlansCVA", "-device", "cpu"]
    run(["nnUNetv2_train", SOURCE, *trained], folder)
    (checkpoint,) = (folder / "results" / SOURCE).rglob("checkpoint_final.pth")
    return checkpoint


def finetune_and_predict(
    raw: Path, folder: Path, name: str, checkpoint: Path, iterations: int, patch: list[int] | None, cut: bool
) -> str:
    """All steps for one target; returns its line of the table."""
    cases = some_cases(raw, name, folder / "raw")
    planning = ["-c", "3d_fullres", "-pl", PLANNER, "-np", 2]
    run(["nnUNetv2_plan_and_preprocess", "-d", int(name[7:10]), *planning], folder)
    settings = add_small(folder / "preprocessed" / name / f"{PLANS}.json", patch, cut)
    weights = folder / f"weights_{name}.pth"
    target = ["-d", name, "-c", CONFIGURATION, "-p", PLANS]
    print(run(["nnUNetv2_cva", "export", checkpoint, *target, "-o", weights], folder))
    run(["python", "-c", TRAIN, name, PLANS, CONFIGURATION, weights, iterations], folder, plugin=False)
    image = folder / "raw" / name / "imagesTr" / f"{cases[0]}_0000.nii.gz"
    (folder / "images" / name).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(image, folder / "images" / name / image.name)
    files = ["-i", folder / "images" / name, "-o", folder / "predicted" / name]
    options = ["-f", 0, "-device", "cpu", "-npp", 0, "-nps", 0, "--disable_tta"]
    run(["nnUNetv2_predict", *target, *files, *options], folder, plugin=False)
    (summary,) = (folder / "results" / name).rglob("validation/summary.json")
    validated = len(json.loads(summary.read_text())["metric_per_case"])
    transfer = torch.load(weights, weights_only=True)["transfer"]
    return line(name, settings, transfer, validated, folder / "predicted" / name, cases[0])


def line(name: str, settings: dict, transfer: dict, validated: int, predicted: Path, case: str) -> str:
    import SimpleITK as sitk

    labels = sitk.GetArrayFromImage(sitk.ReadImage(str(predicted / f"{case}.nii.gz")))
    strides = " ".join("x".join(map(str, s)) for s in settings["architecture"]["arch_kwargs"]["strides"])
    spacing = "x".join(f"{s:.2f}" for s in settings["spacing"])
    shape = "x".join(map(str, labels.shape))
    shares = f"{transfer['encoder_carried']:.1%} | {transfer['encoder_adapted']:.1%}"
    seen = f"{validated} cases | {case}.nii.gz, {shape}, {len(set(labels.ravel()))} labels"
    return f"| {name} | {spacing} | {strides} | {shares} | {seen} |"


def prepared(raw: Path, folder: Path) -> tuple[Path, Path]:
    """Both folders, absolute, with what nnU-Net and the processes without the plugin need in the second."""
    raw, folder = raw.resolve(), folder.resolve()
    for name in ("raw", "preprocessed", "results"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        os.environ[f"nnUNet_{name}"] = str(folder / name)
    (folder / "without").mkdir(exist_ok=True)
    (folder / "without" / "sitecustomize.py").write_text(WITHOUT_PLUGIN)
    os.environ["nnUNet_compile"] = "f"
    return raw, folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--pretrain", type=int, nargs=2, default=[1, 4], metavar=("EPOCHS", "ITERATIONS"))
    parser.add_argument("--finetune", type=int, default=5, metavar="ITERATIONS")
    args = parser.parse_args()
    raw, folder = prepared(args.raw, args.folder)
    checkpoint = pretrain(raw, folder, *args.pretrain)
    lines = [finetune_and_predict(raw, folder, n, checkpoint, args.finetune, patch, True) for n, patch in TARGETS.items()]
    print(f"From {checkpoint.name} of {SOURCE}, fine-tuned and predicted by stock nnU-Net without the plugin:\n")
    print("| target | spacing | strides | encoder carried | adapted | validated | predicted |\n|---|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
