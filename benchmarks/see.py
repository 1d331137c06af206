"""The pictures and tables of docs/see.md: what `look` finds with small trainings of hours on a CPU, and the page of one of them.

    python benchmarks/see.py --raw FOLDER_WITH_Dataset004_Hippocampus_AND_Dataset100_HeadMR --folder WORK [--docs docs]

WORK is that of probes.py, whose three trainings of nnUNetTrainerCVA are looked at: labels of hippocampus_001 found in two others.
Head MR: the network of the preset `tiny` at 3 mm, views of 32x32x32, 500 iterations of 4 cases on 21 images. What is trained is
not trained again. Pictures go to --docs, tables to standard output; the page is drawn by Chromium.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from PIL import Image
from probes import weights

HEAD, CONFIGURATION, SPACING, VIEW = "Dataset100_HeadMR", "3d_fullres_cva", [3.0, 3.0, 3.0], [32, 32, 32]
CASES, EPOCHS, ITERATIONS = 4, 20, 25
COLUMN = 1750  # pixels of the page's picture in each of its columns
SEEN = ("papaya_sample", "niivue_T1_head_ext2", "clinical_T2", "niivue_FLAIR")
HIPPOCAMPI = ("hippocampus_001", "hippocampus_003", "hippocampus_004")
UNSEEN = ("hippocampus_127", "hippocampus_265", "hippocampus_165")  # of the cases that probes.py holds out


def head(folder: Path) -> Path:
    """The checkpoint, made where it is missing."""
    from nnunetv2_cva.trainers.nnUNetTrainerCVA import nnUNetTrainerCVA

    from nnunetv2_cva.commands.main import main as command

    dataset = folder / "pre" / HEAD
    file = folder / "res" / HEAD / f"nnUNetTrainerCVA__nnUNetPlansCVA__{CONFIGURATION}" / "fold_all" / "checkpoint_final.pth"
    if file.is_file():
        return file
    images = Path(os.environ["nnUNet_raw"]) / HEAD / "imagesTr"
    assert command(["plan", "-d", HEAD, "--images", str(images), "--preset", "tiny"]) == 0
    plans = json.loads((dataset / "nnUNetPlansCVA.json").read_text())
    for name, configuration in plans["configurations"].items():
        configuration["patch_size"] = VIEW
        if "spacing" in configuration:
            configuration["spacing"] = SPACING
        configuration["data_identifier"] = "three_mm" + "_images_only" * (name == CONFIGURATION)
    plans["configurations"][CONFIGURATION]["batch_size"] = CASES
    plans["configurations"][CONFIGURATION]["cva"].update(
        epochs=EPOCHS, iterations_per_epoch=ITERATIONS, check_seconds=0, precision="bf16", channels_last=True
    )
    (dataset / "nnUNetPlansCVA.json").write_text(json.dumps(plans, indent=2))
    assert command(["preprocess", "-d", "100", "-np", "1"]) == 0
    dataset_json = json.loads((dataset / "dataset.json").read_text())
    nnUNetTrainerCVA(
        {**plans, "continue_training": False}, CONFIGURATION, "all", dataset_json, torch.device("cpu")
    ).run_training()
    return file


def look(output: Path, **asked: Any) -> Path:
    """Print what `look` says, and how long it took. Returns its picture."""
    from nnunetv2_cva.seeing.look_at import look_at
    from nnunetv2_cva.seeing.requests import LookRequest

    begin, busy = perf_counter(), process_time()
    print("\n".join(look_at(LookRequest(output=str(output), device="cpu", count=2, **asked), lambda *_: None)))
    print(f"{perf_counter() - begin:.0f} s, {process_time() - busy:.0f} s of a core\n")
    return output / "look.png"


def keep(found: Image.Image, picture: Path, width: int = 1200) -> None:
    """As a document shows it: at most so many pixels wide, 256 colours."""
    found.thumbnail((width, 4000))
    found.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(picture, optimize=True)


def page(folder: Path, picture: Path) -> None:
    """Of a training, as a browser shows it, in three columns; without its end, the settings."""
    from nnunetv2_cva.training.report import write_report

    address = write_report(folder).resolve().as_uri()
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    size = (1000, 3 * COLUMN)
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size={},{}".format(*size)]
    with tempfile.TemporaryDirectory() as there:
        whole = Path(there) / "page.png"
        subprocess.run([browser, *options, f"--screenshot={whole}", address], check=True, stderr=subprocess.DEVNULL)
        shown = Image.open(whole).convert("RGB")
    columns = Image.new("RGB", (3 * shown.width, COLUMN), "white")
    for n in range(3):
        columns.paste(shown.crop((0, n * COLUMN, shown.width, (n + 1) * COLUMN)), (n * shown.width, 0))
    keep(columns, picture, 1500)


def main() -> None:
    """Train what is missing, look, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--docs", type=Path, default=Path(__file__).parents[1] / "docs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.folder.resolve()
    os.environ.update(
        nnUNet_raw=str(args.raw.resolve()), nnUNet_preprocessed=str(folder / "pre"), nnUNet_results=str(folder / "res")
    )
    trained = [weights("CVA", seed, folder) for seed in range(3)]
    for seed, file in enumerate(trained):
        asked = {"weights": str(file), "images": HIPPOCAMPI, "target": "4", "pairs": 40}
        found = look(folder / f"look_hippocampus_{seed}", **asked)
        if seed == 0:
            keep(Image.open(found), args.docs / "see_hippocampus.png")
    look(folder / "look_unseen", weights=str(trained[0]), images=UNSEEN, target="4", pairs=40)
    images = tuple(str(args.raw / HEAD / "imagesTr" / f"{name}_0000.nii.gz") for name in SEEN)
    found = look(folder / "look_head", weights=str(head(folder)), images=images)
    keep(Image.open(found), args.docs / "see_head.png")
    page(trained[0].parent, args.docs / "see_report.png")


if __name__ == "__main__":
    main()
