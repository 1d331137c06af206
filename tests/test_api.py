"""docs/api.md: every line runs, every shape beside a line is so; and importing the package costs nothing."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus
from helpers.images import voxels, write
from helpers.targets import call, planned, pretraining, randomised, stock_checkpoint, target

import nnunetv2_cva
from nnunetv2_cva import CVAConfig, draw_pair, load_network, read_pair
from nnunetv2_cva.seeing.frozen import load_frozen
from nnunetv2_cva.transfer import target as target_module

DOCUMENT = Path(__file__).parents[1] / "docs" / "api.md"


def test_the_snippets_run_and_have_the_shapes_they_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network, teacher = pretraining(tmp_path / "checkpoint_final.pth", target())
    write(tmp_path / "scan.nii.gz", voxels(0, (29, 27, 31), air=1))
    snippets = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    known: dict = {}
    checked = 0
    for snippet in snippets:
        exec(compile(snippet, str(DOCUMENT), "exec"), known)
        lines = snippet.splitlines()
        for node in ast.parse(snippet).body:
            stated = re.search(r"# (\([\d, ]*\))$", lines[node.end_lineno - 1])
            if stated and isinstance(node, ast.Assign):
                value = eval(compile(ast.Expression(node.value), str(DOCUMENT), "eval"), known)
                assert tuple(value.shape) == ast.literal_eval(stated.group(1)), ast.unparse(node)
                checked += 1
    assert checked == snippets_with_shapes(snippets) > 8
    assert set(nnunetv2_cva.__all__) <= known.keys(), "every public name is shown"
    assert torch.equal(known["maps"][0], teacher.encoder["encoder"](torch.zeros(1, 1, 16, 24, 32))[0])


def snippets_with_shapes(snippets):
    return sum(len(re.findall(r"# \([\d, ]*\)$", s, re.MULTILINE)) for s in snippets)


LIGHT = """
import sys, nnunetv2_cva
assert not {"torch", "numpy", "nnunetv2"} & sys.modules.keys()
from nnunetv2_cva import CVAConfig
assert "torch" not in sys.modules
"""


def test_importing_costs_nothing_and_names_are_found_when_used():
    subprocess.run([sys.executable, "-c", LIGHT], check=True)
    for name in nnunetv2_cva.__all__:
        assert getattr(nnunetv2_cva, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'bogus'"):
        _ = nnunetv2_cva.bogus


def test_a_volume_of_another_shape_is_refused():
    import numpy as np

    pair = draw_pair((20, 30, 25), (8, 12, 10), CVAConfig(), np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"expected a volume \(C, 20, 30, 25\), found \(20, 30, 25\)"):
        read_pair(np.zeros((20, 30, 25)), pair)


@pytest.mark.parametrize("family", ["residual", "plain", "primus", "primus V3"])
def test_every_network_is_loaded_with_every_tensor(tmp_path, monkeypatch, family):
    """From a stock checkpoint, output layer and all; its output is that of the network that was saved."""
    made = target(family, channels=2, classes=3)
    monkeypatch.setattr(target_module, "trainer_class", lambda name: made.trainer)
    network = randomised(made.build(deep_supervision=False)).eval()
    loaded = load_network(stock_checkpoint(tmp_path / "a.pth", made, network))
    assert all(torch.equal(v, loaded.network.state_dict()[k]) for k, v in network.state_dict().items())
    x = torch.randn(1, 2, *made.view)
    assert torch.equal(network(x), loaded.network(x))
    maps = loaded.maps(x)
    assert [m.shape[1] for m in maps] == [t.channels for t in loaded.taps]
    assert not loaded.network.training and all(p.requires_grad for p in loaded.network.parameters())


@pytest.mark.parametrize("axes", ["residual", "plain", "residual, anisotropic", "primus"])
def test_a_state_dict_alone_is_built_from_its_shapes(tmp_path, axes):
    """The same function as the network that was saved."""
    if axes == "primus":
        made = Primus(2, 132, (8, 8, 8), 3, 2, 2, (16, 16, 16), init_values=0.1, scale_attn_inner=True)
        network, view = randomised(made).eval(), (16, 16, 16)
    else:
        family, _, anisotropic = axes.partition(", ")
        kernels = ((1, 3, 3), (3, 3, 3), (3, 3, 3)) if anisotropic else None
        strides = ((1, 1, 1), (1, 2, 2), (2, 2, 2)) if anisotropic else ((1, 1, 1), (2, 2, 2), (2, 2, 2))
        target_ = target(family, channels=2, classes=3, kernels=kernels, strides=strides, blocks=(2, 1, 3))
        network, view = randomised(target_.build(deep_supervision=False)).eval(), target_.view
    torch.save(network.state_dict(), tmp_path / "bare.pth")
    loaded = load_network(tmp_path / "bare.pth")
    x = torch.randn(1, 2, *view)
    with torch.no_grad():
        assert torch.equal(network(x), loaded.network(x))
    assert [m.shape[1] for m in loaded.maps(x)] == [t.channels for t in loaded.taps]


@pytest.mark.parametrize("kind", ["no decoder", "Primus, other view", "Primus V3", "more"])
def test_what_shapes_leave_open_is_said_with_what_to_do(tmp_path, kind):
    network = target({"Primus, other view": "primus", "Primus V3": "primus V3"}.get(kind, "residual")).build()
    weights = {k: v for k, v in network.state_dict().items() if kind != "no decoder" or k.startswith("encoder.")}
    if kind == "more":
        weights["encoder.stages.0.blocks.0.squeeze.weight"] = torch.zeros(3)
    torch.save({"network_weights": weights}, tmp_path / "bare.pth")
    said = {
        "no decoder": "the strides of its stages show in the upsampling of a decoder only",
        "Primus, other view": "positions are no cube",
        "Primus V3": "Primus V2/V3 is none that plans describe",
        "more": "nnU-Net builds no network of these shapes that has encoder.stages.0.blocks.0.squeeze",
    }[kind]
    with pytest.raises(ValueError, match=f"does not state how its network is built, and .*{said}.*with `nnUNetv2_cva export`"):
        load_network(tmp_path / "bare.pth")


def test_a_file_made_for_a_target_says_how_images_are_preprocessed(tmp_path, monkeypatch):
    """The way for weights that say nothing: the target's plans count for them."""
    made = target(name="Dataset004_Other")
    planned(tmp_path / "preprocessed", made, monkeypatch)
    encoder = {k: v for k, v in made.build().state_dict().items() if k.startswith("encoder.")}
    torch.save({"network_weights": encoder}, tmp_path / "bare.pth")
    assert call("export", tmp_path / "bare.pth", "-d", 4, "-c", "3d_fullres", "-o", tmp_path / "w.pth") == 0
    frozen = load_frozen(tmp_path / "w.pth")
    assert frozen.view == made.view and frozen.plans["plans_name"] == "nnUNetPlans"
