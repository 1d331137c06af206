"""Simple classifiers on frozen features: what they find, and that position, intensity and the untrained network stand beside."""

import csv
import json
import re

import numpy as np
import pytest
from helpers.images import write
from helpers.targets import call, pretraining, target
from test_look import networks, phantom

from nnunetv2_cva.seeing.frozen import check_comparable, load_frozen
from nnunetv2_cva.seeing.probing import probe_images, probe_voxels


def test_what_intensity_tells_a_probe_finds_by_intensity_and_not_by_position():
    cases = [phantom((n % 2, -n % 3, 0), name=str(n), seed=n) for n in range(5)]
    found = probe_voxels(cases, networks(), (1, 2, 3), labelled=3, seed=0)
    assert list(found) == ["position", "intensity", "trained", "untrained"]
    assert all(set(scores) == {"linear", "k-NN"} for scores in found.values())
    assert found["intensity"]["k-NN"] > 0.6 > found["position"]["linear"]
    with pytest.raises(ValueError, match="expected 1 to 4, as the dataset has 5, found 5"):
        probe_voxels(cases, networks(), (1,), labelled=5, seed=0)


def test_images_are_scored_by_subject():
    """Every subject has a vector of its own that says nothing about the label: only leaking subjects would be told apart."""
    rng = np.random.default_rng(0)
    subjects = np.repeat(np.arange(40), 4)
    own = rng.normal(size=(40, 30))[subjects] + 0.01 * rng.normal(size=(160, 30))
    labels = np.array(["a", "b"])[rng.integers(0, 2, 40)][subjects]
    chance = np.mean([f["AUROC"] for f in probe_images(own, labels, subjects.astype(str), 5, 0)])
    assert 0.25 < chance < 0.75
    told = own + 3.0 * (labels == "a")[:, None]
    assert np.mean([f["balanced accuracy"] for f in probe_images(told, labels, subjects.astype(str), 5, 0)]) > 0.95
    with pytest.raises(ValueError, match=r"at least 5 subjects each, as many as folds, found a: .*, c: 4"):
        probe_images(own[:8], ["a"] * 4 + ["c"] * 4, subjects[:8].astype(str), 5, 0)


def test_voxels_by_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    dataset = tmp_path / "raw" / "Dataset009_Blobs"
    for n in range(4):
        p = phantom((n % 2, 0, 0), seed=n)
        write(dataset / "imagesTr" / f"b{n}_0000.nii.gz", (100 * p.voxels[0].numpy() + 50).astype(np.float32))
        write(dataset / "labelsTr" / f"b{n}.nii.gz", p.labels.astype(np.uint8))
    about = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "x": 1, "y": 2, "z": 3}, "file_ending": ".nii.gz"}
    (dataset / "dataset.json").write_text(json.dumps(about))
    for name in ("a", "b"):
        pretraining(tmp_path / f"{name}.pth", target(view=(16, 16, 16)), seed=ord(name))
    files = (tmp_path / "a.pth", tmp_path / "b.pth")
    assert call("probe", *files, "-d", 9, "-o", tmp_path / "out", "--labelled", 2, "--seeds", 2, "-device", "cpu") == 0
    rows = list(csv.reader((tmp_path / "out" / "probe.csv").read_text().splitlines()))
    assert [r[0] for r in rows] == ["features", "position", "intensity", "untrained", "a", "b"]
    assert rows[0][1:] == ["linear, Dice", "k-NN, Dice"] and "±" in rows[3][1]
    assert (tmp_path / "out" / "probe.png").is_file() and "untrained" in capsys.readouterr().out
    assert call("probe", files[0], "-o", tmp_path) == 2 and "Give either -d, whose" in capsys.readouterr().err
    assert call("probe", files[0], files[0], "-d", 9, "-o", tmp_path) == 2 and "is given twice" in capsys.readouterr().err


def test_images_by_the_command(tmp_path, capsys):
    pretraining(tmp_path / "w.pth", target(view=(16, 16, 16)))
    lines = ["path,label,subject"]
    for n in range(8):
        volume = phantom(seed=n).voxels[0].numpy() + (n % 2) * np.random.default_rng(n).normal(0, 0.5, (20, 26, 22))
        write(tmp_path / f"{n}.nii.gz", (100 * volume + 50).astype(np.float32))
        lines.append(f"{n}.nii.gz,{'noisy' if n % 2 else 'clean'},s{n}")
    (tmp_path / "labels.csv").write_bytes("\r\n".join(lines).replace(",", ";").encode("utf-16"))  # as a spreadsheet saves it
    arguments = ("probe", tmp_path / "w.pth", "--csv", tmp_path / "labels.csv", "-o", tmp_path / "out", "-device", "cpu")
    assert call(*arguments, "--folds", 2) == 0
    out = capsys.readouterr().out
    assert "balanced accuracy" in out and "AUROC" in out and "average precision" in out and "untrained" in out
    (tmp_path / "labels.csv").write_text("path,label\n0.nii.gz,a\nno.nii.gz,b\n")
    assert call(*arguments) == 2 and "no.nii.gz: expected an image" in capsys.readouterr().err
    (tmp_path / "labels.csv").write_text("file\nx\n")
    assert call(*arguments) == 2 and "labels.csv: expected the columns path, label, found file" in capsys.readouterr().err


def test_images_of_several_channels_by_the_command(tmp_path, capsys):
    """The class shows in the second channel only, which the table does not name."""
    pretraining(tmp_path / "w.pth", target(channels=2, view=(16, 16, 16)))
    lines = ["path,label"]
    for n in range(8):
        for c in range(2):
            noise = (n % 2) * c * np.random.default_rng(n).normal(0, 0.5, (20, 26, 22))
            volume = phantom(seed=n + c).voxels[0].numpy() + noise
            write(tmp_path / f"case[{n}]_{c:04d}.nii.gz", (100 * volume + 50).astype(np.float32))
        lines.append(f"case[{n}]_0000.nii.gz,{'noisy' if n % 2 else 'clean'}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    arguments = ("probe", tmp_path / "w.pth", "--csv", tmp_path / "labels.csv", "-o", tmp_path / "out", "-device", "cpu")
    assert call(*arguments, "--folds", 2) == 0
    rows = {r[0]: r[1] for r in csv.reader((tmp_path / "out" / "probe.csv").read_text().splitlines())}
    assert rows["intensity"].startswith("1.000") and set(rows) == {"features", "intensity", "untrained", "w"}
    (tmp_path / "case[3]_0001.nii.gz").unlink()
    capsys.readouterr()
    assert call(*arguments, "--folds", 2) == 2
    assert re.search(r"Image case\[3\]: expected 2 files case\[3\]_0000", capsys.readouterr().err)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"normalization_schemes": ["RescaleTo01Normalization"]}, r"normalisation \['ZScore.*'\], found \['Rescale"),
        ({"use_mask_for_norm": [True]}, r"normalisation within the mask \[False\], found \[True\]"),
        ({"spacing": [1.0, 1.0, 2.0]}, r"spacing \(1.0, 1.0, 1.0\), found \(1.0, 1.0, 2.0\)"),
        ({"patch_size": [16, 24, 16]}, r"views \(16, 16, 16\), found \(16, 24, 16\)"),
    ],
)
def test_files_that_expect_other_images_are_not_compared(tmp_path, change, said):
    made, other = target(view=(16, 16, 16)), target(view=(16, 16, 16))
    other.plans["configurations"]["3d_fullres"].update(change)
    first, second = (frozen(tmp_path / f"{n}.pth", t) for n, t in (("a", made), ("b", other)))
    check_comparable(first, first, ("a", "a"), views=True)
    with pytest.raises(ValueError, match=f"b expects other images than a, .*: expected {said}"):
        check_comparable(first, second, ("a", "b"), views=True)
    if "patch_size" in change:
        check_comparable(first, second, ("a", "b"), views=False)


def test_intensities_of_all_images_count_where_the_normalisation_uses_them(tmp_path):
    made = [target(view=(16, 16, 16)) for _ in range(3)]
    for t, mean in zip(made, (40.0, 40.0, 90.0)):
        t.plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["CTNormalization"]
        t.plans["foreground_intensity_properties_per_channel"] = {
            "0": {"mean": mean, "std": 9.0, "percentile_00_5": 1.0, "percentile_99_5": 99.0, "median": mean * 2}
        }
    made[1].plans["foreground_intensity_properties_per_channel"]["0"]["median"] = 7.0  # nothing uses it
    a, b, c = (frozen(tmp_path / f"{n}.pth", t) for n, t in enumerate(made))
    check_comparable(a, b, ("a", "b"), views=True)
    with pytest.raises(ValueError, match="intensities .*'mean': 40.0.*, found .*'mean': 90.0"):
        check_comparable(a, c, ("a", "c"), views=True)


def frozen(path, made):
    pretraining(path, made)
    return load_frozen(path)
