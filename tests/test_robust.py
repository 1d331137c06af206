"""Nothing that a user can cause ends in a traceback, and what is written by somebody else may hold anything."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from helpers.projects import make_project
from helpers.projects import plans as tiny_plans
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

from nnunetv2_cva.commands import settings as settings_command
from nnunetv2_cva.commands.main import main
from nnunetv2_cva.config import CVAConfig, FinetuneConfig, resolve
from nnunetv2_cva.files import read_json, read_object
from nnunetv2_cva.nnunet import configuration, fine_tuned, inheritance
from nnunetv2_cva.seeing.requests import device_of
from nnunetv2_cva.training import checkpoint
from nnunetv2_cva.training.launch import load_pretrained
from nnunetv2_cva.transfer.target import find_target

BOUNDED = settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
NAMES = st.sampled_from([*CVAConfig().as_dict(), "epohcs", "probe_cases"])


def only_value_errors(function, *arguments):
    """What the function makes of it; None where it refuses in one sentence."""
    try:
        return function(*arguments)
    except ValueError as e:
        assert str(e).strip(), "a refusal says something"
        return None


# ---- what others write


@BOUNDED
@given(st.dictionaries(NAMES, JSON, max_size=4) | JSON)
@example({"roi_size": [7, 7]})
@example({"roi_size": [[], [], []]})
@example({"overlap": [0.5, None]})
@example({"spatial": []})
@example({"gradient_checkpointing": 1})
@example({"epochs": 10**400})
@example({"betas": [0.9, float("nan")]})
def test_any_block_of_settings_is_taken_or_refused(block):
    """And what is taken can be stored, compared and trained with: it comes back the same."""
    for recipe in (CVAConfig(), FinetuneConfig()):
        found = only_value_errors(recipe.updated, block, "fuzz")
        if found is not None:
            assert type(recipe)().updated(json.loads(json.dumps(found.as_dict())), "again") == found


@BOUNDED
@given(JSON, JSON, JSON)
@example({"configurations": {"a": {"inherits_from": ["a"]}}}, None, None)
@example({"configurations": {"a": {"inherits_from": {}}}}, None, None)
@example({"configurations": []}, None, None)
def test_any_plans_are_read_or_refused(content, parent, block):
    made = {"plans_name": "p", "configurations": {"a": {"inherits_from": parent, "cva": block}, "b": content}}
    for plans in (content if isinstance(content, dict) else {}, made):
        for function in (inheritance, configuration, fine_tuned):
            only_value_errors(function, plans, "a")
        only_value_errors(resolve, CVAConfig(), plans, "a", {})


@BOUNDED
@given(st.text(max_size=30))
@example('{"epochs": 1e400}')
@example("[" * 5000)
def test_any_environment_is_taken_or_refused(text):
    only_value_errors(resolve, CVAConfig(), tiny_plans(), "2d", {"nnUNet_cva": text})


@BOUNDED
@given(st.binary(max_size=40))
@example(b"\xff\xfe{\x00}\x00")
@example(b"[" * 5000)
@example(b"1" * 5000)
def test_any_bytes_are_json_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.json"
    path.write_bytes(content)
    only_value_errors(read_json, path)
    only_value_errors(read_object, path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    content = {"current_epoch": 3, "cva": {"step": 1, "heads": {}, "config": {}}, "network_weights": {"a": torch.randn(300)}}
    content.update(optimizer_state={}, init_args={})
    checkpoint.save(content, folder / checkpoint.LATEST)
    return folder


def test_every_flipped_bit_of_the_content_is_noticed_and_nothing_else_happens(saved, tmp_path):
    """Of 60 bits, evenly over the file: refused, or in bytes that no content depends on."""
    whole = (saved / checkpoint.LATEST).read_bytes()
    before = checkpoint.load_whole(saved / checkpoint.LATEST)
    noticed = 0
    for n in range(60):
        damaged = bytearray(whole)
        damaged[len(whole) * n // 60] ^= 1 << (n % 8)
        (tmp_path / checkpoint.LATEST).write_bytes(damaged)
        found = only_value_errors(checkpoint.newest, tmp_path)
        noticed += found is None
        if found is not None:
            assert torch.equal(found[1]["network_weights"]["a"], before["network_weights"]["a"])
            assert {k: v for k, v in found[1].items() if k != "network_weights"} == {
                k: v for k, v in before.items() if k != "network_weights"
            }
    print("noticed of 60:", noticed)
    assert noticed >= 20  # the rest is padding between the entries


@BOUNDED
@given(st.dictionaries(st.sampled_from(["current_epoch", "cva", "network_weights", "init_args"]), JSON, max_size=4))
@example({"cva": [], "current_epoch": 1})
@example({"cva": {"heads": {}}, "current_epoch": "1"})
def test_any_content_of_a_checkpoint_is_read_or_refused(tmp_path_factory, content):
    folder = tmp_path_factory.getbasetemp() / "contents"
    folder.mkdir(exist_ok=True)
    torch.save(content, folder / checkpoint.LATEST)
    only_value_errors(checkpoint.newest, folder)


# ---- the command


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(28, "No space left on device", "/x/y.json"), "/x/y.json: No space left on device. Make room there."),
        (OSError(30, "Read-only file system", "/x"), "/x: Read-only file system."),
        (PermissionError(13, "Permission denied", b"/b\xff"), "/b\\udcff: Permission denied. Get permission, or choose another"),
        (OSError("one sentence"), "one sentence"),
        (ValueError("two\n  lines"), "two lines"),
    ],
)
def test_what_the_system_refuses_is_one_sentence(monkeypatch, capsys, error, expected):
    def run(args):
        raise error

    monkeypatch.setattr(settings_command, "run", run)
    assert main(["settings"]) == 2
    out = capsys.readouterr().err.encode("ascii", "backslashreplace").decode()
    assert out.startswith(f"nnUNetv2_cva: error: {expected}") and out.count("\n") == 1 and "Traceback" not in out
    for arguments in (["--debug", "settings"], ["settings", "--debug"]):
        assert main(arguments) == 2
        assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "w.pth", "-d", "4", "-c", "3d_fullres", "-p", "../x"],
        ["plan", "-d", "Dataset300_../../x", "--images", "."],
        ["preprocess", "-d", "4", "-c", "a/b"],
        ["peek", "-d", "4", "-p", "n" * 300],
        ["train", "4", "3d_fullres", "all", "-tr", "../T"],
        ["bench", "-d", "4", "-c", ".."],
    ],
)
def test_names_stay_names(arguments, tmp_path, monkeypatch, capsys):
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    before = sorted(tmp_path.rglob("*"))
    assert main(arguments) == 2
    assert "expected a name, found" in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "4", "3d_fullres", "x", "-device", "cpu"], "fold`: expected \"all\" or a number, found 'x'"),
        (["train", "4", "3d_fullres", "all", "--c", "--val", "-device", "cpu"], "--c goes with neither --val nor"),
        (["train", "4", "3d_fullres", "all", "-device", "cpu"], "No dataset 4"),
        (["train", "4", "3d_fullres", "all", "-device", "cpu", "-num_gpus", "-1"], "-num_gpus -1: expected 1 or more"),
        (["info", "n" * 300 + ".pth"], "n.pth"),
    ],
)
def test_absurd_arguments_are_one_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A dataset that can be trained on, with stock nnU-Net's weights for it, and others."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        make_project(folder, patch, cva={"epochs": 1})
        network = find_target("100", "3d_fullres", "nnUNetPlans", "nnUNetTrainer").build()
    weights = {k: torch.full_like(v, 0.01) for k, v in network.state_dict().items()}
    torch.save({"network_weights": weights}, folder / "fits.pth")
    torch.save({"network_weights": {**weights, next(iter(weights)): torch.zeros(3)}}, folder / "other.pth")
    torch.save({"a": 1}, folder / "nothing.pth")
    (folder / "torn.pth").write_bytes(b"PK\x03\x04torn")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-pretrained_weights", "other.pth"], r"other.pth does not fit the network \(encoder.*: expected .*, found \(3,\)\)"),
        (["-pretrained_weights", "nothing.pth"], "nothing.pth holds no weights of a network"),
        (["-pretrained_weights", "torn.pth"], "torn.pth cannot be read as a checkpoint"),
        (["-pretrained_weights", "nowhere.pth"], "nowhere.pth does not exist"),
        (["--val"], "checkpoint_final.pth does not exist: the training has not ended"),
    ],
)
def test_what_a_training_cannot_begin_with_is_one_sentence(project, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(project)
    make_project(project, monkeypatch, cva={"epochs": 1})
    assert main(["train", "100", "3d_fullres", "all", "-device", "cpu", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batch_size", "2", "expected a positive whole number as batch_size, found '2'"),
        ("batch_size", True, "expected a positive whole number as batch_size, found True"),
        ("patch_size", [16, 1.5, 16], "expected a list of positive numbers as patch_size"),
        ("patch_size", [16, -8, 16], "expected a list of positive numbers as patch_size"),
        ("spacing", None, "expected a list of positive numbers as spacing, found None"),
        ("data_identifier", 7, "expected a folder's name as data_identifier, found 7"),
        ("data_identifier", "../../x", "expected a folder's name as data_identifier"),
        ("architecture", {}, "nnUNetTrainer cannot build its network .*KeyError 'network_class_name'"),
    ],
)
def test_plans_with_values_of_another_kind_are_one_sentence(project, monkeypatch, capsys, key, value, message):
    data = make_project(project, monkeypatch, cva={"epochs": 1})
    plans = tiny_plans()
    plans["configurations"]["3d_fullres"][key] = value
    (data.parent / "nnUNetPlans.json").write_text(json.dumps(plans))
    for command in (["train", "100", "3d_fullres", "all"], ["bench", "-d", "100", "-c", "3d_fullres"]):
        assert main([*command, "-device", "cpu"]) == 2
        assert re.search(message, capsys.readouterr().err), command
    if key != "architecture":
        assert main(["peek", "-d", "100", "-p", "nnUNetPlans", "-c", "3d_fullres"]) == 2
        assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("device", ["abc", "cuda:77", "meta"])
def test_a_device_that_is_not_there_is_one_sentence(device):
    with pytest.raises(ValueError, match=f"`device={device}`: torch finds cpu"):
        device_of(device)
    assert device_of("cpu") == "cpu"


def test_weights_are_taken_as_nnunets_function_takes_them(project, monkeypatch):
    make_project(project, monkeypatch, cva={"epochs": 1})
    ours, theirs = (find_target("100", "3d_fullres", "nnUNetPlans", "nnUNetTrainer").build() for _ in range(2))
    load_pretrained(ours, str(project / "fits.pth"))
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        for name, value in theirs.state_dict().items():
            if ".seg_layers." not in name:
                value.zero_()
    load_pretrained_weights(theirs, str(project / "fits.pth"))
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
    assert all((v == torch.full_like(v, 0.01)).all() for k, v in ours.state_dict().items() if k.startswith("encoder."))
    assert all(len(v.unique()) > 1 for k, v in ours.state_dict().items() if k.endswith("seg_layers.0.weight"))


def test_a_reader_that_has_seen_enough_is_no_error():
    code = "import sys; from nnunetv2_cva.commands.main import main; sys.exit(main(['settings', '--markdown']))"
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    run.stdout.close()
    assert (run.stderr.read(), run.wait()) == (b"", 0)
    run.stderr.close()


def test_an_ascii_terminal_shows_every_name(tmp_path):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = "import sys; from nnunetv2_cva.commands.main import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "info", str(tmp_path / "Schädel.pth")], env=environment, capture_output=True
    )
    assert done.returncode == 2 and b"Traceback" not in done.stderr and b"does not exist" in done.stderr
