"""nnU-Net's conventions: names, numbers and inheritance."""

import sys
import warnings
from types import SimpleNamespace

import pytest

from nnunetv2_cva import nnunet

NETWORK = {
    "spacing": [1, 1, 1],
    "normalization_schemes": ["ZScoreNormalization"],
    "architecture": {"a": 1},
    "patch_size": [8] * 3,
}


def plans(**configurations):
    return {"plans_name": "P", "configurations": {"3d_fullres": NETWORK, **configurations}}


def test_inheritance_is_nnunets():
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    content = plans(mid={"inherits_from": "3d_fullres", "batch_size": 5}, leaf={"inherits_from": "mid", "spacing": [2, 2, 2]})
    assert nnunet.inheritance(content, "leaf") == ["3d_fullres", "mid", "leaf"]
    theirs = PlansManager(content).get_configuration("leaf").configuration
    assert nnunet.configuration(content, "leaf") == {k: v for k, v in theirs.items() if k != "inherits_from"}


def test_a_resolved_configuration_is_a_copy():
    content = plans()
    nnunet.configuration(content, "3d_fullres")["architecture"]["a"] = 2
    assert content["configurations"]["3d_fullres"]["architecture"] == {"a": 1}


@pytest.mark.parametrize(
    ("configurations", "name", "match"),
    [
        ({}, "2d", "Plans P have no configuration '2d'. Found: 3d_fullres"),
        ({"a": {"inherits_from": "gone"}}, "a", "no configuration 'gone', from which a inherits"),
        ({"a": {"inherits_from": "b"}, "b": {"inherits_from": "a"}}, "a", r"circle \(a <- b <- a\)"),
        ({"a": {"inherits_from": "a"}}, "a", r"circle \(a <- a\)"),
        ({"a": {"inherits_from": ["3d_fullres"]}}, "a", "no configuration"),
        ({"a": "nothing"}, "a", "no configuration 'a'"),
    ],
)
def test_inheritance_that_leads_nowhere_is_said(configurations, name, match):
    for function in (nnunet.inheritance, nnunet.configuration, nnunet.fine_tuned):
        with pytest.raises(ValueError, match=match):
            function(plans(**configurations), name)


def test_plans_without_configurations_are_no_traceback():
    with pytest.raises(ValueError, match="Found: none"):
        nnunet.configuration({"configurations": [1]}, "3d_fullres")


@pytest.mark.parametrize(
    ("configurations", "name", "expected"),
    [
        ({}, "3d_fullres", "3d_fullres"),
        ({"x_cva": {"inherits_from": "3d_fullres", "patch_size": [16] * 3, "cva": {}}}, "x_cva", "3d_fullres"),
        # Pretraining of a pretraining: both are for pretraining.
        (
            {"x_cva": {"inherits_from": "3d_fullres"}, "long": {"inherits_from": "x_cva", "cva": {"epochs": 9}}},
            "long",
            "3d_fullres",
        ),
        # A middle configuration with a network of its own is what the weights belong to.
        (
            {"mid": {"inherits_from": "3d_fullres", "architecture": {"a": 2}}, "mid_cva": {"inherits_from": "mid"}},
            "mid_cva",
            "mid",
        ),
        ({"own": {"inherits_from": "3d_fullres", "architecture": {"a": 2}}}, "own", "own"),
        ({"low": {"inherits_from": "3d_fullres", "spacing": [2] * 3}, "low_cva": {"inherits_from": "low"}}, "low_cva", "low"),
        # One that somebody has made for fine-tuning, with another batch size, is meant.
        ({"bs5": {"inherits_from": "3d_fullres", "batch_size": 5}, "bs5_cva": {"inherits_from": "bs5"}}, "bs5_cva", "bs5"),
    ],
)
def test_which_configuration_is_fine_tuned(configurations, name, expected):
    assert nnunet.fine_tuned(plans(**configurations), name) == expected


@pytest.mark.parametrize(
    ("name", "number"), [("Dataset004_Hippocampus", 4), ("Dataset1234_Big", 1234), ("Dataset12345_a_b", 12345)]
)
def test_a_datasets_number_is_all_of_its_digits(name, number):
    assert nnunet.is_dataset_name(name) and nnunet.dataset_id(name) == number


@pytest.mark.parametrize(
    "text", ["Dataset04_X", "Dataset004", "Dataset004_", "dataset004_X", "Dataset300_../../x", "Dataset3\u0664\u06647_X"]
)
def test_what_is_no_name_of_a_dataset(text):
    assert not nnunet.is_dataset_name(text)
    with pytest.raises(ValueError, match="expected the name of a dataset"):
        nnunet.dataset_id(text)


def test_datasets_are_found_by_number_and_name(tmp_path, monkeypatch):
    for variable, names in (
        (nnunet.RAW, ["Dataset004_A", "Dataset123_B"]),
        (nnunet.PREPROCESSED, ["Dataset1234_C", "Dataset004_A"]),
    ):
        for name in names:
            (tmp_path / variable / name).mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv(variable, str(tmp_path / variable))
    assert nnunet.datasets() == ["Dataset004_A", "Dataset1234_C", "Dataset123_B"]
    assert nnunet.find_dataset("4") == "Dataset004_A" == nnunet.find_dataset("Dataset004_A")
    assert nnunet.find_dataset("1234") == "Dataset1234_C" and nnunet.find_dataset("123") == "Dataset123_B"
    assert nnunet.dataset_argument("Dataset004_A") == "4" and nnunet.dataset_argument("Dataset1234_C") == "1234"
    assert nnunet.dataset_argument("Dataset123_B") == "Dataset123_B"  # nnU-Net would find Dataset1234_C, too
    for given, match in (
        ("5", "No dataset 5"),
        ("Dataset005_X", "No dataset Dataset005_X"),
        ("../x", "Expected the number or the name"),
    ):
        with pytest.raises(ValueError, match=match):
            nnunet.find_dataset(given)
    (tmp_path / nnunet.RAW / "Dataset123_Other").mkdir()
    with pytest.raises(ValueError, match="Several datasets have the number 123: Dataset123_B, Dataset123_Other"):
        nnunet.find_dataset("123")


def test_a_folder_that_is_not_set_is_said():
    with pytest.raises(ValueError, match="nnUNet_raw is not set"):
        nnunet.folder(nnunet.RAW)


CONFIGURATION = SimpleNamespace(
    network_arch_class_name="a.Network", network_arch_init_kwargs={"n": 1}, network_arch_init_kwargs_req_import=["op"]
)


class Now:
    @staticmethod
    def build_network_architecture(plans_manager, settings, channels, outputs, deep_supervision=True):
        return plans_manager, settings, channels, outputs, deep_supervision


class Before28:
    @staticmethod
    def build_network_architecture(name, arguments, imported, channels, outputs, deep_supervision=True):
        return name, arguments, imported, channels, outputs, deep_supervision


class Neither:
    @staticmethod
    def build_network_architecture(plans, settings, channels, outputs, deep_supervision=True):
        raise AssertionError("not called")


def test_a_network_is_asked_for_by_either_of_nnunets_signatures():
    assert nnunet.build_network(Now, "plans", CONFIGURATION, 2, 3, False) == ("plans", CONFIGURATION, 2, 3, False)
    assert nnunet.build_network(Before28, "plans", CONFIGURATION, 2, 3, False) == ("a.Network", {"n": 1}, ["op"], 2, 3, False)
    with pytest.raises(
        ValueError, match=r"Neither.*: expected the parameters plans_manager, .*; found plans, settings, channels"
    ):
        nnunet.build_network(Neither, "plans", CONFIGURATION, 2, 3, False)


@pytest.mark.parametrize("kind", [Now, Before28])
def test_nnunet_asks_in_the_same_way(kind, monkeypatch):
    """The name that decides is nnU-Net's own rule, not ours."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    asked = []

    class Theirs(kind, nnUNetTrainer):
        _set_batch_size_and_oversample = lambda self: asked.append(kind)  # noqa: E731

    module = sys.modules[nnUNetTrainer.__module__]
    monkeypatch.setattr(module, "determine_num_input_channels", lambda *_: 2)
    trainer = object.__new__(Theirs)
    vars(trainer).update(was_initialized=False, plans_manager="plans", configuration_manager=CONFIGURATION, dataset_json={})
    vars(trainer).update(label_manager=SimpleNamespace(num_segmentation_heads=3), enable_deep_supervision=False, device="cpu")
    with pytest.raises(AttributeError, match="tuple"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        trainer.initialize()  # what our functions return is no network
    assert asked
