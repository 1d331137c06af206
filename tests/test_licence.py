"""A licence is inherited: from a published file through a pretraining into what is exported."""

import json
from pathlib import Path

import pytest
import torch
from helpers.projects import make_project, train
from helpers.targets import call, planned, pretraining, randomised, stock_checkpoint, target
from test_nnssl_format import open_mind

from nnunetv2_cva.training.trainer import CVATrainer
from nnunetv2_cva.transfer.licence import VARIABLE, chosen, known, reminders, terms
from nnunetv2_cva.transfer.read import read


@pytest.mark.parametrize(
    ("licence", "expected"),
    [
        ("CC-BY-4.0", set()),
        ("CC BY-NC-SA 4.0", {"non-commercial", "share-alike"}),
        ("cc-by-nd-4.0", {"no-derivatives"}),
        ("Creative Commons Attribution-NonCommercial", {"non-commercial"}),
        ("GPL-3.0", {"share-alike"}),
        ("Apache-2.0", set()),
        ("not stated", set()),
    ],
)
def test_terms_are_told_by_names(licence, expected):
    assert terms(licence) == expected and len(reminders(licence)) == len(expected)


def test_terms_are_not_loosened():
    path = Path("w.pth")
    assert chosen(None, None, path) == chosen(None, "not stated", path) == "not stated"
    assert chosen(None, "CC-BY-NC-4.0", path) == "CC-BY-NC-4.0" and chosen("CC-BY-4.0", None, path) == "CC-BY-4.0"
    assert chosen("CC-BY-NC-SA-4.0", "CC-BY-NC-4.0", path) == "CC-BY-NC-SA-4.0"
    with pytest.raises(
        ValueError, match=r"w\.pth is under CC-BY-NC-SA-4\.0 \(non-commercial, share-alike\), which 'CC-BY-4\.0' would"
    ):
        chosen("CC-BY-4.0", "CC-BY-NC-SA-4.0", path)


def test_published_files_are_known(tmp_path, monkeypatch):
    made = target()
    plan = torch.load(open_mind(tmp_path / "o.pth", made, made.build(), "ResidualEncoderUNet"), weights_only=True)
    found = read(tmp_path / "o.pth").card
    assert found["licence"] == "CC-BY-4.0" and found["published"] == "https://huggingface.co/MIC-DKFZ"
    assert [c["name"] for c in found["citations"]] == ["MAE", "OpenMind"]
    assert known("hf://MIC-DKFZ/nnFoundationViT@main", tmp_path, {}).licence == "CC-BY-SA-4.0"
    assert known("hf://AnonRes/PrimusM-OpenMind-MAE", tmp_path, {}).name == "OpenMind"
    assert (
        known("/data/OpenMind/x.pth", tmp_path, {"plans": {"plans_name": "nnUNetPlans", "dataset_name": "Dataset745_Mine"}})
        is None
    )

    plan["nnssl_adaptation_plan"]["pretrain_plan"]["dataset_name"] = "Dataset900_Ours"
    torch.save(plan, tmp_path / "ours.pth")
    assert read(tmp_path / "ours.pth").card.get("licence") is None
    import hashlib

    digest = hashlib.sha256((tmp_path / "ours.pth").read_bytes()).hexdigest()
    (tmp_path / "known.json").write_text(json.dumps([{"sha256": digest, "licence": "CC-BY-NC-4.0", "name": "In house"}]))
    monkeypatch.setenv(VARIABLE, str(tmp_path / "known.json"))
    assert read(tmp_path / "ours.pth").card["licence"] == "CC-BY-NC-4.0"
    (tmp_path / "known.json").write_text('{"licence": 3}')
    with pytest.raises(ValueError, match=f"known.json \\({VARIABLE}\\): expected a list of objects"):
        read(tmp_path / "ours.pth")


def test_a_licence_goes_through_a_pretraining_into_what_is_exported(tmp_path, monkeypatch, capsys):
    """A file under share-alike -> CVATrainer, two epochs with a pause -> export: licence and citations at every step."""
    first = target(features=(4, 8, 8), blocks=(1, 1, 1))
    first.dataset_json.update(licence="CC-BY-SA-4.0", reference="A dataset, 2020")
    stock_checkpoint(tmp_path / "first.pth", first, randomised(first.build()))
    cva = {"epochs": 2, "iterations_per_epoch": 1, "init_from": str(tmp_path / "first.pth"), "checkpoint_minutes": 1e-9}
    (tmp_path / "project").mkdir()
    make_project(tmp_path / "project", monkeypatch, cva=cva)
    trainer = train(CVATrainer)
    log = next(Path(trainer.output_folder).glob("training_log*.txt")).read_text()
    assert "Licence: CC-BY-SA-4.0, which the trained weights inherit." in log and "share-alike: what is made of them" in log
    file = Path(trainer.output_folder) / "checkpoint_final.pth"
    card = read(file).card
    assert card["licence"] == "CC-BY-SA-4.0" and card["started_from"]["file"] == "first.pth"
    assert card["started_from"]["fold"] == 0

    there = target(features=(4, 8, 8), blocks=(1, 1, 1), name="Dataset004_Other")
    planned(tmp_path / "preprocessed", there, monkeypatch)
    to = ("-d", 4, "-c", "3d_fullres", "-o", tmp_path / "w.pth")
    capsys.readouterr()
    assert call("export", file, *to, "--licence", "CC-BY-4.0") == 2
    said = capsys.readouterr()
    assert "(share-alike), which 'CC-BY-4.0' would drop" in said.err and not said.out and not (tmp_path / "w.pth").exists()
    assert call("export", file, *to) == 0
    assert "Warning: the weights are under CC-BY-SA-4.0, share-alike" in capsys.readouterr().out
    again = read(tmp_path / "w.pth").card
    assert again["licence"] == "CC-BY-SA-4.0"
    assert "A dataset, 2020" in json.dumps(again["citations"]) and "Consistent View Alignment" in json.dumps(again["citations"])
    assert call("info", tmp_path / "w.pth") == 0
    said = capsys.readouterr().out
    assert "started from   file first.pth, dataset Dataset100_Tiny, fold 0, licence CC-BY-SA-4.0" in said


def test_data_under_a_stricter_licence_keep_it(tmp_path):
    made = target()
    made.dataset_json["licence"] = "CC-BY-NC-SA-4.0"
    pretraining(tmp_path / "c.pth", made)
    content = torch.load(tmp_path / "c.pth", weights_only=True)
    content["cva"]["started_from"] = {"licence": "CC-BY-SA-4.0"}
    torch.save(content, tmp_path / "c.pth")
    assert read(tmp_path / "c.pth").card["licence"] == "CC-BY-NC-SA-4.0"
    content["init_args"]["dataset_json"]["licence"] = "CC0-1.0"
    torch.save(content, tmp_path / "c.pth")
    assert read(tmp_path / "c.pth").card["licence"] == "CC-BY-SA-4.0"
