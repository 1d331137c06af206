"""What people really bring: their scanners' files, their names, their spreadsheets, their damaged voxels."""

import contextlib
import csv
import gzip
import html
import io
import json
import locale
import os
import re
import shlex
import shutil

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from helpers.dicom import write_series
from helpers.images import labelled_dataset, nnunet_folders, voxels, write, write_several
from helpers.projects import plans as tiny_plans
from helpers.targets import pretraining
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_cva.commands import main
from nnunetv2_cva.datasets import fingerprint
from nnunetv2_cva.datasets.anonymous import neutral
from nnunetv2_cva.datasets.dicom import check_slices, files_of
from nnunetv2_cva.datasets.findings import body_mask, dwarfed, inspect_case
from nnunetv2_cva.datasets.formats import Unusable
from nnunetv2_cva.datasets.gathering import remarks
from nnunetv2_cva.datasets.next_steps import device, fine_tuning_steps, pretraining_steps
from nnunetv2_cva.datasets.planning import dataset_for
from nnunetv2_cva.datasets.reading import read_images
from nnunetv2_cva.datasets.sources import Candidate, Sources, candidates
from nnunetv2_cva.datasets.tables import read_table
from nnunetv2_cva.datasets.user_changes import Recipe, save_plans, save_targets
from nnunetv2_cva.training.messages import closing
from nnunetv2_cva.transfer.table import data_warnings
from nnunetv2_cva.transfer.target import Target


def looked_at(*files):
    return inspect_case(Candidate("case", tuple(map(str, files)), "", "case"))


def found(*folders, **options):
    return candidates(Sources(tuple(map(str, folders)), **options), "Dataset500_Own", {})


def subjects(*folders, **options):
    return [c.subject for c in found(*folders, **options).cases]


# ---- statistics


def thorax():
    """CT: air at -1000, a body of half the volume around 40."""
    rng = np.random.default_rng(0)
    image = np.full((40, 48, 44), -1000.0, np.float32)
    image[8:32, 8:40, 6:38] = 40
    return image + rng.normal(0, 20, image.shape).astype(np.float32)


@pytest.mark.parametrize(("share", "value"), [(0.003, 3000), (0.01, 30000), (0.0001, 1e30)])
def test_metal_is_not_taken_for_the_body(share, value):
    image = thorax()
    expected = body_mask(image)
    image[20].flat[: int(share * image.size)] = value
    mask = body_mask(image)
    assert np.mean(mask != expected) < 0.02 and mask[20, 24, 22]


@pytest.mark.parametrize("value", [1e5, 3.4e38])
def test_a_voxel_that_dwarfs_the_others_is_told_from_a_bright_image(tmp_path, value):
    image = voxels(1).astype(np.float32)
    assert not dwarfed(looked_at(write(tmp_path / "good.nii.gz", image)).intensities[0])
    assert not dwarfed(looked_at(write(tmp_path / "scaled.nii.gz", image * 1e4)).intensities[0])
    image[7, 7, 7] = value
    assert "99.8 % within" in dwarfed(looked_at(write(tmp_path / "bad.nii.gz", image)).intensities[0])


def test_the_odd_one_out_of_ct_is_named_with_its_numbers(tmp_path):
    cases = []
    for i, shift in enumerate((0, 0, 0, 0, 0, 6000)):  # one was saved without the rescaling to Hounsfield units
        case = looked_at(write(tmp_path / f"{i}.nii.gz", thorax() + shift + i))
        cases.append(Candidate(f"ct_{i}", case.files, "", "") and case.of(Candidate(f"ct_{i}", case.files, "", "")))
    (line,) = fingerprint.odd_cases(cases, 0)
    assert line.startswith("ct_5: half of its body lies above 60") and "Is it in the same unit?" in line
    assert fingerprint.odd_cases(cases[:5], 0) == []


# ---- names


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (["scan_0001", "scan_0002", "scan_0003"], 3),  # counters
        (["p1_2019", "p1_2021", "p2_2020"], 3),  # years
        (["imagesTr/scan_0001", "imagesTr/scan_0002"], 2),  # counters where nnU-Net's layout would have channels
        (["imagesTr/a_0000", "imagesTr/a_0001", "imagesTr/b_0000"], 2),  # channels
        (["患者一", "患者二", "Пациент 1", "Пациент 2", "é", "è"], 6),
        (["a#1", "a$1", "a 1"], 3),
        (["sub-01/T1", "sub-01/T2", "sub-02/T1"], 2),
        (["sub-cohort/a", "sub-cohort/b"], 2),
        (["substance/a", "x-sub-1/b", "x-sub-1/c"], 3),
        (["sub-01_T1", "sub-01_T2", "sub-010_T1"], 2),
    ],
)
def test_who_is_who(tmp_path, names, count):
    for name in names:
        path = tmp_path / "x" / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    cases = found(tmp_path / "x").cases
    assert len({c.subject for c in cases}) == count and len({c.key for c in cases}) == len(names)
    assert all(len(os.fsencode(c.key)) < 200 for c in cases)


def test_long_names_in_other_scripts_fit_into_file_names_and_stay_apart(tmp_path):
    for name in ("医" * 80 + "一", "医" * 80 + "二"):
        (tmp_path / f"{name}.nii").touch()
    keys = [c.key for c in found(tmp_path).cases]
    assert len(set(keys)) == 2 and all(len(os.fsencode(k)) <= 180 for k in keys)


def test_a_number_that_nnunet_would_confuse_is_refused(tmp_path, monkeypatch):
    _, preprocessed = nnunet_folders(tmp_path, monkeypatch)
    (preprocessed / "Dataset123_Heads").mkdir()
    assert dataset_for("Dataset456_New") == "Dataset456_New" and dataset_for("Dataset1999_Big") == "Dataset1999_Big"
    with pytest.raises(ValueError, match="confuse the id 1234 with that of Dataset123_Heads"):
        dataset_for("Dataset1234_Big")


# ---- what readers see


@pytest.mark.parametrize(("unit", "factor"), [("micron", 1000), ("meter", 0.001), ("mm", 1), ("unknown", 1)])
def test_spacings_are_those_of_nnunets_reader(tmp_path, unit, factor):
    image = nibabel.Nifti1Image(voxels(1), np.diag([0.9 * factor, 0.8 * factor, 0.7 * factor, 1]))
    image.header.set_xyzt_units(unit)
    nibabel.save(image, tmp_path / "a.nii.gz")
    case = looked_at(tmp_path / "a.nii.gz")
    assert case.reason == "" and np.allclose(case.spacing, (0.7, 0.8, 0.9))


@pytest.mark.parametrize("name", ["a.nii.gz", "twice.nii.gz", "tail.nii.gz", "two.nii.gz"])
def test_odd_packings_that_readers_take_are_taken(tmp_path, name):
    """Not packed at all; several members; bytes behind the end; NIfTI-2."""
    kind = nibabel.Nifti2Image if name.startswith("two") else nibabel.Nifti1Image
    nibabel.save(kind(voxels(1), np.eye(4)), tmp_path / "plain.nii")
    content = (tmp_path / "plain.nii").read_bytes()
    packed = {
        "a": content,
        "twice": gzip.compress(content[:1000]) + gzip.compress(content[1000:]),
        "tail": gzip.compress(content) + b"\0" * 100 + b"more",
        "two": gzip.compress(content),
    }
    (tmp_path / name).write_bytes(packed[name.split(".")[0]])
    case = looked_at(tmp_path / name)
    assert case.reason == "" and case.content == looked_at(tmp_path / "plain.nii").content
    if name == "twice.nii.gz":
        (tmp_path / name).write_bytes(packed["twice"][:-20])
        assert looked_at(tmp_path / name).reason.startswith("truncated")


def test_a_tiffs_spacing_stands_in_the_file_of_its_name(tmp_path):
    for name in ("scan2", "abcde12345", "alone"):
        tifffile.imwrite(tmp_path / f"{name}.tif", voxels(1).astype(np.uint16))
    for name, spacing in (("scan2", [3, 0.5, 0.6]), ("abcde", [9, 9, 9]), ("abcde12345", [2, 1, 1])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"spacing": spacing}))
    assert looked_at(tmp_path / "scan2.tif").spacing == (3, 0.5, 0.6)
    assert looked_at(tmp_path / "abcde12345.tif").spacing == (2, 1, 1)
    alone = looked_at(tmp_path / "alone.tif")
    assert alone.spacing == (1, 1, 1) and alone.remark.startswith("no JSON file with its spacing beside it")


@pytest.mark.parametrize(
    ("origin", "direction", "expected"),
    [
        ((0.01, 0, 0), (1, 1), ""),  # rounded
        ((3, 0, 0), (1, 1), "lies up to 3 mm from the first one (origin)"),
        ((15, 0, 0), (-1, 1), "(direction)"),  # stored mirrored over the same place
        ((0, 0, 0), (1, -1), "(direction)"),
    ],
)
@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd"])
def test_channels_lie_where_the_first_one_lies(tmp_path, origin, direction, expected, ending):
    for c in range(2):
        image = sitk.GetImageFromArray(voxels(c))
        if c:
            image.SetOrigin([float(o) for o in origin])
            image.SetDirection(np.diag([*map(float, direction), 1.0]).ravel().tolist())
        sitk.WriteImage(image, str(tmp_path / f"a_000{c}{ending}"))
    reason = looked_at(tmp_path / f"a_0000{ending}", tmp_path / f"a_0001{ending}").reason
    assert expected in reason and bool(reason) == bool(expected)


def test_what_nnunets_reader_warns_of_is_said_once_with_the_files_name(tmp_path, capfd):
    cases = []
    for name, shift in (("a", 0.01), ("b", 0.01), ("c", 0)):
        for c in range(2):
            image = sitk.GetImageFromArray(voxels(c))
            image.SetOrigin([c * shift, 0.0, 0.0])
            sitk.WriteImage(image, str(tmp_path / f"{name}_000{c}.nrrd"))
        cases.append(looked_at(tmp_path / f"{name}_0000.nrrd", tmp_path / f"{name}_0001.nrrd"))
    assert [c.reason for c in cases] == [""] * 3 and "origin" not in capfd.readouterr().out
    assert cases[2].remark == ""
    (said,) = remarks(cases)
    assert "2 of 3 cases" in said and "same origin" in said and "Origins: [" not in said
    assert said.count("a_0000.nrrd") == said.count("b_0000.nrrd") == 1 and "c_0000.nrrd" not in said


def test_label_maps_of_many_values_are_known_by_their_areas(tmp_path):
    areas = np.kron(np.arange(120).reshape(4, 5, 6), np.ones((6, 6, 6), int)).astype(np.int16)
    assert looked_at(write(tmp_path / "a.nii.gz", areas)).reason.startswith("looks like a segmentation: 120 different values")
    rng = np.random.default_rng(0)
    few = write(tmp_path / "few.nii.gz", rng.integers(0, 40, (24, 24, 24)).astype(np.int16))
    assert looked_at(few).remark == "may be a segmentation: only 40 different values, all whole numbers"
    photo = write(tmp_path / "8bit.nii.gz", rng.integers(0, 255, (24, 24, 24)).astype(np.uint8))
    assert looked_at(photo).reason == looked_at(photo).remark == ""


def test_a_speck_in_zeros_is_rejected_where_it_can_be_mended(tmp_path):
    image = np.zeros((30, 30, 30), np.int16)
    image[3:6, 9:12, 4:6] = voxels(0, (3, 3, 2), 0)
    assert "what is not zero takes 2x3x3 voxels" in looked_at(write(tmp_path / "a.nii.gz", image.T)).reason


# ---- tables and JSON

ROWS = [("path", "subject"), ("Müller.nii.gz", "s1"), ("b.nii.gz", "s2")]


@pytest.mark.parametrize(
    ("encoding", "delimiter", "begin"),
    [
        ("utf-8", ",", ""),
        ("utf-8-sig", ";", ""),
        ("utf-16", "\t", ""),
        ("cp1252", ";", ""),
        ("cp1252", ",", ""),
        ("utf-8-sig", ";", "sep=;\r\n"),
    ],
)
def test_a_table_is_read_whatever_program_saved_it(tmp_path, encoding, delimiter, begin):
    text = begin + "".join(delimiter.join(row) + "\r\n" for row in ROWS)
    (tmp_path / "list.csv").write_bytes(text.encode(encoding))
    rows = [row for _, row in read_table(tmp_path / "list.csv", ("path",))]
    assert rows == [dict(zip(ROWS[0], row)) for row in ROWS[1:]]
    for name in ("Müller", "b"):
        write(tmp_path / f"{name}.nii.gz", voxels(len(name)))
    cases = candidates(Sources(table=str(tmp_path / "list.csv")), "D", {}).cases
    assert sorted(c.files[0] for c in cases) == sorted(str(tmp_path / row[0]) for row in ROWS[1:])


def test_a_table_without_its_columns_is_one_sentence(tmp_path):
    (tmp_path / "cases.csv").write_text("case|path\na|b\n")
    with pytest.raises(ValueError, match=r"cases.csv: expected the columns case, path, found case\|path. Correct its first line"):
        read_table(tmp_path / "cases.csv", ("case", "path"))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('{"channel_names": {"1": "CT", "2": "PET"}}', {"CT", "PET"}),  # nnU-Net takes them in their order
        ('{"modality": {"0": "CT", "1": "PET"}}', {"CT", "PET"}),  # older
        ('{"channel_names": {"CT": 0, "PET": 1}}', {""}),
        ('[{"image": "a"}]', {""}),
        ("{ not json", {""}),
    ],
)
def test_the_dataset_json_beside_images_is_nnunets_or_is_said_and_left(tmp_path, text, names):
    for name in ("a_0000", "a_0001", "b_0000", "b_0001"):
        write(tmp_path / "imagesTr" / f"{name}.nii.gz", voxels())
    (tmp_path / "dataset.json").write_text(text)
    listed = found(tmp_path)
    assert {c.modality for c in listed.cases} == names and len(listed.cases) == 4
    assert bool(listed.remarks) == (names == {""}) and all("dataset.json" in r for r in listed.remarks)


# ---- DICOM, and what is not read


def test_a_series_is_a_case_whose_name_says_nothing_of_the_patient(tmp_path):
    """Reference: the array that was written, slices in the order of their positions."""
    image = voxels(1, (12, 20, 18))
    write_series(tmp_path / "DOE^JANE" / "1", image, "1.2.3.4")
    write_series(tmp_path / "DOE^JANE" / "2", voxels(2, (12, 20, 18)), "1.2.3.5", modality="CT")
    write_series(tmp_path / "other", voxels(3, (12, 20, 18)), "1.2.3.6", patient="18", ending=".IMA")
    (tmp_path / "other" / "report.pdf").touch()
    text = locale.setlocale(locale.LC_ALL)  # GDCM, which reads DICOM, sets it to C
    listed = found(tmp_path)
    assert len(listed.cases) == 3 and len({c.subject for c in listed.cases}) == 2 and listed.unread == {".pdf": 1}
    assert not [c for c in listed.cases if "doe" in (c.key + c.subject).lower() or "17" == c.subject[-2:]]
    (first,) = [c for c in listed.cases if "DOE^JANE/1" in c.files[0]]
    case = inspect_case(first)
    assert case.spacing == (2.0, 0.8, 0.9) and case.shape == (12, 20, 18) and first.modality == "MR"
    assert (read_images(first.files).images[0] == image).all()
    before = case.stamp
    os.remove(files_of(first.files[0])[3])
    assert looked_at(*first.files).stamp != before
    assert locale.setlocale(locale.LC_ALL) == text


@pytest.mark.parametrize(
    ("odd", "match"),
    [
        ({"skip": (5,)}, "slices missing or uneven: 2 to 4 mm apart, mostly 2"),
        ({"tags": {4: {"0020|0032": "0\\0\\9.5"}}}, "slices missing or uneven"),
        ({"tags": {4: {"0020|0032": "0\\0\\10"}}}, "at positions of others"),
        ({"tags": {k: {"0020|0032": f"0\\{k}\\{2 * k}"} for k in range(12)}}, "shifted against each other"),
        ({"tags": {4: {"0020|0037": "1\\0\\0\\0\\0\\1"}}}, "slices of different directions"),
    ],
    ids=["gap", "uneven", "doubled", "tilted", "turned"],
)
def test_a_series_that_is_no_even_stack_is_rejected_with_its_reason(tmp_path, odd, match):
    write_series(tmp_path / "s", voxels(1, (12, 20, 18)), "1.2.3.4", **odd)
    (case,) = found(tmp_path).cases
    with pytest.raises(Unusable, match=match):
        check_slices(files_of(case.files[0]))
    assert match in inspect_case(case).reason


def repacked(file, syntax):
    """A DICOM file that says it is packed by ``syntax``, with one fragment of what that might be."""
    content = file.read_bytes()
    at = content.index(b"\x02\x00\x10\x00UI")
    length = int.from_bytes(content[at + 6 : at + 8], "little")
    value = syntax.encode() + b"\0" * (len(syntax) % 2)
    group = int.from_bytes(content[140:144], "little") + len(value) - length
    head = content[:140] + group.to_bytes(4, "little") + content[144 : at + 6] + len(value).to_bytes(2, "little") + value
    tags = content[at + 8 + length : content.index(b"\xe0\x7f\x10\x00")]
    item, end = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0\0\0\0\0"
    pixels = b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff" + item + bytes(4) + item + (64).to_bytes(4, "little") + bytes(range(64))
    file.write_bytes(head + tags + pixels + end)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.4.999", "1.2.840.10008.1.2.4.100", "1.2.840.10008.1.2.4.201"])
def test_a_packing_that_is_not_read_is_named(tmp_path, syntax):
    """Unknown to everybody, MPEG-2, high-throughput JPEG 2000: counted with the files not read, or rejected."""
    write_series(tmp_path / "s", voxels(1, (12, 20, 18)), "1.2.3.4")
    for path in (tmp_path / "s").iterdir():
        repacked(path, syntax)
    told = f"DICOM that cannot be read (transfer syntax {syntax})"
    write(tmp_path / "good.nii.gz", voxels(2))
    listed = found(tmp_path)
    reasons = [r for c in listed.cases if (r := inspect_case(c).reason)]
    assert listed.unread == {told: 12} or (len(reasons) == 1 and reasons[0].startswith(told)), (listed.unread, reasons)


def test_every_file_is_used_rejected_or_counted(tmp_path):
    write_several(tmp_path / "x", 2)
    for name in ("a.png", "b.png", "notes", ".DS_Store", "Dataset/labelsTr/a.nii.gz", "Dataset/imagesTr/a_0000.nii.gz"):
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).touch()
    listed = found(tmp_path / "x", exclude=("case_1*",))
    assert [c.key for c in listed.cases] == ["x__Dataset__a", "x__case_0"]
    assert listed.unread == {".png": 2, "without an ending": 1, "hidden": 1, "beside imagesTr": 1, "left out as asked": 1}


# ---- from a folder with all of it to lines to paste


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder as people have it, planned for a target: (folder, what was printed)."""
    patch = pytest.MonkeyPatch()
    patch.setenv("nnUNet_n_proc_DA", "0")  # as doctor recommends
    folder = tmp_path_factory.mktemp("my project")
    raw, preprocessed = nnunet_folders(folder, patch)
    pile = folder / "my data"
    write_several(pile, 4, (1.0, 1.0, 1.0), (30, 34, 32))
    write(pile / "same.nrrd", voxels(0, (30, 34, 32)))  # a duplicate of case_0
    write_series(pile / "PACS", voxels(9, (30, 34, 32)), "1.2.3.9", spacing=(1, 1, 1))
    (pile / "broken.nii.gz").write_bytes(b"broken")
    huge = voxels(7, (30, 34, 32)).astype(np.float32)
    huge[9, 9, 9] = 3e38
    write(pile / "huge.nii.gz", huge)
    write(pile / "fine.nii.gz", voxels(8, (30, 34, 32)), (0.04, 0.04, 0.04))
    labelled_dataset(raw, preprocessed, "Dataset004_First", tiny_plans(view=(16, 24, 16)))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main.main(
            ["plan", "-d", "Dataset500_Mix", "--images", str(pile), "--target", "4", "--view", "16", "24", "16", "-np", "1"]
        )
    assert code == 0
    yield folder, out.getvalue()
    patch.undo()


@pytest.fixture
def planned(project, monkeypatch):
    folder, out = project
    raw, preprocessed = nnunet_folders(folder, monkeypatch)
    return raw, preprocessed, out


def test_what_became_of_every_file_is_said(planned):
    _, preprocessed, out = planned
    folder = preprocessed / "Dataset500_Mix"
    with open(folder / "rejected.csv", newline="") as f:
        reasons = {row["case"]: row["reason"] for row in csv.DictReader(f)}
    assert set(reasons) == {"my_data__same", "my_data__broken", "my_data__huge", "my_data__fine"}
    assert reasons["my_data__same"] == "duplicate of my_data__case_0"
    assert "dwarf" in reasons["my_data__huge"] and "voxels after resampling to 1x1x1 mm" in reasons["my_data__fine"]
    with open(folder / "cases.csv", newline="") as f:
        assert len(list(csv.DictReader(f))) == 5
    assert "WARNING: 2 cases are rejected, too" in out and "7 subjects, 1 dataset, 1 channel. For example case_0.nii.gz" in out


def printed(out):
    return [shlex.split(line) for line in out.splitlines() if line.startswith("  nnUNetv2")]


def test_printed_commands_are_words_in_the_order_in_which_they_run(planned):
    _, _, out = planned
    commands = printed(out)
    assert [words[0] for words in commands] == [
        "nnUNetv2_cva",
        "nnUNetv2_train",
        "nnUNetv2_preprocess",
        "nnUNetv2_train",
        "nnUNetv2_predict",
    ]
    assert all(words[-2:] == device().split() for words in commands if words[0] in ("nnUNetv2_train", "nnUNetv2_predict"))


def test_the_same_lines_are_printed_later(planned, monkeypatch):
    raw, preprocessed, out = planned
    folder = preprocessed / "Dataset500_Mix"
    where = (folder, "nnUNetPlansCVA", "3d_fullres_cva")
    steps = [*pretraining_steps(*where), *fine_tuning_steps(*where)]
    assert "".join(f"{s.title}\n" + "".join(f"  {c}\n" for c in s.commands) for s in steps) == out[out.index("Next:") :]
    tests = raw / "Dataset004_First" / "imagesTs"
    tests.mkdir()  # as converters leave it
    for name, there in ((".DS_Store", "imagesTr"), ("a_0000.nii.gz", "imagesTs")):
        (tests / name).touch()
        assert [f"Dataset004_First/{there}" in s.commands[-1] for s in fine_tuning_steps(*where)] == [True]
    shutil.rmtree(tests)
    (later,) = fine_tuning_steps(*where, checkpoint="/my results/x.pth")
    assert "'/my results/x.pth'" in later.commands[1]
    (preprocessed / "Dataset004_First" / "nnUNetPlans.json").rename(preprocessed / "moved.json")
    (gone,) = fine_tuning_steps(*where)
    (preprocessed / "moved.json").rename(preprocessed / "Dataset004_First" / "nnUNetPlans.json")
    assert "nnUNetPlans.json not found" in gone.title and gone.commands == ()


def test_the_end_of_a_training_says_what_plan_said(planned):
    _, preprocessed, out = planned
    plans = json.loads((preprocessed / "Dataset500_Mix" / "nnUNetPlansCVA.json").read_text())
    said = closing(plans, "3d_fullres_cva", None, nnUNetTrainer, "/my results/x.pth").splitlines()
    after = [line.strip() for line in out[out.index("After that") :].splitlines()]
    expected = [re.sub(r'"\$nnUNet_results.*?"', "'/my results/x.pth'", line) for line in after]
    assert said[1:] == expected


def test_info_and_report_say_what_plan_said(planned, tmp_path, capsys):
    """Line by line, with the checkpoint's own place; report also on its page."""
    _, preprocessed, out = planned
    folder = tmp_path / "nnUNetTrainerCVA__nnUNetPlansCVA__3d_fullres_cva" / "fold_all"
    folder.mkdir(parents=True)
    source = preprocessed / "Dataset500_Mix"
    plans, dataset = (json.loads((source / f).read_text()) for f in ("nnUNetPlansCVA.json", "dataset.json"))
    weights = folder / "checkpoint_final.pth"
    pretraining(weights, Target(plans, "3d_fullres_cva", dataset, nnUNetTrainer))
    (folder.parent / "plans.json").write_text(json.dumps(plans))
    (folder / "cva_config.json").write_text("{}")
    (folder / "metrics.jsonl").write_text('{"epoch": 0, "total_loss": 1.0, "seconds": 1.0}\n')
    after = [line.strip() for line in out[out.index("After that") :].splitlines()]
    expected = [re.sub(r'"\$nnUNet_results.*?"', str(weights), line) for line in after]
    assert len(expected) >= 4
    for command in (["info", str(weights)], ["report", str(folder)]):
        assert main.main(command) == 0
        assert capsys.readouterr().out.splitlines()[-len(expected) :] == expected
    assert all(html.escape(line) in (folder / "report.html").read_text() for line in expected)


def test_names_with_spaces_are_quoted(planned):
    _, preprocessed, _ = planned
    plans = {**tiny_plans(), "plans_name": "my plans", "dataset_name": "Dataset500_Mix"}
    plans["configurations"]["3d_fullres_cva"] = {"inherits_from": "3d_fullres", "cva": {}}
    folder = preprocessed / "Dataset500_Mix"
    save_plans(plans, folder, Recipe())
    save_targets(folder, "my plans", {"Dataset004_First": "nnUNetPlans"}, keep=False)
    lines = [c for s in fine_tuning_steps(folder, "my plans", "3d_fullres_cva") for c in s.commands]
    lines += [c for s in pretraining_steps(folder, "my plans", "3d_fullres_cva") for c in s.commands]
    assert [w for line in lines for w in shlex.split(line) if w == "plans" or w == "my"] == []
    weights = [w for line in lines for w in shlex.split(line) if w.endswith(".pth")]
    assert weights == ["$nnUNet_results/Dataset500_Mix/nnUNetTrainerCVA__my plans__3d_fullres_cva/fold_all/checkpoint_final.pth"]


@pytest.mark.parametrize("wrong", [("--preset", "nope"), ("-pl", "Nobody"), ("--target", "4", "--preset", "nope")])
def test_a_wrong_name_is_refused_before_any_image_is_read(planned, capsys, wrong):
    _, preprocessed, _ = planned
    code = main.main(["plan", "-d", "Dataset501_New", "--images", "/", "-np", "1", *wrong])
    assert code == 2 and "Expected" in capsys.readouterr().err.replace("expected", "Expected")
    assert not (preprocessed / "Dataset501_New").exists()


# ---- targets with other layers


@pytest.mark.parametrize(
    ("key", "layer", "expected"),
    [
        ("norm_op", "torch.nn.modules.batchnorm.BatchNorm3d", "InstanceNorm3d in the file, BatchNorm3d in the.*fresh"),
        ("nonlin", "torch.nn.ReLU", "activations differ, LeakyReLU in the file, ReLU in the target"),
        ("nonlin", "torch.nn.modules.activation.LeakyReLU", None),
    ],
)
def test_layers_that_make_another_function_of_the_same_weights_are_named(key, layer, expected):
    plans = tiny_plans()
    card = {"plans": plans, "configuration": "3d_fullres", "spacing": [1.0, 1.0, 1.0], "normalization_schemes": None}
    settings = json.loads(json.dumps(plans["configurations"]["3d_fullres"]))
    settings["architecture"]["arch_kwargs"][key] = layer
    said = [line for line in data_warnings(card, settings, {}) if "differ" in line]
    assert len(said) == (expected is not None) and (expected is None or re.search(expected, said[0]))


# ---- neutral names


def test_neutral_names_stay_when_images_are_added_and_the_key_tells_them(tmp_path, monkeypatch):
    _, preprocessed = nnunet_folders(tmp_path, monkeypatch)
    folder = preprocessed / "Dataset500_Quiet"
    for name in ("sub-Doe/T1", "sub-Doe/T2", "sub-Roe/T1"):
        (tmp_path / "x" / f"{name}.nii.gz").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / f"{name}.nii.gz").touch()
    first = neutral(found(tmp_path / "x").cases, folder)
    assert [(c.key, c.subject) for c in first] == [
        ("case_0001", "subject_0001"),
        ("case_0002", "subject_0001"),
        ("case_0003", "subject_0002"),
    ]
    (tmp_path / "x" / "sub-Doe" / "A.nii.gz").touch()  # before the others
    second = {c.files: c for c in neutral(found(tmp_path / "x").cases, folder)}
    assert all(second[c.files] == c for c in first)
    (added,) = set(second) - {c.files for c in first}
    assert (second[added].key, second[added].subject) == ("case_0004", "subject_0001")
    key = {row["case"]: row for _, row in read_table(folder / "cva_key.csv")}
    assert key["case_0003"]["path"].endswith("sub-Roe/T1.nii.gz") and key["case_0003"]["known_as"] == "x__sub-Roe"


def test_neutral_names_are_those_of_everything_that_is_passed_on(tmp_path, monkeypatch, capsys):
    _, preprocessed = nnunet_folders(tmp_path, monkeypatch)
    write_several(tmp_path / "x" / "Doe", 3)
    ask = ["plan", "-d", "Dataset500_Quiet", "--preset", "tiny", "--view", "16", "16", "16", "-np", "1"]
    assert main.main([*ask, "--images", str(tmp_path / "x"), "--anonymous"]) == 0
    assert "Pass none of these on" in capsys.readouterr().out
    assert main.main(ask) == 0  # it is remembered
    folder = preprocessed / "Dataset500_Quiet"
    secret = {"cva_key.csv", "cases.csv", "rejected.csv", "cva_inspection.jsonl", "cva_sources.json"}
    for path in folder.iterdir():
        assert path.name in secret or "Doe" not in path.read_text()
    with open(folder / "cases.csv", newline="") as f:
        assert [row["case"] for row in csv.DictReader(f)] == ["case_0001", "case_0002", "case_0003"]


# ---- too few


def test_one_case_and_one_case_per_step_are_said_to_be_too_few(tmp_path, monkeypatch, capsys):
    nnunet_folders(tmp_path, monkeypatch)
    write_several(tmp_path / "x", 2)
    ask = [
        "plan",
        "-d",
        "Dataset500_Few",
        "--preset",
        "tiny",
        "--view",
        "16",
        "16",
        "16",
        "-np",
        "1",
        "--images",
        str(tmp_path / "x"),
    ]
    assert main.main([*ask, "--batch-size", "1"]) == 0
    said = capsys.readouterr().out
    assert "WARNING: one case per step is too few" in said and "a single case" not in said
    next((tmp_path / "x").iterdir()).unlink()
    assert main.main(ask) == 0
    assert "WARNING: a single case is too few to learn from" in capsys.readouterr().out
