"""From a foundation file on a hub to two fine-tuned targets: does it fit together, and are licence and citations kept on the way?

    python benchmarks/foundation_chain.py --raw FOLDER --folder WORK

FOLDER as for ``two_targets.py``. A server on this machine stands for the Hugging Face hub; the file it has is laid out as
nnFoundation's CNN: ResEnc-L at its full size with random weights, images that were not resampled. It starts a pretraining of the
preset nnfoundation_resencl on the heads. That is published as a folder, from which two targets are filled, trained and validated
by stock nnU-Net and used to predict, in processes in which nothing of this package can be imported. Of the targets the smallest
cases are taken, so that a CPU comes to the end of their validation. A pretraining that is finished in WORK is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

import torch
import two_targets
from two_targets import SOURCE, prepared, run, some_images

from nnunetv2_cva.transfer.architectures import built
from nnunetv2_cva.transfer.read import read

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from helpers.hub import serving  # noqa: E402

REPOSITORY, LICENCE, CITED = "MIC-DKFZ/nnFoundationCNN", "CC-BY-SA-4.0", "arXiv:2609.26924"
VIEW = (64, 64, 64)  # what a CPU can bear; the preset's is 192x192x192
TARGETS = {"Dataset021_Sarcoma": [32, 96, 96], "Dataset004_Hippocampus": None}  # None: the patch that nnU-Net plans
SMALLEST = 5  # cases of a target


def foundation_file(folder: Path) -> None:
    """A file like nnFoundation's CNN in ``folder``, which the hub serves."""
    architecture = {"arch_class_name": "ResEncL", "arch_kwargs": None, "arch_kwargs_requiring_import": None}
    network = built(architecture, 1, 1, (192, 192, 192))
    stated = {"spacing": None, "patch_size": [192, 192, 192], "normalization_schemes": ["ZScoreNormalization"]}
    plan = {
        "architecture_plans": architecture,
        "pretrain_plan": {"dataset_name": "Foundation", "plans_name": "nnsslPlans", "configurations": {"noresample": stated}},
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": [192, 192, 192],
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
        "key_to_lpe": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    content = {"network_weights": network.state_dict(), "nnssl_adaptation_plan": plan, "trainer_name": "MAETrainer"}
    torch.save(content, folder / "checkpoint_final.pth")


def kept(text: str, step: str) -> None:
    """That ``text`` still says what nnFoundation asks for."""
    for wanted in (LICENCE, CITED):
        if wanted.lower() not in text.lower():
            raise SystemExit(f"{step}: {wanted} is lost.")
    print(f"         {step}: {LICENCE} and the citation are there", flush=True)


def smallest_cases(raw: Path, folder: Path, name: str) -> Path:
    """A folder with the smallest cases of a raw dataset, to take its cases from."""
    content = json.loads((raw / name / "dataset.json").read_text())
    ending, images = content["file_ending"], (raw / name / "imagesTr").iterdir()
    for image in sorted(images, key=lambda file: file.stat().st_size)[:SMALLEST]:
        labels = image.name.replace(f"_0000{ending}", ending)
        for sub, file in (("imagesTr", image.name), ("labelsTr", labels)):
            (folder / name / sub).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(raw / name / sub / file, folder / name / sub / file)
    shutil.copyfile(raw / name / "dataset.json", folder / name / "dataset.json")
    return folder


def pretrain(raw: Path, folder: Path, iterations: int) -> Path:
    finished = list((folder / "results" / SOURCE).rglob("checkpoint_final.pth"))
    if finished:
        return finished[0]
    some_images(raw, folder)
    plan = ["--images", folder / "heads", "--preset", "nnfoundation_resencl", "--view", *VIEW, "-np", 1]
    print(run(["nnUNetv2_cva", "plan", "-d", SOURCE, *plan], folder))
    run(["nnUNetv2_cva", "preprocess", "-d", SOURCE, "-np", 1], folder)
    os.environ["nnUNet_cva"] = json.dumps({"epochs": 1, "iterations_per_epoch": iterations, "workers": 0})
    run(
        ["nnUNetv2_train", SOURCE, "3d_fullres_cva", "all", "-tr", "nnUNetTrainerCVA", "-p", "nnUNetPlansCVA", "-device", "cpu"],
        folder,
    )
    (checkpoint,) = (folder / "results" / SOURCE).rglob("checkpoint_final.pth")
    (log,) = checkpoint.parent.glob("training_log*.txt")
    start = [line for line in log.read_text().splitlines() if "Encoder:" in line or "Licence:" in line or "WARNING" in line]
    print("\n".join(start))
    return checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=2, help="of the pretraining and of each fine-tuning")
    args = parser.parse_args()
    raw, folder = prepared(args.raw, args.folder)
    two_targets.PLANS, two_targets.PLANNER = "nnUNetResEncUNetLPlans", "nnUNetPlannerResEncL"
    foundation_file(folder / "hub" / REPOSITORY)
    with serving(folder / "hub") as (endpoint, _):
        os.environ.update(HF_HOME=str(folder / "cache"), HF_ENDPOINT=endpoint)
        kept(run(["nnUNetv2_cva", "info", f"hf://{REPOSITORY}"], folder), "the file on the hub")
        checkpoint = pretrain(raw, folder, args.iterations)
    kept(run(["nnUNetv2_cva", "info", checkpoint], folder), "the pretraining")
    published = folder / "published"
    print(run(["nnUNetv2_cva", "export", checkpoint, "--hub-folder", published], folder))
    kept((published / "README.md").read_text(), "the model card")
    lines = []
    for name, patch in TARGETS.items():
        chosen = smallest_cases(raw, folder / "smallest", name)
        lines.append(two_targets.finetune_and_predict(chosen, folder, name, published, args.iterations, patch, False))
        kept(json.dumps(read(folder / f"weights_{name}.pth").card), f"the weights for {name}")
    print("| target | spacing | strides | encoder carried | adapted | validated | predicted |\n|---|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
