"""From a folder as people have it to a prediction, by nothing but the lines that are printed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import SimpleITK as sitk
from helpers.dicom import write_series
from helpers.images import labelled_dataset, nnunet_folders, voxels, write, write_several
from helpers.projects import plans as tiny_plans

from nnunetv2_cva.installation.hook import recipes_folder

WALK = Path(__file__).parent / "helpers" / "walk.py"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_a_pile_to_a_prediction_by_the_printed_lines(tmp_path, monkeypatch):
    """DICOM, NIfTI, NRRD, a duplicate, a broken file, a spreadsheet's table; a target with spaces in the way to it."""
    folder = tmp_path / "my project"
    raw, preprocessed = nnunet_folders(folder, monkeypatch)
    pile, shape = folder / "my data", (30, 34, 32)
    write_several(pile, 4, shape=shape)
    write(pile / "other.nrrd", voxels(20, shape))
    write(pile / "same.mha", voxels(0, shape))  # as case_0
    write_series(pile / "PACS", voxels(9, shape), "1.2.3.9", spacing=(1, 1, 1))
    (pile / "broken.nii.gz").write_bytes(b"broken")
    for n in range(6):
        write(folder / "listed" / f"Müller {n}.nii.gz", voxels(30 + n, shape))
    rows = ["path;subject", *(f"listed/Müller {n}.nii.gz;s{n}" for n in range(6))]
    (folder / "list.csv").write_bytes("\r\n".join(rows).encode("cp1252"))
    intensities = {"0": {"mean": 200.0, "median": 200.0, "std": 40.0, "min": 1, "max": 400}}
    plans = {**tiny_plans(view=(16, 24, 16)), "foreground_intensity_properties_per_channel": intensities}
    labelled_dataset(raw, preprocessed, "Dataset004_First", plans)
    settings = {
        "nnUNet_cva": '{"epochs": 1, "iterations_per_epoch": 2, "check_seconds": 0}',
        "nnUNet_extTrainer": recipes_folder(),
        **dict.fromkeys(("nnUNet_def_n_proc", "OMP_NUM_THREADS"), "1"),
        "nnUNet_n_proc_DA": "0",
        "nnUNet_compile": "f",
    }
    asked = ["plan", "-d", "Dataset500_Mix", "--images", str(pile), "--table", str(folder / "list.csv"), "--target", "4"]
    command = [sys.executable, "-W", "ignore", str(WALK), "1", "2", *asked, "--view", "16", "24", "16"]
    done = subprocess.run(command, env={**os.environ, **settings}, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "12 cases to pretrain on" in done.stdout and done.stdout.count("\n$ nnUNetv2") == 5
    made = sorted(p.name for p in (folder / "predictions_4").glob("*.nii.gz"))
    assert made == [f"First_{n:03d}.nii.gz" for n in range(6)]
    predicted = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "predictions_4" / made[0])))
    assert predicted.shape == voxels().shape and set(predicted.ravel().tolist()) <= {0, 1}
