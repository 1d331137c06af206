"""Files that are no checkpoints, descriptions that lack something, and outputs that cannot be written: one sentence each."""

import copy
import os
import string
import subprocess
import sys

import pytest
import torch
from helpers.targets import call, planned, pretraining, stock_checkpoint, target
from torch import nn

from nnunetv2_cva.transfer.read import read
from nnunetv2_cva.transfer.start import start_from
from nnunetv2_cva.transfer.weights import NeedsOption, check_writable, opened, save_whole
from nnunetv2_cva.transfer.write import write

# ---- opening


@pytest.mark.parametrize("rest", ["", "a", "reat\n", "ase_id,dice\na,0.5\n", "onfig: 3\nother: 4\n"])
def test_text_is_no_checkpoint_whatever_it_begins_with(tmp_path, rest):
    """The unpickler takes the first letter for a command; none of them may lead to a traceback or to the advice to trust it."""
    for first in string.printable:
        (tmp_path / "text").write_text(first + rest)
        with pytest.raises(ValueError, match="is not a checkpoint: PyTorch finds no saved object in it") as e:
            opened(tmp_path / "text")
        assert not isinstance(e.value, NeedsOption)


@pytest.mark.parametrize("protocol", [2, 4])
def test_damaged_checkpoints_are_one_sentence(tmp_path, protocol):
    """With every 97th byte changed, and cut short, in the present format and in the one before PyTorch 1.6."""
    for zipped in (True, False):
        options = {"pickle_protocol": protocol, "_use_new_zipfile_serialization": zipped}
        torch.save({"a": torch.zeros(3), "b": [1, "x"]}, tmp_path / "w.pth", **options)
        whole = (tmp_path / "w.pth").read_bytes()
        for at in range(0, len(whole), 97):
            (tmp_path / "d.pth").write_bytes(whole[:at] + bytes([whole[at] ^ 0x5A]) + whole[at + 1 :])
            (tmp_path / "s.pth").write_bytes(whole[:at])
            for name in ("d.pth", "s.pth"):
                try:
                    opened(tmp_path / name)
                except ValueError as e:
                    assert str(e).count("\n") == 0


def test_a_checkpoint_of_another_pickle_protocol_may_be_trusted(tmp_path):
    torch.save({"network_weights": {}}, tmp_path / "a.pth", pickle_protocol=4)
    with pytest.raises(NeedsOption, match="holds more than PyTorch opens as weights; opening it may execute"):
        opened(tmp_path / "a.pth")
    assert opened(tmp_path / "a.pth", trust=True) == {"network_weights": {}}


# ---- what a file says about itself


def entries(value, depth, at=()):
    """The path of every entry of nested dictionaries but the weights."""
    if isinstance(value, dict) and depth:
        for key, inner in value.items():
            if key not in ("network_weights", "heads", "teacher", "config", "2d"):
                yield (*at, key)
                yield from entries(inner, depth - 1, (*at, key))


def replaced(content, path, value):
    content = copy.copy(content)
    inner = content
    for key in path[:-1]:
        inner[key] = inner = copy.copy(inner[key])
    inner[path[-1]] = value
    return content


@pytest.mark.parametrize("kind", ["pretraining", "exported", "nnssl"])
def test_nothing_that_a_file_says_about_itself_keeps_it_from_being_read(tmp_path, monkeypatch, capsys, kind):
    planned(tmp_path / "preprocessed", target(name="Dataset004_Other"), monkeypatch)
    pretraining(tmp_path / "pretraining.pth", target())
    for name, options in {"exported": ("-d", 4, "-c", "3d_fullres"), "nnssl": ("--format", "nnssl")}.items():
        assert call("export", tmp_path / "pretraining.pth", *options, "-o", tmp_path / f"{name}.pth") == 0
    content = torch.load(tmp_path / f"{kind}.pth", weights_only=True)
    wrong = (None, 1, "x", [], [None], {})
    for number, path in enumerate(entries(content, 4)):
        torch.save(replaced(content, path, wrong[number % len(wrong)]), tmp_path / "a.pth")
        assert call("info", tmp_path / "a.pth") == 0, path
        assert "residual U-Net" in capsys.readouterr().out


def test_two_versions_of_one_weight_under_two_prefixes_are_refused(tmp_path):
    weights = target().build().state_dict()
    twice = {**weights, **{f"module.{k}": v.clone() for k, v in weights.items()}}
    torch.save({"network_weights": twice}, tmp_path / "same.pth")
    assert read(tmp_path / "same.pth").weights.keys() == weights.keys()
    twice["module.encoder.stem.convs.0.conv.weight"] += 1
    torch.save({"network_weights": twice}, tmp_path / "other.pth")
    expected = r"two versions of encoder\.stem\.convs\.0\.conv\.weight, one of them as module\.encoder\.stem.*differ"
    with pytest.raises(ValueError, match=expected):
        read(tmp_path / "other.pth")


def test_info_describes_any_architecture(tmp_path, capsys):
    stock_checkpoint(tmp_path / "a.pth", target(), nn.Linear(2, 3))
    assert call("info", tmp_path / "a.pth") == 0
    said = capsys.readouterr().out
    assert "network        unknown\ntrainer        nnUNetTrainer" in said and "plans          nnUNetPlans" in said
    with pytest.raises(ValueError, match="Unknown architecture"):
        read(tmp_path / "a.pth")


# ---- init_from has no options


class Code:
    pass


def test_init_from_names_no_option_that_it_does_not_have(tmp_path):
    here, there = target("primus"), target("primus", view=(16, 16, 24))
    torch.save({"network_weights": here.build().state_dict()}, tmp_path / "bare.pth")
    torch.save({"network_weights": here.build().state_dict(), "more": Code()}, tmp_path / "code.pth")
    for name, reason, option in (
        ("bare.pth", "does not say what patch size", "take a patch size for the file's"),
        ("code.pth", "which is code and not only weights", "trust the file"),
    ):
        file = tmp_path / name
        way_out = rf"`nnUNetv2_cva export`, which can be told to {option}, .* -pretrained_weights in place of"
        with pytest.raises(ValueError, match=rf"^init_from: .*{reason}.*{way_out}") as e:
            start_from(str(file), there.build(), there)
        assert "--" not in str(e.value)


# ---- writing


def test_the_file_that_the_weights_come_from_is_never_overwritten(tmp_path, monkeypatch, capsys):
    planned(tmp_path / "preprocessed", target(name="Dataset004_Other"), monkeypatch)
    pretraining(tmp_path / "c.pth", target())
    os.link(tmp_path / "c.pth", tmp_path / "linked.pth")
    (tmp_path / "pointing.pth").symlink_to("c.pth")
    before = (tmp_path / "c.pth").read_bytes()
    for options in (("-d", 4, "-c", "3d_fullres"), ("--format", "nnssl")):
        for name in ("c.pth", "linked.pth", "pointing.pth"):
            assert call("export", tmp_path / "c.pth", *options, "-o", tmp_path / name) == 2
            assert "is the file that the weights come from" in capsys.readouterr().err
    assert (tmp_path / "c.pth").read_bytes() == before and "cva" in opened(tmp_path / "c.pth")
    with pytest.raises(ValueError, match="is the file that the weights come from"):
        write(tmp_path / "c.pth", {}, tmp_path / "c.pth", print)


def test_the_output_is_tried_before_the_target_is_looked_for(tmp_path, monkeypatch, capsys):
    """Also in a dry run; nothing is left behind."""
    planned(tmp_path / "preprocessed", target(name="Dataset004_Other"), monkeypatch)
    pretraining(tmp_path / "c.pth", target())
    before = sorted(tmp_path.rglob("*"))
    to = ("-d", 4, "-c", "3d_fullres", "-tr", "Bogus")
    for out, expected in (
        (tmp_path / "missing" / "w.pth", "w.pth cannot be written: No such file or directory. Nothing was written."),
        (tmp_path / "c.pth" / "w.pth", "w.pth cannot be written: Not a directory. Nothing was written."),
        (tmp_path, "is a folder"),
        ("/dev/null", "/dev/null is not an ordinary file"),
    ):
        for options in (to, (*to, "--dry-run"), ("--format", "nnssl", "--dry-run")):
            assert call("export", tmp_path / "c.pth", *options, "-o", out) == 2
            said = capsys.readouterr().err
            assert expected in said and said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


LIMITED = """
import resource, signal, sys, torch
from nnunetv2_cva.transfer.weights import save_whole
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_whole({"a": torch.zeros(100_000)}, sys.argv[1])
except OSError as e:
    print(e)
"""


def test_a_write_that_fails_says_why_and_leaves_what_was_there(tmp_path):
    """Torch itself says "unexpected pos 64 vs 0"."""
    (tmp_path / "w.pth").write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path / "w.pth")], capture_output=True, text=True, check=True)
    assert "w.pth cannot be written: File too large. " in done.stdout and "GB are free there.\n" in done.stdout
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]


def test_what_a_check_raises_is_passed_on_and_nothing_is_left(tmp_path):
    def check(file):
        assert torch.load(file, weights_only=True) == {"a": 1}
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="^no$"):
        save_whole({"a": 1}, tmp_path / "w.pth", check)
    assert not list(tmp_path.iterdir())
    save_whole({"a": 1}, tmp_path / "w.pth")
    check_writable(tmp_path / "w.pth", tmp_path / "source.pth")
    assert [p.name for p in tmp_path.iterdir()] == ["w.pth"]
