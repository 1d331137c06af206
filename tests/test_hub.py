"""Weights to and from a hub: the folder that is uploaded, its reading, and fetching from a local server, online and offline."""

import functools
import json
import os
import re
import shutil
import subprocess
import sys

import huggingface_hub
import numpy as np
import pytest
import torch
from helpers.hub import serving
from helpers.images import write
from helpers.targets import call, planned, pretraining, stock_checkpoint, target
from safetensors import safe_open
from test_look import phantom

from nnunetv2_cva import load_network
from nnunetv2_cva.comparing.arms import named
from nnunetv2_cva.transfer.adapt import match
from nnunetv2_cva.transfer.hub import located
from nnunetv2_cva.transfer.read import read
from nnunetv2_cva.transfer.start import start_from
from nnunetv2_cva.transfer.weights import opened, to_safetensors

FILES = ["README.md", "adaptation_plan.json", "checkpoint_final.pth", "config.json", "model.safetensors", "progress.png"]


@pytest.fixture
def published(tmp_path, capsys):
    """(folder, network, teacher) of a pretraining with curves beside it."""
    made = target()
    made.dataset_json.update(licence="CC-BY-NC-4.0", reference="A dataset, 2020", training=[{"image": "patient_042.nii.gz"}])
    (tmp_path / "run").mkdir()
    network, teacher = pretraining(tmp_path / "run" / "c.pth", made, init_from="/secret/place/first.pth")
    (tmp_path / "run" / "progress.png").write_bytes(b"a picture")
    assert call("export", tmp_path / "run" / "c.pth", "--hub-folder", tmp_path / "published") == 0
    said = capsys.readouterr().out
    assert "Warning: the weights are under CC-BY-NC-4.0, non-commercial" in said and "hf upload ORGANISATION/published" in said
    return tmp_path / "published", network, teacher


# ---- the folder


def test_the_folder_holds_what_is_needed_and_nothing_of_single_cases(published):
    folder, network, _ = published
    assert sorted(p.name for p in folder.iterdir()) == FILES
    texts = "".join((folder / name).read_text() for name in FILES if name.endswith((".md", ".json")))
    assert "patient_042" not in texts and "/secret" not in texts and "first.pth" in texts
    weights = torch.load(folder / "checkpoint_final.pth", weights_only=True)
    beside = str({k: v for k, v in weights.items() if k != "network_weights"})
    assert "patient_042" not in beside and "/secret" not in beside
    plan = json.loads((folder / "adaptation_plan.json").read_text())
    assert plan == weights["nnssl_adaptation_plan"] and plan["key_to_encoder"] == "encoder.stages"


def test_a_tensor_with_several_names_is_stored_once(published):
    folder, network, _ = published
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    assert len(stored) < len(network.state_dict()) / 2
    weights = opened(folder / "model.safetensors")["network_weights"]
    names = [f"{a}encoder.stem.convs.0.{b}.weight" for a in ("", "decoder.") for b in ("conv", "all_modules.0")]
    assert len({weights[n].data_ptr() for n in names}) == 1


def test_the_model_card_has_front_matter_facts_and_commands(published):
    card = (published[0] / "README.md").read_text()
    front = card.split("---")[1]
    assert "license: cc-by-nc-4.0" in front and "library_name: nnunetv2" in front and "- medical-imaging" in front
    for part in (
        "| cases | 12 |",
        "| spacing (mm) | 1x1x1 |",
        "| view (voxels) | 16x24x32 |",
        "no commercial use",
        "A dataset, 2020",
    ):
        assert part in card
    assert "Consistent View Alignment Improves" in card and "![losses" in card and '"mask_block": 8' in card
    assert len(re.search(r"```bash\n(.*?)```", card, re.DOTALL).group(1).strip().splitlines()) == 3
    commands = re.findall(r"nnUNetv2_cva export hf://ORGANISATION/published .*", card)
    assert len(commands) == 1


@pytest.mark.parametrize("name", ["", "model.safetensors", "checkpoint_final.pth"])
def test_our_reader_takes_the_folder_and_every_file(published, name):
    folder, network, _ = published
    source = read(folder / name if name else folder)
    assert source.kind == "nnssl checkpoint" and source.view == (16, 24, 32) and source.card["licence"] == "CC-BY-NC-4.0"
    transfer = match(source, target().build(), target().view)
    assert transfer.share("carried") == 1 and transfer.decoder == "keep"
    loaded = load_network(folder / name)
    x = torch.randn(1, 1, 16, 24, 32)
    for a, b in zip(network.eval().encoder(x), loaded.maps(x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    assert call("info", folder / name) == 0


def test_a_folder_that_holds_something_is_left_alone(published, tmp_path, capsys):
    folder, *_ = published
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert call("export", tmp_path / "run" / "c.pth", "--hub-folder", folder) == 2
    assert "exists and is not an empty folder" in capsys.readouterr().err
    assert call("export", tmp_path / "run" / "c.pth", "--hub-folder", tmp_path / "no" / "where") == 2
    assert "cannot be written" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["published", "run"]
    assert call("export", tmp_path / "run" / "c.pth", "--hub-folder", tmp_path / "new", "-d", 4) == 2
    assert "--hub-folder describes the pretraining itself, not a target: leave out -d" in capsys.readouterr().err
    assert call("export", tmp_path / "run" / "c.pth", "--hub-folder", tmp_path / "dry", "--dry-run") == 0
    assert not (tmp_path / "dry").exists()


def test_a_network_without_a_name_in_the_nnssl_format_is_published_without_plan(tmp_path, capsys, monkeypatch):
    from nnunetv2_cva.transfer import target as target_module

    made = target("primus V3")
    monkeypatch.setattr(target_module, "trainer_class", lambda name: made.trainer)
    pretraining(tmp_path / "c.pth", made)
    assert call("export", tmp_path / "c.pth", "--hub-folder", tmp_path / "v3") == 0
    assert "no adaptation_plan.json: The nnssl format has no name for PrimusV3" in capsys.readouterr().out
    for name in ("checkpoint_final.pth", "model.safetensors"):
        assert match(read(tmp_path / "v3" / name), made.build(), made.view).share("carried") == 1


def test_files_that_are_no_safetensors(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"a\.safetensors cannot be read as safetensors"):
        read(tmp_path / "a.safetensors")
    to_safetensors(dict(target().build().state_dict()), tmp_path / "b.safetensors")
    (tmp_path / "config.json").write_text("{broken")
    with pytest.raises(ValueError, match=r"config\.json, line 1: expected JSON"):
        read(tmp_path / "b.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"a folder without checkpoint_final\.pth, checkpoint\.pth or model\.safetensors"):
        read(tmp_path / "empty")


# ---- fetching


@pytest.mark.parametrize("address", ["hf://org", "hf://org/", "hf://", "hf:///x/y"])
def test_addresses_are_checked_before_anything_is_asked_for(address):
    with pytest.raises(ValueError, match="expected hf://organisation/repository"):
        located(address)


def test_files_of_the_hub_are_never_trusted():
    with pytest.raises(ValueError, match="never trusted to run code"):
        read("hf://org/repo", trust=True)


SCRIPT = """
import sys
from nnunetv2_cva.transfer.read import read
for address in sys.argv[1:]:
    try:
        found = read(address)
        print("READ", found.kind, len(found.weights), found.card.get("licence"), (found.card.get("dataset") or {}).get("cases"))
    except ValueError as e:
        print("ERROR", e)
"""


def asking(home, endpoint, *addresses, **variables):
    """What a process prints that reads these addresses; the hub's client looks at its variables when it is imported."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1", **variables}
    done = subprocess.run([sys.executable, "-c", SCRIPT, *addresses], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_anywhere_a_file_is_accepted_the_hub_is_too_and_offline_the_cache_is_enough(published, tmp_path):
    folder, network, _ = published
    root = tmp_path / "root"
    shutil.copytree(folder, root / "org" / "both")
    shutil.copytree(folder, root / "org" / "tensors", ignore=lambda d, names: ["checkpoint_final.pth"])
    shutil.copytree(folder, root / "MIC-DKFZ" / "nnFoundationCNN", ignore=lambda d, names: [n for n in names if n != "other.pth"])
    bare = {k: v for k, v in network.state_dict().items() if k.startswith("encoder.")}
    torch.save({"network_weights": bare}, root / "MIC-DKFZ" / "nnFoundationCNN" / "other.pth")
    count = len(network.state_dict()) - sum("seg_layers" in k for k in network.state_dict())
    good = ["hf://org/both", "hf://org/tensors", "hf://org/both/model.safetensors@v1", "hf://MIC-DKFZ/nnFoundationCNN/other.pth"]
    bad = ["hf://org/none", "hf://org/both@v2", "hf://org/both/missing.pth"]
    with serving(root) as (endpoint, asked):
        said = asking(tmp_path / "home", endpoint, *good, *bad)
    assert said[:3] == [f"READ nnssl checkpoint {count} CC-BY-NC-4.0 12"] * 3
    assert said[3] == f"READ weights without a description {len(bare)} CC-BY-SA-4.0 None", "known by its repository"
    for line, reason in zip(said[4:], ("no such repository", "no revision 'v2'", "no file missing.pth"), strict=True):
        assert line.startswith("ERROR") and reason in line
    assert not [a for a in asked if a.endswith(".py")], "no code is fetched"
    offline = asking(tmp_path / "home", endpoint, *good[:2], "hf://org/never", HF_HUB_OFFLINE="1")
    assert offline[:2] == said[:2] and "is not in huggingface_hub's cache" in offline[2]
    gone = asking(tmp_path / "home", endpoint, good[0])
    assert gone == said[:1], "the server is gone, the cache is not"


def test_every_command_takes_addresses_of_the_hub(published, tmp_path, monkeypatch, capsys):
    """Commands that look at the file itself, too: when it was written, what it is called, what it holds."""
    root, address = tmp_path / "root", "hf://org/both"
    shutil.copytree(published[0], root / "org" / "both")
    planned(tmp_path / "preprocessed", target(name="Dataset009_Blobs"), monkeypatch)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    dataset = tmp_path / "raw" / "Dataset009_Blobs"
    for n in range(4):
        volume = phantom((n, 0, 0), name="").voxels[0].numpy()
        write(dataset / "imagesTr" / f"b{n}_0000.nii.gz", (100 * volume + 50).astype(np.float32), (1.0, 1.0, 1.0))
        write(dataset / "labelsTr" / f"b{n}.nii.gz", (volume > 0.2).astype(np.uint8), (1.0, 1.0, 1.0))
    about = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "x": 1}, "file_ending": ".nii.gz"}
    (dataset / "dataset.json").write_text(json.dumps(about))
    images, to, cpu = sorted((dataset / "imagesTr").iterdir())[:2], ("-d", 9, "-c", "3d_fullres"), ("-device", "cpu")
    with serving(root) as (endpoint, asked):
        fetch = functools.partial(huggingface_hub.hf_hub_download, endpoint=endpoint, cache_dir=tmp_path / "cache")
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
        assert call("info", address) == 0
        assert call("check", address, *to) == 0
        assert call("export", address, *to, "-o", tmp_path / "w.pth") == 0
        for _ in range(2):  # what is there is not done again
            assert call("embed", address, "-i", *images, "-o", tmp_path / "embedded", *cpu) == 0
        assert call("look", address, "-i", *images, "-o", tmp_path / "looked", "--count", 1, *cpu) == 0
        probed = ("--labelled", 2, "--seeds", 1, *cpu)
        assert call("probe", address, f"{address}/model.safetensors", "-d", 9, "-o", tmp_path / "probed", *probed) == 0
        assert named([address, f"{address}@v1", str(tmp_path / "w.pth")]) == ["both", "both_v1", "w"]
        with pytest.raises(ValueError, match="has no file missing.pth"):
            named([f"{address}/missing.pth"])
        start_from(address, target().build(), target())
    assert "org/both/resolve" in "".join(asked)


def test_stock_checkpoints_are_not_published_as_pretrained(tmp_path, capsys):
    torch.save({"network_weights": target().build().state_dict()}, tmp_path / "bare.pth")
    assert call("export", tmp_path / "bare.pth", "--hub-folder", tmp_path / "x") == 2
    assert "does not state plans" in capsys.readouterr().err and not (tmp_path / "x").exists()
    stock_checkpoint(tmp_path / "s.pth", target(), target().build())
    assert call("export", tmp_path / "s.pth", "--hub-folder", tmp_path / "s") == 0
