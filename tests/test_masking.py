"""Masks: how many blocks are hidden, which, and what that means for voxels."""

import itertools
import math

import numpy as np
import pytest
import torch

from nnunetv2_cva.views.masking import draw_mask, expand_mask, hide

SIZES = [  # view, block, grid
    ((48, 32, 64), (16, 16, 16), (3, 2, 4)),
    ((40, 17, 63), (16, 16, 16), (3, 2, 4)),  # partial blocks at the far edge
    ((9, 40, 33), (16, 8, 16), (1, 5, 3)),  # thinner than a block along the first axis
    ((24, 16, 40), (8, 8, 8), (3, 2, 5)),
]


def generator(seed=0):
    return np.random.default_rng(seed)


def slow_expansion(mask, block, size):
    """Every voxel asks its block."""
    out = torch.zeros(len(mask), 1, *size, dtype=torch.bool)
    for n, i, j, k in itertools.product(range(len(mask)), *map(range, size)):
        out[n, 0, i, j, k] = mask[n, i // block[0], j // block[1], k // block[2]]
    return out


@pytest.mark.parametrize(("size", "block", "grid"), SIZES)
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.6, 0.75, 1.0])
def test_every_view_hides_exactly_the_rounded_share_of_its_blocks(size, block, grid, ratio):
    mask = draw_mask(5, size, block, ratio, generator())
    assert mask.shape == (5, *grid) and mask.dtype == torch.bool and mask.device.type == "cpu"
    assert mask.sum((1, 2, 3)).tolist() == [round(ratio * math.prod(grid))] * 5


def test_half_a_block_is_rounded_to_even():
    assert draw_mask(1, (4, 8, 12), (4, 4, 4), 0.75, generator()).sum() == 4  # of 6 blocks 4.5
    assert draw_mask(1, (4, 8, 4), (4, 4, 4), 0.75, generator()).sum() == 2  # of 2 blocks 1.5


def test_a_view_of_one_block_is_hidden_whole_or_not_at_all():
    assert draw_mask(3, (5, 7, 9), (16, 16, 16), 0.75, generator()).all()
    assert not draw_mask(3, (5, 7, 9), (16, 16, 16), 0.25, generator()).any()


def test_every_block_is_hidden_equally_often():
    n, ratio = 4000, 0.75
    mask = draw_mask(n, (40, 17, 63), (16, 16, 16), ratio, generator())
    assert (mask.double().mean(0) - ratio).abs().max() < 4.5 * math.sqrt(ratio * (1 - ratio) / n)


def test_every_pair_of_blocks_is_hidden_together_equally_often():
    n, blocks, hidden = 4000, 12, 6
    mask = draw_mask(n, (8, 6, 4), (4, 2, 2), hidden / blocks, generator()).view(n, blocks).double()
    together = (mask.T @ mask / n)[~torch.eye(blocks, dtype=torch.bool)]
    expected = hidden * (hidden - 1) / (blocks * (blocks - 1))
    assert (together - expected).abs().max() < 5 * math.sqrt(expected * (1 - expected) / n)


def test_every_view_has_a_mask_of_its_own():
    mask = draw_mask(8, (48, 32, 64), (16, 16, 16), 0.75, generator()).flatten(1)
    assert len({tuple(row) for row in mask.tolist()}) == 8


def test_same_seed_same_masks_other_seed_other_masks():
    draws = [draw_mask(4, (48, 32, 64), (16, 16, 16), 0.75, generator(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(("size", "block"), [((5, 8, 6), (2, 4, 3)), ((5, 7, 3), (2, 4, 8)), ((1, 6, 9), (4, 4, 4))])
def test_a_voxel_is_hidden_iff_its_block_is(size, block):
    mask = draw_mask(3, size, block, 0.6, generator())
    voxels = expand_mask(mask, block, size)
    assert voxels.shape == (3, 1, *size) and voxels.is_contiguous()
    assert torch.equal(voxels, slow_expansion(mask, block, size))


def test_hidden_voxels_are_zero_in_all_channels_and_the_others_untouched():
    views = torch.randn(3, 2, 5, 7, 9, generator=torch.Generator().manual_seed(0)) + 10
    before = views.clone()
    voxels = expand_mask(draw_mask(3, (5, 7, 9), (2, 4, 4), 0.5, generator()), (2, 4, 4), (5, 7, 9))
    seen = hide(views, voxels)
    assert torch.equal(seen, torch.where(voxels.expand_as(views), torch.zeros(()), before))
    assert torch.equal(views, before)  # it is the target of the reconstruction


@pytest.mark.parametrize("ratio", [-0.1, 1.5, float("nan")])
def test_a_ratio_outside_0_to_1_is_refused(ratio):
    with pytest.raises(ValueError, match=r"expected a ratio in \[0, 1\]"):
        draw_mask(1, (8, 6, 4), (2, 2, 2), ratio, generator())


def test_sizes_below_1_are_refused():
    with pytest.raises(ValueError, match="expected sizes of at least 1"):
        draw_mask(1, (8, 0, 4), (2, 2, 2), 0.5, generator())


def test_a_mask_for_another_grid_is_refused():
    with pytest.raises(ValueError, match=r"expected a mask \(n, 4, 3, 2\).* found \(1, 3, 4, 2\)"):
        expand_mask(torch.zeros(1, 3, 4, 2, dtype=torch.bool), (2, 2, 2), (8, 6, 4))
