"""docs/api.md: every line runs, every shape beside a line is so; and importing the package costs nothing."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.targets import pretraining, randomised, stock_checkpoint, target

import nnunetv2_cva
from nnunetv2_cva import CVAConfig, draw_pair, load_network, read_pair
from nnunetv2_cva.transfer import target as target_module

DOCUMENT = Path(__file__).parents[1] / "docs" / "api.md"


def test_the_snippets_run_and_have_the_shapes_they_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network, teacher = pretraining(tmp_path / "checkpoint_final.pth", target())
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


def test_a_file_that_does_not_say_how_its_network_is_built(tmp_path):
    torch.save({"network_weights": target().build().state_dict()}, tmp_path / "bare.pth")
    with pytest.raises(ValueError, match="does not state how its network is built"):
        load_network(tmp_path / "bare.pth")
