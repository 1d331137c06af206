"""Layouts of files that others write, made here from what is known of them: each read and carried tensor by tensor."""

import copy
import re

import pytest
import torch
from helpers.targets import call, planned, pretraining, randomised, stock_checkpoint, target
from test_nnssl_format import open_mind

from nnunetv2_cva.transfer.adapt import fill, match
from nnunetv2_cva.transfer.read import read
from nnunetv2_cva.transfer.table import table

PRIMUS_KEYS = {
    "key_to_encoder": "encoder.eva",
    "key_to_stem": "encoder.down_projection",
    "keys_to_in_proj": ["encoder.down_projection.proj"],
    "key_to_lpe": "encoder.eva.pos_embed",
}


def carried(file, network, made, roles=("encoder",)):
    """The transfer into a fresh network of ``made``; every tensor of ``roles`` is that of ``network`` afterwards."""
    filled = made.build()
    transfer = match(read(file), filled, made.view)
    fill(filled, transfer)
    before, after = network.state_dict(), filled.state_dict()
    keys = [k for r in transfer.rows if r.role in roles for k in r.keys]
    assert keys and all(torch.equal(before[k], after[k]) for k in keys)
    assert transfer.refusal() is None
    return transfer


def renamed(network, prefix, parts=None, **others):
    """The network's tensors below ``prefix`` (of ``parts``), and others beside them."""
    found = {f"{prefix}{k}": v for k, v in network.state_dict().items() if parts is None or k.startswith(parts)}
    return {**found, **others}


def write(path, weights, plan=None, **more):
    torch.save({"network_weights": weights, **({"nnssl_adaptation_plan": plan} if plan else {}), **more}, path)
    return path


# ---- names


@pytest.mark.parametrize("trainer", ["VoCoTrainer", "SimCLRTrainer", "SwinUNETRTrainer"])
def test_prefixes_that_the_plan_states_are_followed(tmp_path, trainer):
    """nnssl's Primus of VoCo, SimCLR and SwinUNETR: an encoder, and heads that nobody needs."""
    made = target("primus")
    network = randomised(made.build())
    file = open_mind(tmp_path / "o.pth", made, network, "PrimusM", trainer=trainer, **PRIMUS_KEYS)
    content = torch.load(file, weights_only=True)
    head = {"projector.0.weight": torch.randn(3, 4), "encoder.head.weight": torch.randn(2, 2)}
    content["network_weights"] = renamed(network, "encoder.", ("eva.", "down_projection."), **head)
    torch.save(content, file)
    transfer = carried(file, network, made)
    said = "\n".join(table(transfer))
    assert "own names for its parts were followed (encoder.eva for eva, encoder.down_projection for down_projection, " in said
    assert "Decoder: fresh; the file has none." in said


@pytest.mark.parametrize("wrapper", ["model.", "network.", "student.", "module.model.", "backbone.net.", "student._orig_mod."])
@pytest.mark.parametrize("family", ["residual", "plain", "primus"])
def test_unknown_wrappers_are_taken_off_with_a_note(tmp_path, wrapper, family):
    made = target(family)
    network = randomised(made.build())
    file = write(tmp_path / "w.pth", renamed(network, wrapper, **{"head.weight": torch.randn(2, 3)}))
    transfer = carried(file, network, made, ("encoder", "decoder"))
    plain = wrapper.replace("module.", "").replace("_orig_mod.", "").rstrip(".")
    assert any(f"is called {plain!r} there" in note and "1 tensors that stand beside" in note for note in transfer.source.notes)


def test_of_student_and_teacher_the_student_is_taken_and_two_networks_are_refused(tmp_path):
    made = target()
    first, second = randomised(made.build(), 1), randomised(made.build(), 2)
    file = write(tmp_path / "s.pth", {**renamed(first, "student."), **renamed(second, "teacher.")})
    carried(file, first, made)
    file = write(tmp_path / "t.pth", {**renamed(first, "one."), **renamed(second, "two.")})
    with pytest.raises(ValueError, match=r"holds 2 networks \(one, two\)"):
        read(file)


def test_a_latent_campus_like_file_is_followed(tmp_path):
    """Encoder and decoder below one wrapper, heads beside; the plan names both prefixes."""
    made = target()
    network = randomised(made.build())
    plan = {
        "architecture_plans": {"arch_class_name": "ResEncL", "arch_kwargs": None, "arch_kwargs_requiring_import": None},
        "pretrain_plan": {"configurations": {"onemmiso": {"spacing": [1, 1, 1], "patch_size": [16, 24, 32]}}},
        "key_to_encoder": "backbone.encoder.stages",
        "key_to_stem": "backbone.encoder.stem",
    }
    file = write(tmp_path / "l.pth", renamed(network, "backbone.", **{"projector.weight": torch.randn(2, 2)}), plan)
    carried(file, network, made, ("encoder", "decoder"))


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        (["conv_blocks_context.0.blocks.0.conv.weight", "tu.0.weight", "seg_outputs.0.weight"], "a network of nnU-Net v1"),
        (["conv_blocks_context.0.0.conv1.weight", "seg_outputs.0.weight"], "an STU-Net"),
        (["stem.weight", "enc_block_0.0.conv1.weight", "down_0.conv1.weight"], "a MedNeXt"),
        (["swinViT.patch_embed.proj.weight"], "a SwinUNETR"),
    ],
)
def test_networks_that_people_have_weights_of_are_named(tmp_path, keys, what):
    torch.save({"state_dict": {k: torch.zeros(2, 1, 3, 3, 3) for k in keys}}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=f"Unknown architecture.* This is {what}"):
        read(tmp_path / "a.pth")


PUBLISHED = {  # OpenMind's and nnssl's trainers: family, what stands before the names, what is left out, what stands beside
    "ResEncL-MAE": ("residual", "", (), ()),
    "ResEncL-VF": ("residual", "", ("decoder.seg_layers",), ()),
    "ResEncL-MG": ("residual", "", (), ()),
    "ResEncL-S3D": ("residual", "", (), ()),
    "ResEncL-SparK": ("residual", "", (), ("mask_token",)),
    "nnFoundationCNN": ("residual", "", (), ()),
    "ResEncL-VoCo": ("residual", "", ("decoder.",), ("projector.0.weight",)),
    "ResEncL-SimCLR": ("residual", "", ("decoder.",), ("projector.0.weight",)),
    "ResEncL-SwinUNETR": ("residual", "", ("decoder.",), ("rotation_head.weight", "contrastive_head.weight")),
    "PrimusM-MAE": ("primus", "", ("up_projection.", "mask_token"), ("decoder.blocks.0.norm1.weight",)),
    "PrimusM-SimMIM": ("primus", "", ("up_projection.",), ("decoder.weight",)),
    "nnFoundationViT": ("primus", "", ("up_projection.", "mask_token"), ("decoder.blocks.0.norm1.weight",)),
    "PrimusM-VF": ("primus", "", ("mask_token",), ()),
    "PrimusM-MG": ("primus", "", ("mask_token",), ()),
    "PrimusM-VoCo": ("primus", "encoder.", ("up_projection.", "mask_token"), ("projector.0.weight",)),
    "PrimusM-SimCLR": ("primus", "encoder.", ("up_projection.", "mask_token"), ("projector.0.weight",)),
    "PrimusM-SwinUNETR": ("primus", "encoder.", ("up_projection.", "mask_token"), ("rotation_head.weight",)),
}


@pytest.mark.parametrize("wrapped", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_layout_is_carried_tensor_by_tensor(tmp_path, name, wrapped):
    family, prefix, dropped, beside = PUBLISHED[name]
    made = target(family)
    network = randomised(made.build())
    stated = PRIMUS_KEYS if prefix else {}
    architecture = "ResidualEncoderUNet" if family == "residual" else "PrimusM"
    file = open_mind(tmp_path / "o.pth", made, network, architecture, trainer=name, **stated)
    content = torch.load(file, weights_only=True)
    weights = converted(network) if name.endswith(("S3D", "SparK")) else network.state_dict()
    kept = {f"{wrapped}{prefix}{k}": v for k, v in weights.items() if not k.startswith(dropped or "-")}
    if name.startswith("nnFoundation"):
        (stated_for,) = content["nnssl_adaptation_plan"]["pretrain_plan"]["configurations"].values()
        stated_for["spacing"] = None
    content["network_weights"] = {**kept, **{f"{wrapped}{k}": torch.randn(2, 3) for k in beside}}
    torch.save(content, file)
    transfer = carried(file, network, made)
    assert transfer.share("carried") == 1 and any(line.startswith("Encoder: 100.0%") for line in table(transfer))


def test_a_segmentation_of_others_is_one(tmp_path):
    """As TotalSegmentator's: a plain U-Net of stock plans, a trainer that is not installed, CT."""
    made = target("plain", channels=1, classes=25)
    made.plans["configurations"]["3d_fullres"].update(normalization_schemes=["CTNormalization"], spacing=[1.5, 1.5, 1.5])
    network = randomised(made.build())
    file = stock_checkpoint(tmp_path / "t.pth", made, network, trainer_name="nnUNetTrainer_4000epochs_NoMirroring")
    there = target("plain", classes=2)
    filled = there.build()
    transfer = match(read(file), filled, there.view)
    assert transfer.source.kind == "nnU-Net checkpoint" and transfer.decoder_reason == "it was trained to segment"
    assert {r.action for r in transfer.rows if r.role in ("encoder", "decoder")} == {"carried"}


# ---- two names, two tensors


def converted(network):
    """As SparK and S3D leave a network: the first name of every layer is another tensor than the second, which is executed."""
    weights = {}
    for key, value in network.state_dict().items():
        stale = re.search(r"\.(conv|norm)\.(weight|bias)$", key) is not None
        weights[key] = value.clone() + 1 if stale else value
    return weights


def test_what_a_converted_layer_executes_is_taken(tmp_path):
    made = target()
    network = randomised(made.build())
    transfer = carried(write(tmp_path / "s.pth", converted(network)), network, made)
    assert any("differ under their two names; taken is what the layer executes" in note for note in table(transfer))
    plain = carried(write(tmp_path / "p.pth", network.state_dict()), network, made)
    assert not any("two names" in note for note in plain.notes)


def test_what_is_executed_must_be_known(tmp_path):
    network = randomised(target().build())
    weights = {k: v.clone() for k, v in network.state_dict().items()}
    weights["decoder.encoder.stem.convs.0.all_modules.0.weight"] += 1
    with pytest.raises(ValueError, match=r"encoder\.stem\.convs\.0\.all_modules\.0\.weight and decoder\.encoder\.stem.* differ"):
        match(read(write(tmp_path / "s.pth", weights)), target().build(), target().view)


# ---- what becomes of the decoder


def test_a_layer_behind_blocks_that_are_dropped_starts_fresh(tmp_path):
    made = target("primus")
    network = randomised(made.build())
    file = open_mind(tmp_path / "m.pth", made, network, "PrimusM", trainer="BaseEvaMAETrainer")
    content = torch.load(file, weights_only=True)
    alone = carried(file, network, made)
    assert alone.decoder == "keep" and {r.action for r in alone.rows if r.role == "decoder"} == {"carried"}
    content["network_weights"]["decoder.blocks.0.attn.proj.weight"] = torch.randn(48, 48)
    torch.save(content, file)
    behind = carried(file, network, made)
    assert behind.decoder == "fresh" and "trained behind blocks of the file's decoder" in behind.decoder_reason


def test_nothing_is_kept_that_is_not_there_or_does_not_fit(tmp_path):
    made, wide = target(), target(features=(4, 6, 8), strides=((1, 1, 1), (2, 2, 2), (2, 2, 2)))
    network = randomised(made.build())
    encoder = {k: v for k, v in network.state_dict().items() if k.startswith("encoder.")}
    assert "Decoder: fresh; the file has none. Output" in "\n".join(
        table(carried(write(tmp_path / "e.pth", encoder), network, made))
    )
    other = {k: v[:1] if k.startswith(("decoder.stages", "decoder.transpconvs")) else v for k, v in network.state_dict().items()}
    said = "\n".join(table(carried(write(tmp_path / "o.pth", other), network, wide)))
    assert "Decoder: fresh; none of the file's fits. Output" in said


@pytest.mark.parametrize(
    ("names", "images"),
    [
        ({"1": "T1", "2": "tumour_mask"}, (True, False)),
        ({"7": "noNorm", "3": "CT", "5": "PET"}, (False, True, True)),
        ({"first": "T1", "second": "seg"}, (True, False)),
    ],
)
def test_channels_are_taken_in_their_order_whatever_their_keys(names, images):
    there = target(channels=len(names))
    there.dataset_json["channel_names"] = names
    assert there.images == images


def test_a_file_without_plans_was_not_trained_to_segment(tmp_path):
    network = target().build()
    source = read(write(tmp_path / "a.pth", network.state_dict(), trainer_name="BaseMAETrainer"))
    assert source.kind == "checkpoint without plans" and "segment" not in source.decoder[1]
    source = read(stock_checkpoint(tmp_path / "s.pth", target(), network))
    assert source.kind == "nnU-Net checkpoint" and source.decoder[1] == "it was trained to segment"


# ---- channels that are no images


def cascade(made):
    """``made`` as the second stage of a cascade."""
    made = copy.deepcopy(made)
    made.plans["configurations"]["3d_fullres"]["previous_stage"] = "3d_lowres"
    return made


@pytest.mark.parametrize("family", ["residual", "plain", "primus", "primus V3"])
@pytest.mark.parametrize("kind", ["cascade", "noNorm", "mask", "two images and a mask"])
def test_channels_that_are_no_images_start_at_zero(tmp_path, family, kind):
    """So the first features are those of the file, whatever these channels hold."""
    made, images = target(family), 1
    if kind == "cascade":
        there = cascade(target(family, classes=3))
    elif kind == "two images and a mask":
        there, images = target(family, channels=3), 2
        there.dataset_json["channel_names"] = {"0": "T1", "1": "tumour_mask", "2": "T2"}
    else:
        there = target(family, channels=2)
        there.dataset_json["channel_names"]["1"] = kind
        if kind == "noNorm":
            there.plans["configurations"]["3d_fullres"]["normalization_schemes"][1] = "NoNormalization"
    network = randomised(made.build())
    filled = there.build()
    source = read(stock_checkpoint(tmp_path / "a.pth", made, network))
    transfer = match(source, filled, there.view, images=there.images)
    fill(filled, transfer)
    assert sum(there.images) == images and any("no image" in r.how and "start at 0" in r.how for r in transfer.rows)
    x = torch.randn(1, 1, *made.view)
    seen = iter(range(images))
    channels = [x if image and next(seen) >= 0 else torch.rand_like(x).round() for image in there.images]
    many = torch.cat(channels, 1)
    if "primus" in family:
        found = [n.down_projection(y) for n, y in ((network, x), (filled, many))]
    else:
        found = [n.encoder(y)[0] for n, y in ((network, x), (filled, many))]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-4 if images > 1 else 1e-5)


def test_the_table_and_the_command_say_so(tmp_path, monkeypatch, capsys):
    there = cascade(target(classes=3, name="Dataset004_Other"))
    planned(tmp_path / "preprocessed", there, monkeypatch)
    pretraining(tmp_path / "c.pth", target())
    assert call("check", tmp_path / "c.pth", "-d", 4, "-c", "3d_fullres") == 0
    assert "1 -> 3 input channels (2 of them no images: start at 0)" in capsys.readouterr().out


# ---- targets of others


def test_plans_of_nnunets_master_are_named_with_what_takes_them(tmp_path, monkeypatch, capsys):
    there = target(name="Dataset004_Other")
    there.plans["pretrain_info"] = {"checkpoint_path": "/x.pth"}
    there.plans["configurations"]["3d_fullres"]["architecture"] = {"network_class_name": "PrimusM", "arch_kwargs": None}
    planned(tmp_path / "preprocessed", there, monkeypatch)
    pretraining(tmp_path / "c.pth", target())
    assert call("check", tmp_path / "c.pth", "-d", 4, "-c", "3d_fullres") == 2
    said = capsys.readouterr().err
    assert "nnUNetv2_train_pretrained" in said and "nnssl format" in said and said.count("\n") == 1
