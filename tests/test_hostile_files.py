"""Files made to harm: one sentence each, nothing in them imported or called, memory bounded."""

import io
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.targets import call, planned, pretraining, stock_checkpoint, target

from nnunetv2_cva import load_network
from nnunetv2_cva.transfer import safety
from nnunetv2_cva.transfer.architectures import built, importable
from nnunetv2_cva.transfer.read import read
from nnunetv2_cva.transfer.weights import opened


@pytest.fixture
def weights():
    return dict(target().build().state_dict())


KEY = "encoder.stages.0.blocks.0.conv1.conv.bias"


# ---- archives


def test_flipped_bits_are_noticed_when_a_file_is_opened(tmp_path, weights):
    """Every 1/60 of the file; what goes unnoticed is padding, and then every tensor is as it was."""
    torch.save({"network_weights": weights}, tmp_path / "w.pth")
    whole = (tmp_path / "w.pth").read_bytes()
    noticed = 0
    for at in range(100, len(whole), len(whole) // 60):
        (tmp_path / "d.pth").write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        try:
            found = opened(tmp_path / "d.pth")["network_weights"]
        except ValueError as e:
            noticed += 1
            assert str(e).count("\n") == 0
        else:
            assert all(torch.equal(v, found[k]) for k, v in weights.items())
    assert noticed >= 50


def test_an_archive_without_checksums_is_read(tmp_path, weights):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"network_weights": weights}, tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert opened(tmp_path / "w.pth")["network_weights"].keys() == weights.keys()


def packed(source, there, how, repeat=1):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(there, "w", how) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry) * repeat)


def test_an_archive_that_was_packed_again_is_named(tmp_path, weights):
    torch.save({"network_weights": weights}, tmp_path / "w.pth")
    packed(tmp_path / "w.pth", tmp_path / "again.pth", zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"again\.pth was packed again with compression.*zip -0"):
        opened(tmp_path / "again.pth")
    packed(tmp_path / "w.pth", tmp_path / "stored.pth", zipfile.ZIP_STORED)
    assert opened(tmp_path / "stored.pth")["network_weights"].keys() == weights.keys()
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", bytes(200_000_000))
    with pytest.raises(ValueError, match="packed again with compression"):
        opened(tmp_path / "bomb.pth")


# ---- tensors and containers


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (torch.zeros(1).expand(10**6, 10**7), "a tensor of 10,000,000,000,000 numbers of which 4 bytes are stored"),
        (torch.zeros(4, device="meta"), r"a tensor without content \(meta\)"),
        (torch.eye(4).to_sparse(), "a sparse tensor"),
        (torch.zeros(4, dtype=torch.complex64), "a tensor of complex64"),
        (torch.zeros(4, dtype=torch.float8_e5m2), "a tensor of float8_e5m2"),
    ],
)
def test_tensors_that_are_not_what_they_seem(tmp_path, weights, value, what):
    torch.save({"network_weights": {**weights, KEY: value}}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=f"{KEY} is {what}"):
        read(tmp_path / "w.pth")


def nested(depth):
    found: list = []
    for _ in range(depth):
        found = [found]
    return found


def doubled(times):
    """A list that mentions a list twice that mentions a list twice ..."""
    found: list = ["x"]
    for _ in range(times):
        found = [found, found]
    return found


def circle():
    found: dict = {}
    found["again"] = found
    return found


@pytest.mark.parametrize("value", [nested(400), doubled(40), circle()], ids=["deep", "doubled", "circle"])
@pytest.mark.parametrize("place", ["init_args", "pretraining", "logging"])
def test_containers_without_end(tmp_path, weights, value, place, capsys):
    buffer = io.BytesIO()
    torch.save({"network_weights": weights, "trainer_name": "x", place: {"plans": value}}, buffer)
    (tmp_path / "w.pth").write_bytes(buffer.getvalue())
    assert call("info", tmp_path / "w.pth") == 2
    assert "it is no checkpoint of a network" in capsys.readouterr().err


class Asking:
    """Whoever unpickles it calls ``function``."""

    def __init__(self, function, *arguments):
        self.called = function, arguments

    def __reduce__(self):
        return self.called


def grown():
    """A tensor of one number that would be copied to a terabyte."""
    from torch._utils import _rebuild_device_tensor_from_cpu_tensor as moved

    return Asking(moved, torch.zeros(1).expand(10**6, 10**6), torch.float64, "cpu", False)


@pytest.mark.parametrize("value", [Asking(bytearray, 10**12), grown()], ids=["bytearray", "tensor"])
@pytest.mark.parametrize("archive", [True, False])
def test_what_would_take_memory_when_it_is_opened_is_not_opened(tmp_path, weights, value, archive):
    torch.save({"network_weights": weights, "x": value}, tmp_path / "w.pth", _use_new_zipfile_serialization=archive)
    with pytest.raises(ValueError, match=r"calls \S+ when it is opened, which may take more memory than there is"):
        read(tmp_path / "w.pth")


# ---- names


class Called:
    """Anything with a side effect."""

    def __reduce__(self):
        return print, ("called",)


def with_architecture(path, **changed):
    made = target()
    settings = made.plans["configurations"]["3d_fullres"]
    settings["architecture"].update(changed)
    return stock_checkpoint(path, made, target().build(), cva={"config": {}, "backbone_trainer": "nnUNetTrainer"}), made


@pytest.mark.parametrize("name", ["subprocess.Popen", "os.system", "dynamic_network_architectures.architectures.unet.nn", "", 3])
def test_no_other_network_is_imported_than_the_known_ones(tmp_path, monkeypatch, capsys, name):
    file, made = with_architecture(tmp_path / "a.pth", network_class_name=name)
    assert call("export", file, "--format", "nnssl", "-o", tmp_path / "n.pth") == 2
    said = capsys.readouterr().err
    assert "as their network, which is not imported" in said and said.count("\n") == 1 and not (tmp_path / "n.pth").exists()
    with pytest.raises(ValueError, match="which is not imported"):
        load_network(file)
    planned(tmp_path / "preprocessed", target(name="Dataset004_Other", features=(4, 6, 10)), monkeypatch)
    assert call("check", file, "-d", 4, "-c", "3d_fullres") == 1
    assert "--format plans" not in capsys.readouterr().out, "such plans are not advised"
    assert call("export", file, "--format", "plans", "-d", 4, "-c", "3d_fullres", "-o", "Theirs") == 2
    assert "which is not imported" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["subprocess.Popen", "torch.hub.load", "torch.nn.init.zeros_", "torch.nn.modules", ["torch.nn.ReLU"]]
)
def test_no_other_arguments_are_imported_than_layers_of_torch(tmp_path, name):
    arguments = {**target().plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"], "nonlin": name}
    file, _ = with_architecture(tmp_path / "a.pth", arch_kwargs=arguments)
    with pytest.raises(ValueError, match=r"Expected the name of a layer in torch\.nn"):
        load_network(file)
    with pytest.raises(ValueError, match=r"Expected the name of a layer in torch\.nn"):
        built({"arch_class_name": "ResidualEncoderUNet", "arch_kwargs": arguments}, 1, 1, (16, 24, 32))
    importable(target().plans["configurations"]["3d_fullres"]["architecture"])


ZOO = """
import resource, sys
from nnunetv2_cva.transfer.read import read
import dynamic_network_architectures, timm.layers
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[1:]:
    try:
        read(name, any_network=True)
        print(name, "was read")
    except ValueError as e:
        assert str(e).count("\\n") == 0
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


# From Python 3.12 on the one in C heeds no limit of ours.
IN_PYTHON = SimpleNamespace(Pickler=pickle._Pickler, dumps=pickle.dumps, __name__="pickle")


def test_the_zoo_takes_no_memory(tmp_path, weights):
    """At most 200 MB above what the imports take, for files that would be terabytes."""
    files = {
        "expanded": {"network_weights": {**weights, KEY: torch.zeros(1).expand(10**6, 10**6)}},
        "doubled": {"network_weights": weights, "init_args": {"plans": doubled(60)}},
        "deep": {"network_weights": weights, "init_args": nested(5000)},
        "meta": {"network_weights": {**weights, KEY: torch.zeros(10**9, device="meta")}},
        "bytes": {"network_weights": weights, "x": Asking(bytearray, 10**9)},
    }
    for name, content in files.items():
        buffer = io.BytesIO()
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(100_000)
        torch.save(content, buffer, pickle_module=IN_PYTHON)
        sys.setrecursionlimit(limit)
        (tmp_path / name).write_bytes(buffer.getvalue())
    with zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("archive/data.pkl", bytes(500_000_000))
    (tmp_path / "pickle").write_bytes(pickle.dumps({"network_weights": Called()}))
    names = [str(p) for p in sorted(Path(tmp_path).iterdir())]
    done = subprocess.run([sys.executable, "-c", ZOO, *names], capture_output=True, text=True, check=True)
    assert "was read" not in done.stdout and "called" not in done.stdout
    assert int(done.stdout.split()[-1]) < 200, done.stdout


def test_what_is_walked_through_is_counted_as_often_as_it_is_mentioned(tmp_path):
    safety.check_containers({"a": [1] * 1000, "b": {"c": ({"d": [2]},)}}, tmp_path)
    shared = [0] * 1000
    with pytest.raises(ValueError, match="more than 2,000,000 entries"):
        safety.check_containers([shared] * 3000, tmp_path)
    pretraining(tmp_path / "c.pth", target())
    assert read(tmp_path / "c.pth").kind == "pretraining checkpoint"
