"""Plans for pretraining: from the images, from a preset, for the datasets that will be fine-tuned."""

import contextlib
import csv
import dataclasses
import io
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from helpers.images import labelled_dataset, nnunet_folders, voxels, write, write_several
from helpers.projects import plans as tiny_plans
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiments
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2_cva.trainers.nnUNetTrainerCVA_Primus import nnUNetTrainerCVA_PrimusM

from nnunetv2_cva.commands import main
from nnunetv2_cva.config import DEFAULT, CVAConfig, resolve
from nnunetv2_cva.datasets import fingerprint, memory_plan, nnunet_plans, user_changes, view_size
from nnunetv2_cva.datasets.findings import QUANTILES
from nnunetv2_cva.datasets.inventory import INSPECTION
from nnunetv2_cva.datasets.next_steps import device
from nnunetv2_cva.installation.recipes import recipes
from nnunetv2_cva.plan import counted
from nnunetv2_cva.views.index import read_index

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("NNUNETV2_CVA_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """``(raw, preprocessed)``, with images in Dataset500_Images."""
    raw, preprocessed = nnunet_folders(tmp_path, monkeypatch)
    write_several(raw / "Dataset500_Images" / "imagesTr", 7, (2.0, 1.0, 1.5), (20, 34, 30))
    return raw, preprocessed


def call(*arguments):
    return main.main(["plan", *map(str, arguments), "-np", "1"])


def planned(preprocessed, name="Dataset500_Images", plans="nnUNetPlansCVA"):
    return json.loads((preprocessed / name / f"{plans}.json").read_text())


def network(plans, configuration="3d_fullres", channels=1, classes=1):
    architecture = PlansManager(plans).get_configuration(configuration).configuration["architecture"]
    return get_network_from_plans(
        architecture["network_class_name"], architecture["arch_kwargs"], architecture["_kw_requires_import"], channels, classes
    )


def encoder_shapes(plans, **options):
    return {k: tuple(v.shape) for k, v in network(plans, **options).encoder.state_dict().items()}


# ---- from the images


def test_from_the_images_it_is_what_nnunet_plans_with_labels(folders):
    """Reference: nnU-Net's own fingerprint and planner on the same images, which need labels."""
    raw, preprocessed = folders
    analysed = []
    for path in sorted((raw / "Dataset500_Images" / "imagesTr").iterdir()):
        image = sitk.ReadImage(str(path))
        array, spacing = sitk.GetArrayFromImage(image), image.GetSpacing()[::-1]
        files = (
            raw / "Dataset600_Same" / "imagesTr" / f"{path.name[:-7]}_0000.nii.gz",
            raw / "Dataset600_Same" / "labelsTr" / path.name,
        )
        for file, content in zip(files, (array, (array > 200).astype(np.uint8))):
            write(file, content, spacing)
        analysed.append(DatasetFingerprintExtractor.analyze_case([str(files[0])], str(files[1]), SimpleITKIO))
    shapes, spacings, _, _, relative = zip(*analysed)
    intensities = {"0": dict.fromkeys(("mean", "median", "std", "min", "max", "percentile_99_5", "percentile_00_5"), 1.0)}
    expected = {
        "spacings": [list(s) for s in spacings],
        "shapes_after_crop": [list(s) for s in shapes],
        "foreground_intensity_properties_per_channel": intensities,
        "median_relative_size_after_cropping": float(np.median(relative)),
    }
    dataset = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "a": 1}, "numTraining": 7, "file_ending": ".nii.gz"}
    (raw / "Dataset600_Same" / "dataset.json").write_text(json.dumps(dataset))
    (preprocessed / "Dataset600_Same").mkdir()
    (preprocessed / "Dataset600_Same" / "dataset_fingerprint.json").write_text(json.dumps(expected))
    plan_experiments([600], "ExperimentPlanner")
    theirs = json.loads((preprocessed / "Dataset600_Same" / "nnUNetPlans.json").read_text())

    assert call("-d", 500, "-pl", "ExperimentPlanner") == 0
    ours = planned(preprocessed)
    for key in ("transpose_forward", "transpose_backward", "original_median_spacing_after_transp", "image_reader_writer"):
        assert ours[key] == theirs[key], key
    mine, reference = ours["configurations"]["3d_fullres"], theirs["configurations"]["3d_fullres"]
    ours_only = ("data_identifier",)
    assert {k: v for k, v in mine.items() if k not in ours_only} == {k: v for k, v in reference.items() if k not in ours_only}
    assert set(ours["configurations"]) == {"3d_fullres", "3d_fullres_cva"}
    found = json.loads((preprocessed / "Dataset500_Images" / "dataset_fingerprint.json").read_text())
    assert found.keys() == expected.keys()
    for key in ("spacings", "shapes_after_crop", "median_relative_size_after_cropping"):
        assert np.allclose(found[key], expected[key]), key
    assert found["foreground_intensity_properties_per_channel"]["0"].keys() == intensities["0"].keys()


def test_what_nnunet_needs_is_there(folders):
    _, preprocessed = folders
    call("-d", 500, "-pl", "ExperimentPlanner")
    folder = preprocessed / "Dataset500_Images"
    dataset = json.loads((folder / "dataset.json").read_text())
    assert (
        dataset["numTraining"] == 7
        and dataset["channel_names"] == {"0": "image"}
        and "nnUNetTrainerCVA" in dataset["description"]
    )
    plans = planned(preprocessed)
    manager = PlansManager(plans)
    assert manager.get_label_manager(dataset).foreground_labels == []
    configuration = manager.get_configuration("3d_fullres_cva")
    assert configuration.data_identifier == "nnUNetPlansCVA_3d_fullres_images_only"
    assert configuration.batch_size == 4 and "mask_block" not in plans["configurations"]["3d_fullres_cva"].get("cva", {})
    splits = json.loads((folder / "splits_final.json").read_text())
    assert len(splits) == 5 and all(len(s["train"]) + len(s["val"]) == 7 for s in splits)


@pytest.mark.parametrize("processes", ["0", "many"])
def test_any_number_of_loader_processes_is_planned_preprocessed_and_looked_at_with(folders, monkeypatch, processes):
    """nnU-Net's planners give torch as many threads; 0, which doctor recommends for small containers, is none."""
    _, preprocessed = folders
    monkeypatch.setenv("nnUNet_n_proc_DA", processes)
    assert call("-d", 500, "-pl", "ExperimentPlanner", "--view", 16, 16, 16) == 0
    for command in (["preprocess", "-np", "1"], ["peek", "--cases", "1", "--pairs", "1"]):
        assert main.main([command[0], "-d", "500", *command[1:]]) == 0
    assert os.environ["nnUNet_n_proc_DA"] == processes
    assert (preprocessed / "Dataset500_Images" / "views.png").exists()


def test_the_environment_is_as_before(folders, monkeypatch):
    raw, preprocessed = folders
    call("-d", 500, "-pl", "ExperimentPlanner")
    assert os.environ["nnUNet_raw"] == str(raw) and os.environ["nnUNet_preprocessed"] == str(preprocessed)
    monkeypatch.delenv("nnUNet_raw")
    assert call("-d", 500, "-pl", "ExperimentPlanner") == 0 and "nnUNet_raw" not in os.environ


def test_images_of_several_datasets_and_folders(folders, tmp_path):
    raw, preprocessed = folders
    labelled_dataset(raw, preprocessed, "Dataset004_Organ", tiny_plans())
    write(raw / "Dataset004_Organ" / "imagesTs" / "Organ_900_0000.nii.gz", voxels(77))
    write_several(tmp_path / "pile", 2, ending=".nrrd")
    (tmp_path / "pile" / "case_0.nrrd").rename(tmp_path / "pile" / "other.nrrd")
    write(tmp_path / "pile" / "other.nrrd", voxels(78))
    assert call("-d", "Dataset501_Mix", "--images", 4, tmp_path / "pile", "--preset", "tiny") == 0
    cases = (preprocessed / "Dataset501_Mix" / "cases.csv").read_text().splitlines()[1:]
    names = [line.split(",")[0] for line in cases]
    assert names == [*(f"Dataset004_Organ__Organ_{i:03d}" for i in (0, 1, 2, 3, 4, 5, 900)), "pile__case_1", "pile__other"]
    assert not [line for line in cases if "labelsTr" in line]
    before = (preprocessed / "Dataset501_Mix" / "cases.csv").read_bytes()
    assert call("-d", 501, "--preset", "tiny") == 0  # the sources are remembered
    assert (preprocessed / "Dataset501_Mix" / "cases.csv").read_bytes() == before


def test_ct_is_normalised_as_ct_when_it_is_called_ct(folders, capsys):
    raw, preprocessed = folders
    for i in range(3):
        write(raw / "Dataset502_CT" / "imagesTr" / f"ct_{i}_0000.nii.gz", voxels(i, (20, 24, 22), air=0) * 3 - 1100)
    call("-d", 502, "-pl", "ExperimentPlanner")
    assert "3 of 3 cases look like CT" in capsys.readouterr().out
    assert planned(preprocessed, "Dataset502_CT")["configurations"]["3d_fullres"]["normalization_schemes"] == [
        "ZScoreNormalization"
    ]
    for options in (("-pl", "ExperimentPlanner"), ("--preset", "tiny")):
        call("-d", 502, "--modality", "CT", *options)
        assert "look like CT" not in capsys.readouterr().out
        plans = planned(preprocessed, "Dataset502_CT")
        assert plans["configurations"]["3d_fullres"]["normalization_schemes"] == ["CTNormalization"]
        assert plans["foreground_intensity_properties_per_channel"]["0"]["mean"] < 0
        assert json.loads((preprocessed / "Dataset502_CT" / "dataset.json").read_text())["channel_names"] == {"0": "CT"}


def notes(capsys):
    """What was said about normalisation."""
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if line.startswith(("NOTE", "WARNING")) and "air at" in line or "--modality asks" in line]


def test_a_names_case_does_not_matter_as_in_nnunet(folders, capsys):
    raw, preprocessed = folders
    for i in range(3):
        write(raw / "Dataset502_CT" / "imagesTr" / f"ct_{i}_0000.nii.gz", voxels(i, (20, 24, 22), air=0) * 3 - 1100)
    for options in (("-pl", "ExperimentPlanner"), ("--preset", "tiny")):
        for name, scheme in (("ct", "CTNormalization"), ("noNorm", "NoNormalization")):
            assert call("-d", 502, "--modality", name, *options) == 0
            plans = planned(preprocessed, "Dataset502_CT")
            assert plans["configurations"]["3d_fullres"]["normalization_schemes"] == [scheme]
            assert len(notes(capsys)) == (scheme != "CTNormalization")


def test_what_the_images_are_and_what_the_target_is(targets, tmp_path, capsys):
    """5 is CT, 4 is not: what is said follows from the normalisation that is written, both ways."""
    _, preprocessed = targets
    for i in range(3):
        write(tmp_path / "ct" / f"{i}.nii.gz", voxels(i, (20, 24, 22), air=0) * 3 - 1100)
    ct, mr = ("-d", "Dataset508_CT", "--images", tmp_path / "ct"), ("-d", 500)
    assert call(*ct, "--target", 5) == 0 and notes(capsys) == []
    assert call(*mr, "--target", 4) == 0 and notes(capsys) == []
    assert call(*mr, "--target", 5) == 0
    (warning,) = notes(capsys)
    assert "7 of 7 cases do not look like CT" in warning and "clipped and scaled as CT" in warning
    assert call(*ct, "--target", 4, "--modality", "CT") == 0
    asked, looks = notes(capsys)
    assert "asks for CTNormalization, but these plans have ZScoreNormalization" in asked
    assert "3 of 3 cases look like CT" in looks and "will be normalised by ZScoreNormalization" in looks


# ---- presets


def test_the_tables_of_memory_say_what_the_presets_say():
    texts = [(ROOT / f).read_text() for f in ("docs/data.md", "benchmarks/README.md")]
    for name in nnunet_plans.presets():
        number = nnunet_plans.from_preset(name)["preset"]["peak_memory"].partition(" ")[0]
        rows = [line for text in texts for line in text.splitlines() if line.startswith((f"| `{name}` |", f"| {name} |"))]
        assert len(rows) == 2 and f"| {number} GB" in rows[0] and f"| **{number}** |" in rows[1], name


@pytest.mark.parametrize("name", sorted(nnunet_plans.presets()))
def test_a_shipped_preset_is_whole(name):
    preset = nnunet_plans.from_preset(name)
    about = preset["preset"]
    assert about["description"].endswith(".") and about["recipe"] in recipes(ROOT / "trainers")
    assert ("Primus" in about["recipe"]) == ("Primus" in about.get("fine_tuning", ""))
    # No guesses: a number comes with what it was measured on.
    assert " GB of tensors in a bf16 step, counted without a GPU" in about["peak_memory"]
    manager = PlansManager(preset)
    configuration = manager.get_configuration("3d_fullres_cva")
    step = view_size.strides(configuration.configuration["architecture"])
    for size in (configuration.patch_size, manager.get_configuration("3d_fullres").patch_size):
        assert all(n % s == 0 for n, s in zip(size, step))
    resolve(CVAConfig(), preset, "3d_fullres_cva", {})
    assert configuration.batch_size >= 2 and configuration.preprocessor_class and configuration.resampling_fn_data


def test_the_challenges_presets_are_the_papers():
    for name in ("ssl3d_resencl", "ssl3d_primusm"):
        configuration = PlansManager(nnunet_plans.from_preset(name)).get_configuration("3d_fullres_cva")
        assert configuration.spacing == [1, 1, 1] and configuration.patch_size == [160] * 3 and configuration.batch_size == 4
        assert configuration.normalization_schemes == ["ZScoreNormalization"]
    arguments = nnunet_plans.from_preset("ssl3d_resencl")["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    assert arguments["features_per_stage"] == [32, 64, 128, 256, 320, 320] and arguments["n_blocks_per_stage"] == [
        1,
        3,
        4,
        6,
        6,
        6,
    ]


def test_a_preset_is_fitted_to_the_images(folders, capsys):
    raw, preprocessed = folders
    for i in range(3):
        for c in range(2):
            write(raw / "Dataset503_Two" / "imagesTr" / f"a_{i}_{c:04d}.nii.gz", voxels(2 * i + c, (110, 112, 108)))
    assert call("-d", 503, "--preset", "tiny", "--channels", "stack", "--modality", "T1", "T2", "-p", "nnUNetMine") == 0
    plans = planned(preprocessed, "Dataset503_Two", "nnUNetMine")
    base, ours = plans["configurations"]["3d_fullres"], plans["configurations"]["3d_fullres_cva"]
    assert base["normalization_schemes"] == ["ZScoreNormalization"] * 2 and base["data_identifier"].startswith("nnUNetMine_")
    assert ours["patch_size"] == [48, 48, 48] and ours["batch_size"] == 2 and ours["cva"]["epochs"] == 4
    assert set(plans["foreground_intensity_properties_per_channel"]) == {"0", "1"} and "preset" not in plans
    assert (plans["dataset_name"], plans["plans_name"]) == ("Dataset503_Two", "nnUNetMine")
    assert "-tr nnUNetTrainerCVA -p nnUNetMine" in capsys.readouterr().out


def test_a_plans_file_of_nnunets_is_a_preset(folders, tmp_path):
    _, preprocessed = folders
    theirs = tiny_plans()
    (tmp_path / "theirs.json").write_text(json.dumps(theirs))
    assert call("-d", 500, "--preset", tmp_path / "theirs.json") == 0
    mine, base = (p["configurations"]["3d_fullres"] for p in (planned(preprocessed), theirs))
    assert mine["architecture"] == base["architecture"]


def test_a_primus_is_fine_tuned_with_weights_made_for_the_target(targets, capsys):
    """Reference: the recipe itself says which trainer of nnU-Net's builds its network."""
    trainer = nnUNetTrainerCVA_PrimusM.backbone_trainer.__name__
    assert call("-d", 500, "--preset", "primusm_96", "--view", 16, 24, 16, "--target", 4) == 0
    first = capsys.readouterr().out
    folder = "nnUNetTrainerCVA_PrimusM__nnUNetPlansCVA__3d_fullres_cva"
    how = f"-d 4 -c 3d_fullres -p nnUNetPlansCVA -tr {trainer} -o weights_for_4.pth"
    checkpoint = f'"$nnUNet_results/Dataset500_Images/{folder}/fold_all/checkpoint_final.pth"'
    assert f"nnUNetv2_cva export {checkpoint} {how}\n" in first
    train = f"nnUNetv2_train 4 3d_fullres 0 -p nnUNetPlansCVA -tr {trainer} -pretrained_weights weights_for_4.pth{device()}\n"
    assert train in first and "-tr nnUNetTrainerCVA_PrimusM -p" in first
    assert call("-d", 500, "--keep-plans", "--target", 5) == 0  # which preset it was is remembered
    later = capsys.readouterr().out
    assert f"{checkpoint} {how.replace('4', '5', 1).replace('for_4', 'for_5')}" in later
    assert "-tr nnUNetTrainerCVA_PrimusM" in later


def test_a_view_of_primus_is_whole_tokens_and_one_of_a_unet_whole_cells(folders, capsys):
    assert call("-d", 500, "--preset", "primusm_96", "--view", 24, 32, 40) == 0
    assert planned(folders[1])["configurations"]["3d_fullres_cva"]["patch_size"] == [24, 32, 40]
    assert call("-d", 500, "--preset", "primusm_96", "--view", 24, 32, 36) == 2
    assert "--view 24x32x36: expected multiples of 8x8x8" in capsys.readouterr().err
    assert call("-d", 500, "--preset", "resencl_96", "--view", 24, 32, 40) == 2
    assert "expected multiples of 32x32x32" in capsys.readouterr().err


def test_a_plans_file_of_ones_own_is_a_preset(folders, tmp_path):
    _, preprocessed = folders
    mine = nnunet_plans.from_preset("tiny")
    mine["configurations"]["3d_fullres"]["spacing"] = [3.0, 3.0, 3.0]
    (tmp_path / "mine.json").write_text(json.dumps(mine))
    assert call("-d", 500, "--preset", tmp_path / "mine.json") == 0
    assert planned(preprocessed)["configurations"]["3d_fullres"]["spacing"] == [3.0, 3.0, 3.0]


# ---- targets


@pytest.fixture
def targets(folders):
    """Two labelled datasets: one by z-score at 1 mm with a residual U-Net, one CT at 2 x 1 x 1 mm with a plain U-Net."""
    raw, preprocessed = folders
    first = tiny_plans(view=(16, 24, 16))
    first["foreground_intensity_properties_per_channel"] = {"0": {"mean": 7.0}}
    second = tiny_plans(view=(16, 24, 16), kind="plain")
    second["configurations"]["3d_fullres"].update(spacing=[2.0, 1.0, 1.0], normalization_schemes=["CTNormalization"])
    second["foreground_intensity_properties_per_channel"] = {"0": {"mean": -8.0}}
    labelled_dataset(raw, preprocessed, "Dataset004_First", first)
    labelled_dataset(raw, preprocessed, "Dataset005_Second", second, spacing=(2.0, 1.0, 1.0), first=500)
    return raw, preprocessed


def everything(folder):
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_for_one_target_its_own_plans_are_used_and_left_alone(targets, capsys):
    raw, preprocessed = targets
    before = everything(preprocessed / "Dataset004_First"), everything(raw / "Dataset004_First")
    assert call("-d", 500, "--target", 4) == 0
    assert before == (everything(preprocessed / "Dataset004_First"), everything(raw / "Dataset004_First"))
    ours, theirs = planned(preprocessed), planned(preprocessed, "Dataset004_First", "nnUNetPlans")
    mine, base = ours["configurations"]["3d_fullres"], theirs["configurations"]["3d_fullres"]
    assert {k for k in base if base[k] != mine.get(k)} == {"data_identifier", "cva"}
    assert ours["foreground_intensity_properties_per_channel"] == {"0": {"mean": 7.0}}
    assert encoder_shapes(ours) == encoder_shapes(theirs, classes=2)
    out = capsys.readouterr().out
    assert 'nnUNetv2_train 4 3d_fullres 0 -p nnUNetPlans -pretrained_weights "$nnUNet_results/Dataset500_Images/' in out


def fine_tunes_from(source, plans, preprocessed, folder):
    """Whether stock nnU-Net's loader takes the pretraining's weights for the target's stock trainer, with the whole encoder."""
    pretrained = network(source)
    torch.save({"network_weights": pretrained.state_dict()}, folder / "weights.pth")
    dataset = json.loads((preprocessed / plans["dataset_name"] / "dataset.json").read_text())
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = nnUNetTrainer({**plans, "continue_training": False}, "3d_fullres", 0, dataset, torch.device("cpu"))
        (preprocessed / plans["dataset_name"] / trainer.configuration_manager.data_identifier).mkdir(exist_ok=True)
        Path(trainer.preprocessed_dataset_folder, "case.b2nd").touch()  # by which nnU-Net recognises the format
        trainer.initialize()
        load_pretrained_weights(trainer.network, str(folder / "weights.pth"))
    loaded = trainer.network.encoder.state_dict()
    return all(torch.equal(loaded[k], v) for k, v in pretrained.encoder.state_dict().items())


def test_for_two_targets_one_fixed_plan_is_written_into_source_and_targets(targets, tmp_path, capsys):
    _, preprocessed = targets
    untouched = everything(preprocessed / "Dataset004_First")
    assert call("-d", 500, "--target", 4, 5) == 0
    assert everything(preprocessed / "Dataset004_First") == untouched
    source, first = planned(preprocessed), planned(preprocessed, "Dataset004_First", "nnUNetPlans")
    second = planned(preprocessed, "Dataset005_Second")
    assert encoder_shapes(source) == encoder_shapes(first) == encoder_shapes(second)
    assert fine_tunes_from(source, first, preprocessed, tmp_path) and fine_tunes_from(source, second, preprocessed, tmp_path)
    kept = second["configurations"]["3d_fullres"]
    assert kept["spacing"] == [1.0, 1.0, 1.0] and kept["normalization_schemes"] == ["CTNormalization"] and "cva" not in kept
    assert kept["data_identifier"] == "nnUNetPlansCVA_3d_fullres" and second["dataset_name"] == "Dataset005_Second"
    assert second["foreground_intensity_properties_per_channel"] == {"0": {"mean": -8.0}}
    assert "nnUNetv2_preprocess -d 5 -plans_name nnUNetPlansCVA -c 3d_fullres" in capsys.readouterr().out


def test_a_preset_is_written_into_all_targets_and_kept_plans_into_later_ones(targets, capsys):
    _, preprocessed = targets
    assert call("-d", 500, "--target", 4, "--preset", "tiny") == 0
    source, first = planned(preprocessed), planned(preprocessed, "Dataset004_First")
    assert encoder_shapes(source) == encoder_shapes(first) and first["configurations"]["3d_fullres"]["spacing"] == [2.0] * 3
    before = everything(preprocessed / "Dataset500_Images")
    assert call("-d", 500, "--target", 5, "--keep-plans") == 0
    after = everything(preprocessed / "Dataset500_Images")
    changed = {Path(path).name for path in after if after[path] != before[path]}
    assert changed == {INSPECTION, "cva_written.json"}  # what was looked at, and the target
    assert encoder_shapes(planned(preprocessed, "Dataset005_Second")) == encoder_shapes(source)
    theirs = preprocessed / "Dataset004_First" / "nnUNetPlansCVA.json"
    added = {"inherits_from": "3d_fullres", "patch_size": [16, 16, 16]}
    theirs.write_text(json.dumps({**first, "configurations": {**first["configurations"], "3d_small": added}}))
    assert call("-d", 500, "--target", 4, "--preset", "tiny") == 0, "a configuration that a user has added is no difference"
    assert planned(preprocessed, "Dataset004_First")["configurations"] == {**first["configurations"], "3d_small": added}
    planned_before = everything(preprocessed / "Dataset004_First")
    assert call("-d", 500, "--target", 4, "--preset", "resencl_96") == 2
    assert "exists and differs" in capsys.readouterr().err and everything(preprocessed / "Dataset004_First") == planned_before


def test_other_numbers_of_channels_are_pointed_out(targets, capsys):
    raw, preprocessed = targets
    four = tiny_plans()
    four["configurations"]["3d_fullres"].update(normalization_schemes=["ZScoreNormalization"] * 2, use_mask_for_norm=[False] * 2)
    four["foreground_intensity_properties_per_channel"] = {"0": {"mean": 1.0}, "1": {"mean": 2.0}}
    labelled_dataset(raw, preprocessed, "Dataset006_Two", four, channels=("T1", "T2"))
    assert call("-d", 500, "--target", 6) == 0
    weights = "$nnUNet_results/Dataset500_Images/nnUNetTrainerCVA__nnUNetPlansCVA__3d_fullres_cva/fold_all/checkpoint_final.pth"
    assert (
        f"for Dataset006_Two:\n  nnUNetv2_preprocess -d 6 -plans_name nnUNetPlans -c 3d_fullres\n"
        f'  nnUNetv2_cva export "{weights}"'
        f" -d 6 -c 3d_fullres -p nnUNetPlans -o weights_for_6.pth\n"
        f"  nnUNetv2_train 6 3d_fullres 0 -p nnUNetPlans -pretrained_weights weights_for_6.pth{device()}\n"
    ) in capsys.readouterr().out
    assert PlansManager(planned(preprocessed)).get_configuration("3d_fullres").normalization_schemes == ["ZScoreNormalization"]


def test_validation_images_of_a_target_are_found_by_their_voxels_and_can_be_left_out(targets, tmp_path, capsys):
    raw, preprocessed = targets
    fold = [{"train": [f"First_{i:03d}" for i in (0, 1, 2)], "val": [f"First_{i:03d}" for i in (3, 4, 5)]}]
    (preprocessed / "Dataset004_First" / "splits_final.json").write_text(json.dumps(fold))
    write_several(tmp_path / "pile", 3)
    write(tmp_path / "pile" / "renamed.nrrd", voxels(140))  # First_004 in another format
    write(tmp_path / "pile" / "trained_on.nrrd", voxels(110))  # First_001
    assert call("-d", "Dataset504_Pile", "--images", tmp_path / "pile", "--target", 4) == 0
    out = capsys.readouterr().out
    assert "WARNING: 1 of 3 validation cases of fold 0 of Dataset004_First are in the pretraining set (First_004)" in out
    assert call("-d", 504, "--target", 4, "--hold-out", 0) == 0
    assert "WARNING" not in capsys.readouterr().out.replace("WARNING: in ", "")
    cases = (preprocessed / "Dataset504_Pile" / "cases.csv").read_text()
    assert "pile__trained_on" in cases and "pile__renamed" not in cases
    rejected = (preprocessed / "Dataset504_Pile" / "rejected.csv").read_text()
    assert "pile__renamed,held out: a target validates on it" in rejected
    assert call("-d", 504, "--preset", "tiny") == 0  # stays out until images are given anew
    assert "1 cases stay left out, by an earlier --hold-out" in capsys.readouterr().out
    assert "pile__renamed" not in (preprocessed / "Dataset504_Pile" / "cases.csv").read_text()
    assert call("-d", 504, "--images", tmp_path / "pile", "--preset", "tiny") == 0
    assert "pile__renamed" in (preprocessed / "Dataset504_Pile" / "cases.csv").read_text()


def test_without_a_split_of_its_own_the_targets_default_split_counts(targets, capsys):
    """Reference: nnU-Net's rule, five folds; the images of the target itself are pretrained on, so all are in."""
    assert call("-d", "Dataset505_Own", "--images", 4, "--target", 4) == 0
    out = capsys.readouterr().out
    assert [f"of fold {i} of Dataset004_First" in out for i in range(6)] == [True] * 5 + [False]


@pytest.fixture
def pile(targets, tmp_path):
    """A pile of images of which two are First_003 and First_004; the target has a split of two folds."""
    _, preprocessed = targets
    names = [f"First_{i:03d}" for i in range(6)]
    folds = [{"train": names[:3], "val": names[3:]}, {"train": names[3:], "val": names[:3]}]
    (preprocessed / "Dataset004_First" / "splits_final.json").write_text(json.dumps(folds))
    write_several(tmp_path / "pile", 3)
    for n in (3, 4):
        write(tmp_path / "pile" / f"renamed_{n}.nrrd", voxels(100 + 10 * n))
    assert call("-d", "Dataset504_Pile", "--images", tmp_path / "pile", "--target", 4, "--view", 16, 16, 16) == 0
    return targets


def used(preprocessed):
    with open(preprocessed / "Dataset504_Pile" / "cases.csv") as f:
        return [row["case"] for row in csv.DictReader(f)]


def test_plans_that_are_kept_for_a_later_target_are_checked_against_it(pile, capsys):
    capsys.readouterr()
    assert call("-d", 504, "--keep-plans", "--target", 4) == 0
    assert "WARNING: 2 of 3 validation cases of fold 0 of Dataset004_First are in the pretraining set" in capsys.readouterr().out
    assert call("-d", 504, "--keep-plans", "--target", 4, "--hold-out", 0) == 2


@pytest.mark.parametrize("fold", [2, -1])
def test_a_fold_that_does_not_exist_is_an_error_and_changes_nothing(pile, capsys, fold):
    _, preprocessed = pile
    assert call("-d", 504, "--target", 4, "--hold-out", 0) == 0
    before = everything(preprocessed / "Dataset504_Pile")
    assert call("-d", 504, "--target", 4, "--hold-out", fold) == 2
    assert f"--hold-out {fold}: Dataset004_First has the folds 0 to 1" in capsys.readouterr().err
    assert everything(preprocessed / "Dataset504_Pile") == before and len(used(preprocessed)) == 3


def test_what_cannot_be_checked_is_said_and_an_error_where_it_was_asked_for(pile, capsys):
    raw, preprocessed = pile
    (raw / "Dataset004_First" / "imagesTr" / "First_005_0000.nii.gz").unlink()
    capsys.readouterr()
    assert call("-d", 504, "--target", 4) == 0
    assert "The images of 1 of 3 validation cases of fold 0 of Dataset004_First were not found" in capsys.readouterr().out
    assert call("-d", 504, "--target", 4, "--hold-out", 0) == 2 and "not found in nnUNet_raw" in capsys.readouterr().err
    (raw / "Dataset004_First").rename(raw / "moved")
    assert call("-d", 504, "--target", 4) == 0
    assert "could not check whether Dataset004_First validates on images that are pretrained on" in capsys.readouterr().out
    assert call("-d", 504, "--target", 4, "--hold-out", 0) == 2
    assert "Dataset004_First cannot be compared with the pretraining set" in capsys.readouterr().err
    assert len(used(preprocessed)) == 5


def test_what_is_held_out_after_preprocessing_is_not_trained_on(pile, capsys):
    _, preprocessed = pile
    assert main.main(["preprocess", "-d", "504", "-np", "1"]) == 0
    data = preprocessed / "Dataset504_Pile" / "nnUNetPlansCVA_3d_fullres_images_only"
    assert len(read_index(data).keys) == 5
    assert call("-d", 504, "--target", 4, "--hold-out", 0) == 0
    assert list(read_index(data).keys) == used(preprocessed) == ["pile__case_0", "pile__case_1", "pile__case_2"]
    assert "Cases that are no longer used were taken out of" in capsys.readouterr().out


# ---- what may not be done


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("-d", 4), "Dataset004_First is a dataset with labels.*--images Dataset004_First"),
        (("-d", 77), "No dataset 77 .*full name, for example -d Dataset500_HeadMR"),
        (("-d", "Dataset507_New"), "No images for Dataset507_New: give --images"),
        (("-d", 500, "--preset", "big"), "expected one of .*ssl3d_resencl"),
        (("-d", 500, "-pl", "Nobody"), "no such planner"),
        (("-d", 500, "--target", 4, "--target-plans", "Other"), r"Other.json not found \(plans there: nnUNetPlans\)"),
        (("-d", 500, "--target", 4, "-c", "2d"), "2D. Pretraining needs a 3D"),
        (("-d", 500, "--target", 4, "-c", "nope"), "no configuration 'nope'. Found: 3d_fullres, 2d"),
        (("-d", 500, "--preset", "tiny", "--view", 48, 48, 50), "--view 48x48x50: expected multiples .* 8x8x8"),
        (("-d", 500, "--preset", "tiny", "--view", 0, 0, 0), "--view 0x0x0: expected multiples .* 8x8x8"),
        (("-d", 500, "--preset", "tiny", "--view", -8, -8, -8), "--view -8x-8x-8: expected multiples .* 8x8x8"),
        (("-d", 500, "--preset", "tiny", "--batch-size", 0), "--batch-size 0: expected 1 to 7"),
        (("-d", 500, "--preset", "tiny", "--batch-size", -1), "--batch-size -1: expected 1 to 7"),
        (("-d", 500, "--preset", "tiny", "--batch-size", 8), "--batch-size 8: expected 1 to 7"),
        (("-d", "Dataset004_Other", "--images", 5), "the id 4 with that of Dataset004_First"),
        (("-d", 500, "--preset", "tiny", "--modality", "T1", "T2"), r"--modality T1 T2: expected 1 name"),
        (("-d", 500, "--keep-plans"), "name them with --target"),
        (("-d", 500, "--images", "/nowhere"), "no such folder"),
        (("-d", 500, "--adopt", 4, "--images", 4), "make two datasets"),
    ],
)
def test_wrong_requests_end_with_one_line(targets, capsys, arguments, match):
    assert call(*arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(match, error), error


def test_a_conflict_with_a_target_is_found_before_anything_is_written(targets, capsys):
    _, preprocessed = targets
    other = tiny_plans()
    (preprocessed / "Dataset005_Second" / "nnUNetMine.json").write_text(json.dumps({**other, "plans_name": "nnUNetMine"}))
    assert call("-d", 500, "--preset", "tiny", "--target", 4, 5, "-p", "nnUNetMine") == 2
    assert "exists and differs" in capsys.readouterr().err
    assert [p.parent.name for p in preprocessed.glob("*/nnUNetMine.json")] == ["Dataset005_Second"]


@pytest.mark.parametrize("value", ["x", "0", "-2"])
def test_a_number_of_processes_that_is_none_is_one_line(folders, monkeypatch, capsys, value):
    monkeypatch.setenv("nnUNet_def_n_proc", value)
    with pytest.raises(SystemExit, match="2"):
        main.main(["plan", "-d", "500"])
    assert f"argument -np: expected a whole number from 1 on, found '{value}'" in capsys.readouterr().err


def test_without_a_place_to_write_it_says_so(monkeypatch, capsys):
    assert call("-d", 500) == 2 and "nnUNet_preprocessed is not set" in capsys.readouterr().err


def test_planning_again_keeps_what_the_user_has_added(folders):
    _, preprocessed = folders
    call("-d", 500, "--preset", "tiny")
    path = preprocessed / "Dataset500_Images" / "nnUNetPlansCVA.json"
    plans = json.loads(path.read_text())
    plans["configurations"]["mine"] = {"inherits_from": "3d_fullres_cva", "batch_size": 3}
    plans["configurations"]["3d_fullres_cva"]["cva"]["epochs"] = 9
    path.write_text(json.dumps(plans))
    call("-d", 500, "--preset", "tiny", "--batch-size", 5)
    again = planned(preprocessed)["configurations"]
    assert again["mine"] == plans["configurations"]["mine"] and again["3d_fullres_cva"]["cva"]["epochs"] == 9
    assert again["3d_fullres_cva"]["batch_size"] == 5


def cva(preprocessed):
    return planned(preprocessed)["configurations"]["3d_fullres_cva"]["cva"]


@pytest.fixture
def plain(tmp_path):
    """A preset without settings of its own."""
    preset = nnunet_plans.from_preset("tiny")
    preset["configurations"]["3d_fullres_cva"].update(cva={}, patch_size=[64, 64, 64])
    (tmp_path / "plain.json").write_text(json.dumps(preset))
    return tmp_path / "plain.json"


def test_settings_of_an_earlier_plan_do_not_stay(folders, plain, capsys):
    """Only what the user has changed does: values, additions and removals."""
    _, preprocessed = folders
    path = preprocessed / "Dataset500_Images" / "nnUNetPlansCVA.json"
    call("-d", 500, "--preset", "tiny")
    assert cva(preprocessed)["epochs"] == 4 and cva(preprocessed)["mask_block"] == 8
    call("-d", 500, "--preset", plain)
    assert cva(preprocessed) == {} and "kept" not in capsys.readouterr().out
    call("-d", 500, "--preset", "tiny")
    plans = json.loads(path.read_text())
    block = plans["configurations"]["3d_fullres_cva"]["cva"]
    block.update(seed=3, epochs=9)
    del block["head_width"]
    path.write_text(json.dumps(plans))
    call("-d", 500, "--preset", "tiny")
    assert cva(preprocessed) == block
    call("-d", 500, "--preset", plain)
    assert cva(preprocessed) == {"seed": 3, "epochs": 9}
    out = capsys.readouterr().out
    assert 'changes of "cva" were kept: head_width removed, epochs 9, seed 3.' in out
    assert 'changes of "cva" were kept: epochs 9, seed 3.' in out


# ---- the view, and what it takes


@pytest.mark.parametrize("shape", [(40, 60, 52), (18, 90, 70), (34, 50, 35)])
def test_a_proposed_view_leaves_room_in_most_cases(shape):
    rng = np.random.default_rng(0)
    shapes = [tuple(int(n) for n in np.multiply(shape, rng.uniform(0.85, 1.2, 3))) for _ in range(30)]
    largest, step = (16 * -(-shape[0] // 16), 16 * -(-shape[1] // 16), 8 * -(-shape[2] // 8)), (4, 8, 8)
    view, found = view_size.propose_view(shapes, largest, step, CVAConfig())
    assert found.fits >= view_size.ROOM_IN * 30 and found.cases == 30
    assert all(v % s == 0 and v <= n for v, s, n in zip(view, step, largest))
    assert view != largest and view_size.room(shapes, largest, CVAConfig()).fits < view_size.ROOM_IN * 30


def test_a_view_that_fits_is_proposed_as_it_is():
    assert view_size.propose_view([(90, 80, 100)] * 3, (32, 40, 32), (8, 8, 8), CVAConfig())[0] == (32, 40, 32)


def test_cases_smaller_than_any_view_end_with_the_smallest():
    view, found = view_size.propose_view([(6, 7, 5)] * 4, (32, 32, 32), (8, 8, 8), CVAConfig())
    assert view == (16, 16, 16) and found.fits == 0


def linear(view, cases, mode):
    """GB by a rule of thumb: what a count might say."""
    return 2 + {False: 4, "selective": 2, True: 1}[mode] * cases * np.prod(view) / 1e6


def counting(block=None, recipe=None, config=DEFAULT):
    def measure(plans, name, trainer, config):
        found = plans["configurations"][name]
        assert trainer == (recipe or user_changes.Recipe()).trainer and found["inherits_from"] == "3d_fullres"
        return linear(found["patch_size"], found["batch_size"], found["cva"]["gradient_checkpointing"])

    plans = {"configurations": {"3d_fullres": {}, "other": {}}}
    return memory_plan.Counting(plans, "3d_fullres", recipe or user_changes.Recipe(), config, block or {}, measure)


def test_what_was_not_counted_is_calculated_from_what_was():
    """Reference: the counted itself, where it is linear."""
    steps = counting()
    calculate = steps.calculated(steps.counted((96, 96, 64), 4, False))
    for wanted in (((96, 96, 64), 4, True), ((64, 96, 64), 2, False), ((32, 64, 64), 8, "selective")):
        assert np.isclose(calculate(*wanted).gb, steps.counted(*wanted).gb)


@pytest.mark.parametrize(
    ("gb", "view", "cases", "mode"),
    [
        (33.8, (128, 96, 128), 4, False),
        (19.6, (128, 96, 128), 4, "selective"),
        (7.77, (96, 96, 96), 4, True),
        (7.55, (128, 96, 128), 2, True),
        (4.93, (96, 64, 96), 2, True),
    ],
)
def test_a_card_gets_the_largest_view_with_as_little_recomputed_as_fits(gb, view, cases, mode):
    """First some of it recomputed, then smaller views to half of the voxels, then fewer cases."""
    steps = counting()
    start = steps.counted((128, 96, 128), 4, False)
    views = view_size.smaller(start.view, (32, 32, 32), np.array([138, 114, 121]))
    found = memory_plan.best(gb, start, steps.calculated(start), views, False, memory_plan.MODES)
    assert (found.view, found.cases, found.checkpointing) == (view, cases, mode) and found.gb <= gb


def test_nothing_fits_onto_no_card():
    steps = counting()
    start = steps.counted((64, 64, 64), 2, False)
    assert memory_plan.best(1, start, steps.calculated(start), [start.view], True, memory_plan.MODES) is None


def test_one_step_has_one_number(monkeypatch):
    """Of what was calculated for the table and then counted, the count is said."""
    monkeypatch.setattr(view_size, "CARDS", (7,))
    linear_steps = counting()

    def measure(plans, name, *others):
        again = plans["configurations"][name]["cva"]["gradient_checkpointing"]
        return linear_steps.measure(plans, name, *others) + (0.4 if again else 0)

    steps = dataclasses.replace(linear_steps, measure=measure)
    start = (128, 96, 128)
    views = view_size.smaller(start, (32, 32, 32), np.array([138, 114, 121]))
    chosen, (said, line) = view_size._onto_card(steps, start, 4, views, False, (7, "as asked"))
    calculated = steps.calculated(steps.counted(start, 4, False))(chosen.view, chosen.cases, chosen.checkpointing)
    assert calculated == chosen and f"{calculated.gb:.2g}" != f"{chosen.gb:.2g}"
    assert line == f"  on 7 GB: {chosen}" and f"about {chosen.gb:.2g} GB" in said


def test_the_recipe_says_what_it_recomputes():
    own = DEFAULT.updated({"gradient_checkpointing": "selective"}, "a recipe")
    assert counting(config=own).usual == "selective" and counting({"gradient_checkpointing": False}, config=own).usual is False
    assert counting().usual == DEFAULT.gradient_checkpointing and counting({"gradient_checkpointing": True}).usual is True


def test_a_plan_fits_onto_the_card_it_is_made_for(folders, monkeypatch, capsys):
    """With the count itself."""
    monkeypatch.setattr("nnunetv2_cva.plan.counted", counted)
    for gb, cases in ((24, 4), (1.2, 2)):
        assert call("-d", 500, "--preset", "tiny", "--gpu-memory", gb, "--batch-size", cases, "--view", 16, 16, 16) == 0
        out = capsys.readouterr().out
        assert f"of {gb} GB (as asked)" in out and all(f"  on {card} GB: view 16x16x16" in out for card in memory_plan.CARDS)
    assert call("-d", 500, "--preset", "tiny", "--gpu-memory", 0.5) == 0
    assert "WARNING: nothing that fits onto 0.5 GB (as asked)" in capsys.readouterr().out
    assert call("-d", 500, "--preset", "tiny", "--gpu-memory", 0) == 2
    assert "--gpu-memory 0: expected a positive number" in capsys.readouterr().err


# ---- statistics and splits


def described_by(voxels):
    return {"quantiles": np.quantile(voxels, QUANTILES).tolist()}


@pytest.mark.parametrize("outlier", [1e6, 1e30, -1e30])
def test_one_voxel_moves_no_statistics_that_images_are_normalised_with(outlier):
    rng = np.random.default_rng(0)
    healthy = [rng.normal(100, 200, 20000) for _ in range(5)]
    spoilt = [np.append(healthy[0], outlier), *healthy[1:]]
    before, after = (fingerprint.pooled([described_by(x) for x in cases]) for cases in (healthy, spoilt))
    for name in ("mean", "std", "median", "percentile_00_5", "percentile_99_5"):
        assert np.isclose(before[name], after[name], rtol=0.01, atol=1), name


def test_pooled_statistics_are_those_of_equally_many_voxels_of_every_case():
    rng = np.random.default_rng(0)
    samples = [rng.normal(m, s, 20000) for m, s in ((0, 10), (300, 50), (310, 5))]
    found, everything = fingerprint.pooled([described_by(x) for x in samples]), np.concatenate(samples)
    assert np.isclose(found["min"], everything.min()) and np.isclose(found["max"], everything.max())
    clipped = np.clip(everything, *np.quantile(everything, (0.005, 0.995)))
    assert np.isclose(found["mean"], clipped.mean(), rtol=0.01) and np.isclose(found["std"], clipped.std(), rtol=0.01)
    for name, level in (("percentile_00_5", 0.005), ("median", 0.5), ("percentile_99_5", 0.995)):
        assert abs(np.mean(everything <= found[name]) - level) < 0.002, name


def test_splits_are_by_subject():
    found = [(f"case_{i}", f"subject_{i // 3}") for i in range(40)]
    splits = fingerprint.splits(found)
    assert len(splits) == 5 and splits == fingerprint.splits(found[::-1])
    subject = dict(found)
    for fold in splits:
        train, val = ({subject[k] for k in fold[side]} for side in ("train", "val"))
        assert not train & val and sorted(fold["train"] + fold["val"]) == sorted(k for k, _ in found)
    assert sorted(k for fold in splits for k in fold["val"]) == sorted(subject)


@pytest.mark.parametrize(("subjects", "folds"), [(1, 0), (2, 2), (4, 4), (5, 5)])
def test_few_subjects_give_few_folds(subjects, folds):
    assert len(fingerprint.splits([(f"c{i}", f"s{i % subjects}") for i in range(10)])) == folds


# ---- real volumes


@pytest.mark.skipif(not (SHARED / "Dataset101_BodyCT").is_dir(), reason="needs the shared volumes")
def test_real_ct(tmp_path, monkeypatch):
    _, preprocessed = nnunet_folders(tmp_path, monkeypatch)
    monkeypatch.setenv("nnUNet_raw", str(SHARED))
    assert call("-d", 101, "--modality", "CT", "--preset", "tiny") == 0
    intensities = planned(preprocessed, "Dataset101_BodyCT")["foreground_intensity_properties_per_channel"]["0"]
    assert intensities["percentile_00_5"] < -900 and 500 < intensities["percentile_99_5"] < 2000  # lungs and bone are in
