import dataclasses
import json
from pathlib import Path

import pytest

from nnunetv2_cva.commands.main import main
from nnunetv2_cva.config import CVAConfig, FinetuneConfig, check_resumable, document, resolve
from nnunetv2_cva.settings import explained


def plans(**blocks):
    """3d_fullres <- small <- tiny, with a "cva" block where one is given."""
    configurations = {"3d_fullres": {}, "small": {"inherits_from": "3d_fullres"}, "tiny": {"inherits_from": "small"}}
    for name, block in blocks.items():
        configurations[name.removeprefix("c_")]["cva"] = block
    return {"configurations": configurations}


def test_later_origins_win_key_by_key():
    p = plans(c_3d_fullres={"epochs": 2, "seed": 2, "temperature": 0.2}, c_tiny={"seed": 3})
    config = resolve(CVAConfig(epochs=1, mask_ratio=0.5), p, "tiny", {"nnUNet_cva": '{"temperature": 0.4}'})
    assert (config.mask_ratio, config.epochs, config.seed, config.temperature) == (0.5, 2, 3, 0.4)


def test_blocks_of_configurations_that_are_not_inherited_do_not_count():
    assert resolve(CVAConfig(), plans(c_tiny={"seed": 3}), "small", {}).seed == 0


def test_lists_of_json_become_tuples_and_plain_types_come_back():
    config = CVAConfig().updated({"roi_size": [2, 7, 7], "overlap": [0.5, 0.6]}, "test")
    assert config.roi_size == (2, 7, 7)
    again = json.loads(json.dumps(config.as_dict()))
    assert CVAConfig().updated(again, "test") == config


@pytest.mark.parametrize(
    "values, message",
    [
        ({"epohcs": 3}, r"plans.*unknown setting 'epohcs'.*epochs"),
        ({"epochs": "3"}, r"epochs: expected int, found '3'"),
        ({"epochs": True}, r"epochs: expected int, found True"),
        ({"epochs": 0}, r"epochs: expected a positive integer, found 0"),
        ({"overlap": [0.8, 0.4]}, r"overlap: expected 0 < low <= high <= 1"),
        ({"overlap": [0.8]}, r"overlap: expected \[float, float\]"),
        ({"spatial": "both"}, r"spatial: expected one of 'shared', 'independent', found 'both'"),
        ({"mask_ratio": 1.0}, r"mask_ratio"),
        ({"noise_p": 1.5}, r"noise_p: expected a probability"),
        ({"learning_rate": float("nan")}, r"learning_rate: expected float"),
        ({"workers": -1}, r"workers"),
        ({"reconstruction_weight": 0, "consistency_weight": 0, "contrastive_weight": 0}, r"nothing to train"),
        ([1], r"expected an object of settings, found list"),
    ],
)
def test_a_bad_value_names_its_key_and_origin(values, message):
    with pytest.raises(ValueError, match=r'configurations\["tiny"\]\["cva"\]') as error:
        resolve(CVAConfig(), plans(c_tiny=values), "tiny", {})
    with pytest.raises(ValueError, match=message):
        raise error.value


def test_the_environment_must_hold_json():
    with pytest.raises(ValueError, match=r"nnUNet_cva: expected JSON.*found 'epochs=3'"):
        resolve(CVAConfig(), plans(), "tiny", {"nnUNet_cva": "epochs=3"})
    with pytest.raises(ValueError, match=r"environment variable nnUNet_cva: unknown setting 'x'"):
        resolve(CVAConfig(), plans(), "tiny", {"nnUNet_cva": '{"x": 1}'})


def test_resuming_keeps_the_method_and_takes_what_may_change():
    saved = CVAConfig(epochs=5, workers=1, temperature=0.3)
    resumed = check_resumable(saved.as_dict(), CVAConfig(epochs=9, workers=0, temperature=0.3))
    assert (resumed.epochs, resumed.workers, resumed.temperature) == (9, 0, 0.3)


def test_resuming_with_another_method_names_every_difference():
    with pytest.raises(ValueError, match=r"temperature: 0.3 in the checkpoint, 0.5 now; seed: 1 in the checkpoint, 0 now"):
        check_resumable(CVAConfig(seed=1, temperature=0.3).as_dict(), CVAConfig())


def test_a_renamed_setting_says_its_new_name():
    with pytest.raises(ValueError, match=r"test: the setting 'probe_cases' is now called 'watched_cases'"):
        CVAConfig().updated({"probe_cases": 4}, "test")


def test_checkpoints_with_names_of_an_earlier_version_are_continued():
    saved = CVAConfig().as_dict()
    saved["probe_cases"] = saved.pop("watched_cases")
    assert check_resumable(saved, CVAConfig()) == CVAConfig()


@pytest.mark.parametrize("plans_", [{"a": {"inherits_from": "a"}}, {"a": {"inherits_from": "gone"}}])
def test_circles_and_missing_parents_are_named(plans_):
    with pytest.raises(ValueError, match="circle|no configuration 'gone'"):
        resolve(CVAConfig(), {"configurations": plans_}, "a", {})


@pytest.mark.parametrize("config", [CVAConfig(), FinetuneConfig()], ids=["pretraining", "fine-tuning"])
def test_every_setting_explains_itself_and_its_default_is_allowed(config):
    for s in explained(config):
        assert s.meaning and s.expected and "\n" not in s.meaning and "|" not in s.meaning + s.expected, s.name


def test_every_number_has_a_range():
    """No number is taken as it comes, in either direction."""
    for config in (CVAConfig(), FinetuneConfig()):
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            if isinstance(value, (int, float, tuple)) and not isinstance(value, bool):
                wrong = -1 if not isinstance(value, tuple) else (-1,) * len(value)
                with pytest.raises(ValueError, match=f"^{field.name}: expected "):
                    dataclasses.replace(config, **{field.name: wrong})


def test_the_document_is_current():
    path = Path(__file__).parents[1] / "docs" / "settings.md"
    assert path.read_text("utf-8").splitlines() == document(), "nnUNetv2_cva settings --markdown > docs/settings.md"


def test_the_command_explains_one_setting_or_all(capsys):
    assert main(["settings", "mask_ratio"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["  mask_ratio = 0.75  (a number in [0, 1))", *_meaning("mask_ratio")]
    assert main(["settings"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {f.name} = " in out for c in (CVAConfig, FinetuneConfig) for f in dataclasses.fields(c))
    assert main(["settings", "bogus"]) == 2
    assert "No setting begins with 'bogus'. There are: overlap" in capsys.readouterr().err


def _meaning(name):
    return [f"      {s.meaning}" for s in explained(CVAConfig()) if s.name == name]


@pytest.mark.parametrize(
    ("view", "edge"),
    [
        ((160, 160, 160), 16),
        ((48, 64, 48), 16),  # 3 x 4 x 3 = 36 blocks
        ((48, 48, 48), 8),  # 27 blocks of 16
        ((24, 32, 24), 8),  # 8 blocks of 16 would hide 6 of 8
        ((16, 160, 160), 16),  # a thin axis is one block
        ((16, 24, 16), 4),
        ((8, 8, 8), 4),  # no edge makes 32 blocks
    ],
)
def test_the_mask_block_follows_the_view(view, edge):
    assert CVAConfig().for_view(view).mask_block == edge
    assert CVAConfig(mask_block=12).for_view(view).mask_block == 12, "what is set stays"
