import json

import pytest

from nnunetv2_cva.config import CVAConfig, check_resumable, resolve


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
