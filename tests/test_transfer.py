"""Weights for any target: what is carried, adapted and fresh, and that nnU-Net's own loader takes the result."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.targets import STRIDES, TinyPrimus, randomised, stock_checkpoint, target
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from torch import nn
from torch.nn import functional as F

from nnunetv2_cva.transfer.adapt import ENOUGH, fill, match, stock_obstacle
from nnunetv2_cva.transfer.read import read
from nnunetv2_cva.transfer.resize import input_channels, resized, token_grid
from nnunetv2_cva.transfer.table import data_warnings, table
from nnunetv2_cva.transfer.weights import opened
from nnunetv2_cva.transfer.write import check_with_stock_loader, write, write_for_nnunet

FAMILIES = ("residual", "plain", "primus", "primus V3")
CHANGES = {
    "same plans": {},
    "other classes": {"classes": 5},
    "1 -> 4 channels": {"channels": 4},
    "other patch": {"view": (32, 16, 24)},
    "anisotropic": {
        "view": (8, 48, 32),
        "kernels": ((1, 3, 3), (3, 3, 3), (3, 3, 3)),
        "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    },
}


def features(network, x):
    """What fine-tuning builds on: all encoder stages of a U-Net, the tokens' embedding of a Primus."""
    with torch.no_grad():
        return network.encoder(x) if hasattr(network, "encoder") else [network.down_projection(x)]


def transferred(tmp_path, source, there, **options):
    """(source network, loaded target, transfer): written, and loaded by nnU-Net into a fresh target."""
    network = randomised(source.build())
    file = stock_checkpoint(tmp_path / "source.pth", source, network)
    filled = there.build()
    transfer = match(read(file), filled, there.view, **options)
    assert transfer.refusal() is None
    fill(filled, transfer)
    write_for_nnunet(tmp_path / "weights.pth", filled, transfer, there)
    loaded = randomised(there.build(), seed=2)
    load_pretrained_weights(loaded, str(tmp_path / "weights.pth"))
    return network.eval(), loaded.eval(), transfer


# ---- the matrix


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", FAMILIES)
def test_stock_nnunet_loads_what_was_made_for_the_target(tmp_path, family, change):
    source, there = target(family), target(family, **CHANGES[change])
    network, loaded, transfer = transferred(tmp_path, source, there)
    before, after = network.state_dict(), loaded.state_dict()
    carried = [k for r in transfer.rows if r.action == "carried" for k in r.keys]
    assert all(torch.equal(before[k], after[k]) for k in carried)
    assert transfer.share("carried", "adapted") == 1
    kinds = {"same plans": set(), "other classes": set(), "1 -> 4 channels": {"input channels"}}
    adapted = {r.how for r in transfer.rows if r.action == "adapted"}
    if change in kinds:
        assert all("input channels" in how for how in adapted) and bool(adapted) == bool(kinds[change])
    x = torch.randn(2, 1, *there.view)
    many = x.expand(-1, 4, -1, -1, -1) if change == "1 -> 4 channels" else x
    if change == "anisotropic" and "primus" not in family:
        check_anisotropic_convolutions(network, loaded, x)
        return
    for a, b in zip(features(network, x), features(loaded, many), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4 if change == "1 -> 4 channels" else 0)
    if "primus" in family and change in ("same plans", "other classes", "1 -> 4 channels"):
        tokens = features(network, x)[0].flatten(2).transpose(1, 2)
        torch.testing.assert_close(network.eva(tokens)[0], loaded.eva(tokens)[0])


def check_anisotropic_convolutions(network, loaded, x):
    """Where the input does not change along the first axis, away from its ends, the first convolution sees the same."""
    flat = x[:, :, :1].expand_as(x)
    a, b = ([m for m in n.encoder.modules() if isinstance(m, nn.Conv3d)][0] for n in (network, loaded))
    assert a.kernel_size == (3, 3, 3) and b.kernel_size == (1, 3, 3)
    torch.testing.assert_close(a(flat)[:, :, 1:-1], b(flat)[:, :, 1:-1], rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("trainer", ["nnUNet_Primus_S_Trainer", "nnUNet_PrimusV3S_Trainer"])
def test_the_matrix_with_nnunets_own_sizes(tmp_path, trainer, change):
    from nnunetv2.training.nnUNetTrainer.primus import primus_trainers

    options = {"trainer": getattr(primus_trainers, trainer)}
    source, there = target("primus", **options), target("primus", **CHANGES[change], **options)
    network, loaded, transfer = transferred(tmp_path, source, there)
    assert transfer.share("carried", "adapted") == 1
    before, after = network.state_dict(), loaded.state_dict()
    assert all(torch.equal(before[k], after[k]) for r in transfer.rows if r.action == "carried" for k in r.keys)


def test_growing_kernels_changes_no_feature(tmp_path):
    thin = ((1, 3, 3), (1, 3, 3), (3, 3, 3))
    network, loaded, transfer = transferred(tmp_path, target(kernels=thin), target())
    assert {r.how for r in transfer.rows if r.action == "adapted"} == {"kernel 1x3x3 -> 3x3x3"}
    x = torch.randn(1, 1, 16, 24, 32)
    for a, b in zip(features(network, x), features(loaded, x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-4)  # 3x as many products, most of them zeros


def test_aliases_in_the_file_share_storage_and_are_all_filled(tmp_path):
    network, _, _ = transferred(tmp_path, target(), target(channels=4))
    weights = torch.load(tmp_path / "weights.pth", weights_only=True)["network_weights"]
    names = [f"{a}encoder.stem.convs.0.{b}.weight" for a in ("", "decoder.") for b in ("conv", "all_modules.0")]
    assert len({weights[n].data_ptr() for n in names}) == 1
    torch.testing.assert_close(weights[names[0]], network.state_dict()[names[0]].repeat(1, 4, 1, 1, 1) / 4)


def test_a_stale_alias_is_found_when_reading(tmp_path):
    network = randomised(target().build())
    weights = {k: v.clone() for k, v in network.state_dict().items()}
    weights["decoder.encoder.stages.1.blocks.0.conv1.all_modules.0.weight"] += 1
    torch.save({"network_weights": weights}, tmp_path / "stale.pth")
    with pytest.raises(ValueError, match=r"two versions of one layer.*stages\.1.*must be the same tensor"):
        match(read(tmp_path / "stale.pth"), target().build(), target().view)


@pytest.mark.parametrize("name", ["encoder.stages.1.blocks.0.conv1.conv.weight", "decoder.encoder.stem.convs.0.conv.weight"])
def test_a_stale_alias_is_found_after_writing(tmp_path, name):
    network = randomised(target().build())
    weights = {k: v.clone() for k, v in network.state_dict().items()}
    torch.save({"network_weights": weights}, tmp_path / "good.pth")
    check_with_stock_loader(tmp_path / "good.pth", network, target())
    last = [k for k in weights if k.endswith(name.split("encoder.")[-1].replace(".conv.weight", ".all_modules.0.weight"))][-1]
    weights[last] += 1
    torch.save({"network_weights": weights}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="is not the same after nnU-Net has loaded"):
        check_with_stock_loader(tmp_path / "bad.pth", network, target())


# ---- other depth, width, strides, families


def test_other_depth_aligns_stages_at_the_image_and_decoders_at_full_resolution(tmp_path):
    deep = {"features": (4, 6, 8, 8), "strides": (*STRIDES, (1, 2, 2))}
    there = target(**deep)
    file = stock_checkpoint(tmp_path / "a.pth", target(), network := randomised(target().build()))
    filled = there.build()
    transfer = match(read(file), filled, there.view)
    assert {r.part for r in transfer.rows if r.action == "fresh"} == {"encoder stage 3", "decoder level 2", "output layer"}
    fill(filled, transfer)
    for a, b in zip(features(network, x := torch.randn(1, 1, *there.view)), features(filled, x)[:3], strict=True):
        assert torch.equal(a, b)
    mine, theirs = filled.decoder.transpconvs[1].weight, network.decoder.transpconvs[0].weight
    assert torch.equal(mine, theirs)
    assert "number of stages: 3 in the file, 4 in the target" in transfer.refusal()

    back = target()
    shallow = match(read(stock_checkpoint(tmp_path / "b.pth", there, filled)), back.build(), back.view)
    assert shallow.refusal() is None and shallow.unused[0][0] == "encoder stage 3"
    assert "no place for encoder stage 3" in "\n".join(table(shallow))


def test_more_blocks_in_a_stage_are_fresh(tmp_path):
    file = stock_checkpoint(tmp_path / "a.pth", target(), target().build())
    there = target(blocks=(1, 2, 3))
    transfer = match(read(file), there.build(), there.view)
    fresh = [k for r in transfer.rows if r.action == "fresh" and r.role == "encoder" for k in r.keys]
    assert fresh and all("stages.2.blocks.2." in k for k in fresh)
    assert "blocks of stage 2: 2 in the file, 3 in the target" in transfer.refusal()


def test_another_stride_is_named_as_the_cause(tmp_path):
    file = stock_checkpoint(tmp_path / "a.pth", target(), target().build())
    there = target(strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)))
    transfer = match(read(file), there.build(), there.view)
    assert "strides of stage 1: 2x2x2 in the file, 1x2x2 in the target" in "\n".join(table(transfer))
    same = match(read(file), target().build(), target().view)
    assert not any("Note" in line for line in table(same))
    (row,) = [r for r in transfer.rows if r.keys == ("decoder.transpconvs.1.weight",)]
    assert (row.action, row.how) == ("adapted", "kernel 2x2x2 -> 1x2x2")


def test_other_widths_are_refused_with_the_cause(tmp_path):
    file = stock_checkpoint(tmp_path / "a.pth", target(), target().build())
    there = target(features=(4, 12, 16))
    reason = match(read(file), there.build(), there.view).refusal()
    assert "fills only" in reason and "features of stage 1: 6 in the file, 12 in the target" in reason


def deep(version, **options):
    """A trainer whose Primus is so deep that the tokenizer hardly counts."""
    return type("Deep", (TinyPrimus,), {"version": version, "options": {"depth": 24, **options}})


def test_a_random_tokenizer_is_refused_however_small(tmp_path):
    source, there = target("primus", trainer=deep(1)), target("primus", trainer=deep(1, patch_embed_size=(8, 8, 16)))
    transfer = match(read(stock_checkpoint(tmp_path / "a.pth", source, source.build())), there.build(), there.view)
    assert transfer.share("carried", "adapted") >= ENOUGH
    assert "fills only 0% of its tokenizer (token size: 8x8x8 in the file, 8x8x16 in the target)" in transfer.refusal()


def test_hidden_features_of_a_tokenizer_are_no_input_channels(tmp_path):
    """Primus V2 into V3: only the first block reads the image, and the widths are named as the cause."""
    source, there = target("primus", trainer=deep(2)), target("primus V3", 4)
    transfer = match(read(stock_checkpoint(tmp_path / "a.pth", source, source.build())), there.build(), there.view)
    adapted = {r.keys[0]: r.how for r in transfer.rows if r.action == "adapted"}
    assert adapted and all(k.startswith("down_projection.stem.blocks.0.") for k in adapted)
    assert set(adapted.values()) == {"1 -> 4 input channels"}
    assert "widths of the tokenizer: 6 6 12 24 in the file, 6 8 12 16 in the target" in transfer.refusal()


@pytest.mark.parametrize("a, b", list(itertools.permutations(["residual", "plain", "primus"], 2)))
def test_another_family_is_an_error(tmp_path, a, b):
    file = stock_checkpoint(tmp_path / "a.pth", target(a), target(a).build())
    with pytest.raises(ValueError, match=r"holds a .*, the target is a .*: nothing of one fits into the other"):
        match(read(file), target(b).build(), target(b).view)


def test_zero_filled_is_an_error_even_when_partial_is_allowed(tmp_path):
    file = stock_checkpoint(tmp_path / "a.pth", target(), target().build())
    there = target(features=(5, 7, 9))
    network = there.build()
    with pytest.raises(ValueError, match="fills nothing of the target's encoder"):
        fill(network, match(read(file), network, there.view))


# ---- the decoder and the output layer


def test_the_decoder_is_kept_by_default_and_fresh_when_asked(tmp_path):
    file = stock_checkpoint(tmp_path / "a.pth", target(), network := randomised(target().build()))
    for chosen, kept in ((None, True), ("fresh", False)):
        filled = target().build()
        transfer = match(read(file), filled, target().view, decoder=chosen)
        fill(filled, transfer)
        assert torch.equal(filled.decoder.transpconvs[0].weight, network.decoder.transpconvs[0].weight) == kept
        assert torch.equal(filled.decoder.seg_layers[1].weight, target().build().decoder.seg_layers[1].weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_output_layer_is_always_the_targets_own(tmp_path, family):
    file = stock_checkpoint(tmp_path / "a.pth", target(family), randomised(target(family).build()))
    transfer = match(read(file), target(family).build(), target(family).view, decoder="keep")
    own = [k for r in transfer.rows if r.role == "output" for k in r.keys]
    last = "up_projection.decode.2." if "primus" in family else "decoder.seg_layers."
    assert own and all(k.startswith(last) for k in own)
    assert {r.action for r in transfer.rows if r.role == "output"} == {"fresh"}


# ---- rules


@pytest.mark.parametrize("before, after", [(1, 4), (2, 3), (3, 1), (4, 2), (2, 2)])
def test_equal_channels_keep_the_response(before, after):
    torch.manual_seed(0)
    weight, x = torch.randn(5, before, 3, 3, 3), torch.randn(2, 1, 6, 7, 8)
    wide = input_channels(weight, after)
    a = F.conv3d(x.expand(-1, before, -1, -1, -1), weight)
    torch.testing.assert_close(a, F.conv3d(x.expand(-1, after, -1, -1, -1), wide))
    if after % before == 0:
        torch.testing.assert_close(wide, weight.repeat(1, after // before, 1, 1, 1) * before / after)


@pytest.mark.parametrize("transposed", [False, True])
def test_shrinking_a_grown_kernel_gives_back_the_original(transposed):
    small = torch.randn(4, 5, 1, 2, 2) if transposed else torch.randn(4, 5, 1, 3, 3)
    size = (2, 2, 2) if transposed else (3, 3, 3)
    grown, how = resized(small, (4, 5, *size), transposed, False)
    back, _ = resized(grown, tuple(small.shape), transposed, False)
    torch.testing.assert_close(back, small)
    assert how.endswith("x".join(map(str, size)))


def test_upsampling_that_shrinks_is_the_mean_and_that_grows_is_repeated():
    x, weight = torch.randn(1, 4, 3, 5, 2), torch.randn(4, 6, 2, 2, 2)
    thin, _ = resized(weight, (4, 6, 1, 2, 2), True, False)
    full = F.conv_transpose3d(x, weight, stride=2)
    torch.testing.assert_close(F.conv_transpose3d(x, thin, stride=(1, 2, 2)), full.unflatten(2, (3, 2)).mean(3))
    again, _ = resized(thin, (4, 6, 2, 2, 2), True, False)
    wide = F.conv_transpose3d(x, again, stride=2)
    torch.testing.assert_close(wide, F.conv_transpose3d(x, thin, stride=(1, 2, 2)).repeat_interleave(2, dim=2))


@pytest.mark.parametrize(
    ("shape", "wanted", "reason"),
    [
        ((4, 1, 8, 8, 8), (4, 1, 4, 8, 8), "kernel 8x8x8 -> 4x8x8"),
        ((4, 1, 3, 3, 3), (4, 1, 3, 3), "3D in the file, 2D in the target"),
        ((4, 2, 3, 3, 3), (6, 2, 3, 3, 3), "shape 4x2x3x3x3 in the file, 6x2x3x3x3 in the target"),
        ((4,), (6,), "shape 4 in the file, 6 in the target"),
    ],
)
def test_what_no_rule_covers_says_why(shape, wanted, reason):
    assert resized(torch.randn(shape), wanted, False, True) == (None, reason)


def test_a_position_embedding_keeps_its_ramps():
    """Coordinates of the token centres, as channels, are those of the new grid; registers are not touched."""

    def ramp(grid):
        axes = [torch.linspace(0.5 / n, 1 - 0.5 / n, n) for n in grid]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)[None]

    grid, new = (4, 6, 8), (6, 3, 4)
    registers = torch.full((1, 2, 3), 7.0)
    found, how = token_grid(torch.cat([registers, ramp(grid)], 1), grid, new, (2, 2))
    assert how == "tokens 4x6x8 -> 6x3x4, trilinear" and torch.equal(found[:, :2], registers)
    inside = found[:, 2:].unflatten(1, new)[:, 1:-1, 1:-1, 1:-1]
    torch.testing.assert_close(inside, ramp(new).unflatten(1, new)[:, 1:-1, 1:-1, 1:-1])


def test_position_embedding_is_i_j_k_in_the_network(tmp_path):
    """A grid stretched along one axis only: what was constant along the others stays so."""
    source, there = target("primus"), target("primus", view=(32, 24, 32))
    network = randomised(source.build())
    grid = torch.zeros(2, 3, 4, 48)
    grid[1] = 1  # second half along the first axis
    network.eva.pos_embed.data = grid.flatten(0, 2)[None]
    file = stock_checkpoint(tmp_path / "a.pth", source, network)
    filled = there.build()
    fill(filled, match(read(file), filled, there.view))
    found = filled.eva.pos_embed.data.unflatten(1, (4, 3, 4))[0]
    torch.testing.assert_close(found[:, 0, 0, 0], torch.tensor([0, 0.25, 0.75, 1]))
    assert torch.equal(found, found[:, :1, :1].expand_as(found))


def test_an_unknown_grid_is_asked_for(tmp_path):
    network = randomised(target("primus").build())
    torch.save({"network_weights": network.state_dict()}, tmp_path / "bare.pth")
    there = target("primus", view=(32, 16, 24))  # also 24 tokens: the same count is taken for the same grid
    guessed = match(read(tmp_path / "bare.pth"), there.build(), there.view)
    assert guessed.share("carried") == 1
    said = "Note: the file does not say what grid its 24 tokens form: taken for the target's, 4x2x3."
    assert said in table(guessed)
    there = target("primus", view=(16, 16, 24))
    with pytest.raises(ValueError, match=r"does not say what patch size .* 24 tokens"):
        match(read(tmp_path / "bare.pth"), there.build(), there.view)
    given = match(read(tmp_path / "bare.pth"), there.build(), there.view, source_view=(16, 24, 32))
    assert "tokens 2x3x4 -> 2x2x3, trilinear" in {r.how for r in given.rows} and not given.notes
    with pytest.raises(ValueError, match="A patch size of 16x16x32 has 2x2x4 tokens, but .* holds 24"):
        match(read(tmp_path / "bare.pth"), there.build(), there.view, source_view=(16, 16, 32))


def test_an_exact_cube_needs_no_metadata(tmp_path):
    cube = target("primus", view=(16, 16, 16))
    torch.save({"network_weights": randomised(cube.build()).state_dict()}, tmp_path / "bare.pth")
    there = target("primus")
    transfer = match(read(tmp_path / "bare.pth"), there.build(), there.view)
    assert "tokens 2x2x2 -> 2x3x4, trilinear" in {r.how for r in transfer.rows}
    assert any("its 8 tokens form: taken for a cube, 2x2x2" in line for line in table(transfer))


# ---- reading


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_are_stripped(tmp_path, prefix):
    network = randomised(target().build())
    torch.save({"network_weights": {prefix + k: v for k, v in network.state_dict().items()}}, tmp_path / "a.pth")
    found = read(tmp_path / "a.pth")
    assert found.weights.keys() == network.state_dict().keys()
    assert stock_obstacle(found, network) == "the names in the file are not nnU-Net's"


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w}, lambda w: {"network_weights": w}])
def test_bare_state_dicts_are_read(tmp_path, wrap):
    network = randomised(target("plain").build())
    torch.save(wrap(dict(network.state_dict())), tmp_path / "a.pth")
    assert read(tmp_path / "a.pth").layout.family.name == "plain U-Net"


def test_nnunets_checkpoints_open_without_trust(tmp_path):
    file = stock_checkpoint(tmp_path / "a.pth", target(), target().build(), numbers=[np.int64(3), np.bool_(True), np.float16(1)])
    content = opened(file)
    assert content["_best_ema"] == 0.7 and content["logging"]["mean_fg_dice"][1] == np.float32(0.75)
    found = read(file)
    assert (found.kind, found.builder, found.view) == ("nnU-Net checkpoint", "nnUNetTrainer", (16, 24, 32))
    assert found.card["metrics"]["mean_fg_dice"] == 0.75 and found.layout.stages[1].stride == (2, 2, 2)


class Payload:
    opened = 0

    def __setstate__(self, state):
        Payload.opened += 1


def test_code_is_not_executed_unless_trusted(tmp_path):
    file = stock_checkpoint(tmp_path / "a.pth", target(), target().build(), extra=Payload())
    torch.save({**torch.load(file, weights_only=False), "extra": Payload()}, file)
    Payload.opened = 0
    with pytest.raises(ValueError, match=r"a\.pth holds .*Payload, which is code"):
        read(file)
    assert Payload.opened == 0
    read(file, trust=True)


def test_files_that_are_no_checkpoints(tmp_path):
    file = stock_checkpoint(tmp_path / "whole.pth", target(), target().build())
    whole = file.read_bytes()
    cases = {
        "truncated.pth": (whole[: len(whole) // 2], "cannot be read as a checkpoint"),
        "empty.pth": (b"", "cannot be read as a checkpoint|is not a checkpoint"),
        "text.pth": (b"hello, I am a text file\n", "is not a checkpoint"),
    }
    for name, (content, match_) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=match_):
            read(tmp_path / name)
    with pytest.raises(ValueError, match="does not exist"):
        read(tmp_path / "missing.pth")
    with pytest.raises(ValueError, match="is not a file"):
        read(tmp_path)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="expected a dictionary, found list"):
        read(tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "none.pth")
    with pytest.raises(ValueError, match="expected an entry 'network_weights', found epoch"):
        read(tmp_path / "none.pth")
    torch.save({"network_weights": nn.Linear(2, 3).state_dict()}, tmp_path / "linear.pth")
    with pytest.raises(ValueError, match="Unknown architecture.*found bias, weight"):
        read(tmp_path / "linear.pth")


def test_diverged_weights_are_refused(tmp_path):
    network = target().build()
    network.encoder.stem.convs[0].conv.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"encoder\.stem\.convs\.0\.conv\.bias holds NaN or Inf"):
        read(stock_checkpoint(tmp_path / "a.pth", target(), network))


def test_half_precision_files_are_read(tmp_path):
    network = randomised(target().build())
    torch.save({k: v.half() for k, v in network.state_dict().items()}, tmp_path / "half.pth")
    filled = target().build()
    fill(filled, match(read(tmp_path / "half.pth"), filled, target().view))
    bias = filled.encoder.stem.convs[0].conv.bias
    assert bias.dtype == torch.float32 and torch.equal(bias.data, network.encoder.stem.convs[0].conv.bias.data.half().float())


# ---- writing


def test_an_exported_file_says_where_it_comes_from_in_plain_types(tmp_path):
    source = target(spacing=(2.0, 1.0, 1.0))
    source.dataset_json.update(numTraining=12, licence="CC-BY-4.0", reference="A dataset, 2020")
    there = target(channels=4, name="Dataset004_Other")
    transferred(tmp_path, source, there)
    content = torch.load(tmp_path / "weights.pth", weights_only=True)
    card = content["pretraining"]
    assert card["plans"]["dataset_name"] == "Dataset100_Tiny" and card["configuration"] == "3d_fullres"
    assert card["spacing"] == [2.0, 1.0, 1.0] and card["view_size"] == [16, 24, 32]
    assert card["dataset"]["cases"] == 12 and card["dataset"]["channel_names"] == {"0": "MR0"}
    assert card["normalization_schemes"] == ["ZScoreNormalization"] and card["licence"] == "CC-BY-4.0"
    assert [c["type"] for c in card["citations"]] == ["Method", "Method", "Dataset"] and card["metrics"]["mean_fg_dice"] == 0.75
    assert content["init_args"]["plans"]["dataset_name"] == "Dataset004_Other"

    again = read(tmp_path / "weights.pth")
    assert again.kind == "exported weights" and again.card == card and again.layout.channels == 4


def test_nothing_is_written_when_the_check_fails(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"old")

    def check(file):
        assert file.is_file()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        write(tmp_path / "weights.pth", {"a": 1}, tmp_path / "source.pth", check)
    assert [p.name for p in tmp_path.iterdir()] == ["weights.pth"] and (tmp_path / "weights.pth").read_bytes() == b"old"


# ---- the table


def test_the_table_sums_up_by_part(tmp_path):
    there = target(channels=4, classes=3)
    file = stock_checkpoint(tmp_path / "a.pth", target(), target().build())
    text = table(match(read(file), there.build(), there.view))
    stem = next(line for line in text if line.startswith("stem"))
    assert "1 -> 4 input channels" in stem and "adapted" in text[0]
    stages = next(line for line in text if line.startswith("encoder stage 0-2"))
    assert "100%" in stages
    assert any(line.startswith("Encoder: 100.0% of") for line in text)
    assert any(line.startswith("Decoder: keep; it was trained to segment.") for line in text)
    assert max(map(len, text)) < 160


def test_every_cause_is_in_the_table_however_long(tmp_path):
    """Only why the decoder as a whole starts afresh is left out: it stands below."""
    transfer = match(read(stock_checkpoint(tmp_path / "a.pth", target(), target().build())), target().build(), target().view)
    cause = "shape 320x640x3x3x3 in the file, 512x512x3x3x3 in the target"
    rows = tuple(replace(r, action="fresh", how=cause) if r.role == "decoder" else r for r in transfer.rows)
    assert sum(cause in line for line in table(replace(transfer, rows=rows))) == 1
    fresh = table(replace(transfer, rows=rows, decoder="fresh", decoder_reason=cause))
    assert [line for line in fresh if cause in line] == [f"Decoder: fresh; {cause}. Output layer: always the target's own."]


def test_the_table_of_a_primus_joins_equal_blocks(tmp_path):
    there = target("primus", view=(32, 24, 32))
    file = stock_checkpoint(tmp_path / "a.pth", target("primus"), target("primus").build())
    text = table(match(read(file), there.build(), there.view))
    names = [line.split("  ")[0] for line in text[1:8]]
    assert names == ["tokenizer", "position embedding", "block 0-1", "last norm", "decoder", "output layer", "mask token"]


def test_differences_of_the_data_are_warned_about():
    there = target(channels=2, spacing=(2.0, 0.7, 0.7))
    card = {
        "spacing": [2.0, 0.704, 0.7],
        "normalization_schemes": ["CTNormalization", "ZScoreNormalization"],
        "dataset": {"channel_names": {"0": "mr0", "1": "Flair"}},
    }
    found = data_warnings(card, there.settings, there.dataset_json)
    assert len(found) == 2 and "normalisation of the pretraining [CTNorm" in found[0] and "[mr0, flair]" in found[1]
    assert len(data_warnings({}, there.settings, there.dataset_json)) == 3
