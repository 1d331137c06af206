"""Simple classifiers on frozen features: what they find, and that position, intensity and the untrained network stand beside."""

import csv
import json

import numpy as np
import pytest
from helpers.images import write
from helpers.targets import call, pretraining, target
from test_look import networks, phantom

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
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    arguments = ("probe", tmp_path / "w.pth", "--csv", tmp_path / "labels.csv", "-o", tmp_path / "out", "-device", "cpu")
    assert call(*arguments, "--folds", 2) == 0
    out = capsys.readouterr().out
    assert "balanced accuracy" in out and "AUROC" in out and "average precision" in out and "untrained" in out
    (tmp_path / "labels.csv").write_text("file\nx\n")
    assert call(*arguments) == 2 and "expected the columns path, label, found file" in capsys.readouterr().err
