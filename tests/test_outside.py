"""What a researcher adds from outside, without touching the package: a loss with settings of its own."""

import json
import os
from pathlib import Path

import pytest
import torch
from helpers.projects import CONFIGURATION, NAME, make_project, make_trainer, train
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunetv2_cva.commands.main import main

OUTSIDE = Path(__file__).parent / "outside"


@pytest.fixture(scope="module")
def vicreg():
    """The recipe, found as nnUNetv2_train finds it: its module is gone from ``sys.modules`` afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_extTrainer", str(OUTSIDE))
        return recursive_find_trainer_class_by_name("nnUNetTrainerVICReg")


def test_vicreg_trains_resumes_and_is_exported(vicreg, tmp_path, monkeypatch, capsys):
    assert len((OUTSIDE / "nnUNetTrainerVICReg.py").read_text().splitlines()) < 40
    make_project(tmp_path, monkeypatch, cva={"covariance_weight": 0.5})
    first = train(vicreg)
    assert first.teacher is None and first.config.covariance_weight == 0.5
    for record in first.history.epochs:
        assert record["total_loss"] == pytest.approx(
            record["consistency_loss"]
            + record["variance_loss"]
            + 0.5 * record["covariance_loss"]
            + 5 * record["reconstruction_loss"],
            rel=1e-5,
        )
        assert 0 <= record["retrieval"] <= 1
    assert "variance_loss" in capsys.readouterr().out

    monkeypatch.setenv("nnUNet_cva", '{"epochs": 3}')
    second = train(vicreg, resume=True)
    assert [e["epoch"] for e in second.history.epochs] == [0, 1, 2]
    saved = torch.load(Path(second.output_folder) / "checkpoint_final.pth", weights_only=True)
    assert saved["cva"]["config"]["covariance_weight"] == 0.5
    monkeypatch.setenv("nnUNet_cva", '{"covariance_weight": 2.0}')
    with pytest.raises(ValueError, match="covariance_weight: 0.5 in the checkpoint, 2.0 now"):
        make_trainer(vicreg, resume=True)
    monkeypatch.setenv("nnUNet_cva", '{"covariance_weight": -1}')
    with pytest.raises(ValueError, match="covariance_weight: expected a number >= 0, found -1"):
        make_trainer(vicreg)

    monkeypatch.delenv("nnUNet_cva")
    out = tmp_path / "weights.pth"
    command = ["export", f"{second.output_folder}/checkpoint_final.pth", "-d", NAME, "-c", CONFIGURATION, "-o", str(out)]
    assert main(command) == 0
    exported, trained = torch.load(out, weights_only=True)["network_weights"], second.network.state_dict()
    assert all(torch.equal(exported[k], trained[k]) for k in exported if k.startswith("encoder."))


def test_with_the_packages_objective_it_is_the_packages_training(vicreg, tmp_path, monkeypatch):
    """The door itself changes nothing: the subclass of the settings trains as CVAConfig does."""
    from nnunetv2_cva.training.objective import objective
    from nnunetv2_cva.training.trainer import CVATrainer

    make_project(tmp_path, monkeypatch)
    config = vicreg.config.updated({"contrastive_weight": 0.1}, "test")
    needs = type("Teaching", (type(config),), {"needs_teacher": CVATrainer.config.__class__.needs_teacher})
    settings = {k: v for k, v in config.as_dict().items() if isinstance(v, (int, float, str))}
    with_door = type("WithDoor", (CVATrainer,), {"config": needs(**settings), "objective": staticmethod(objective)})
    plain = type("Plain", (CVATrainer,), {})
    one, other = train(with_door), train(plain)
    assert json.loads(json.dumps(other.config.as_dict())).items() <= one.config.as_dict().items()
    assert [e["total_loss"] for e in one.history.epochs] == [e["total_loss"] for e in other.history.epochs]
    assert os.path.basename(one.output_folder_base).startswith("WithDoor")


def test_the_documented_loss_trains(tmp_path, monkeypatch):
    """The code of docs/recipes.md, "A loss of your own", as a file in a folder of the user's."""
    text = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
    code = text.split("## A loss of your own")[1].split("```python\n")[1].split("```")[0]
    (tmp_path / "trainers").mkdir()
    (tmp_path / "trainers" / "close.py").write_text(code)
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "trainers"))
    recipe = recursive_find_trainer_class_by_name("nnUNetTrainerCVA_Close")
    make_project(tmp_path, monkeypatch, cva={"closeness_weight": 2.0, "contrastive_weight": 0.0})
    for record in train(recipe).history.epochs:
        parts = record["consistency_loss"] + 2 * record["closeness_loss"] + 5 * record["reconstruction_loss"]
        assert record["total_loss"] == pytest.approx(parts, rel=1e-5)
