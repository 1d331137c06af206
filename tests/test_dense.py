"""Feature maps of whole images: where their cells are, to a tenth of a voxel, whatever the image's size."""

import itertools

import numpy as np
import pytest
import torch
from helpers.networks import primus, unet
from test_taps import averaging

from nnunetv2_cva.model.families import PRIMUS_V1
from nnunetv2_cva.model.primus import PrimusBackbone
from nnunetv2_cva.model.taps import Tap, unet_taps
from nnunetv2_cva.seeing.dense import DenseMap, check_taps, dense_maps, on_grid, place_windows, window_vectors

VIEW = (32, 64, 48)
TAPS = (Tap(3, (1, 1, 1), (0.0, 0.0, 0.0)), Tap(3, (2, 4, 2), (-0.25, -0.75, 0.5)), Tap(3, (16, 16, 8), (-3.75, -8.0, 2.0)))
SIZES = {"larger": (50, 101, 64), "smaller": (20, 33, 17), "as the view": VIEW, "not divisible": (33, 65, 47)}


def ramp(size):
    """(3, I, J, K): the coordinates of every voxel's centre."""
    return torch.stack(torch.meshgrid(*[torch.arange(n) + 0.5 for n in size], indexing="ij"))


def ideal(views):
    """A network that knows at every declared cell centre where in the image it is: interpolated from the voxels of the view."""
    maps = []
    for tap in TAPS:
        out = views[0]
        for axis, (n, s, o) in enumerate(zip(views.shape[2:], tap.stride, tap.offset), 1):
            at = torch.arange(n // s) * s + 0.5 * s + o - 0.5  # in voxel indices
            low = at.floor().clamp(0, n - 2).long()
            shape = [-1 if a == axis else 1 for a in range(4)]
            part = (at - low).reshape(shape)
            out = out.index_select(axis, low) * (1 - part) + out.index_select(axis, low + 1) * part
        maps.append(out[None])
    return maps


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_cells_of_a_whole_image_are_where_its_map_says(size):
    """Cells whose neighbourhood in the image is whole; nearer to the padding the ramp is not one."""
    for tap, found in zip(TAPS, dense_maps(ramp(size), ideal, TAPS, VIEW), strict=True):
        assert found.size == size and found.stride == tap.stride
        for axis in range(3):
            cells = found.values.shape[axis + 1]
            centres = found.stride[axis] * (torch.arange(cells) + 0.5) + found.offset[axis]
            whole = (centres >= 0.5) & (centres <= size[axis] - 0.5)
            shape = [-1 if a == axis else 1 for a in range(3)]
            others = [0, 1, 2]
            others.remove(axis)
            error = (found.values[axis] - centres.reshape(shape)).abs()
            for other in others:  # away from the padding along the other axes, too
                inside = [n for n in range(found.values.shape[other + 1]) if _inside(found, other, n, size)]
                error = error.index_select(other, torch.tensor(inside))
            assert whole.any() or cells == 1
            assert error.index_select(axis, whole.nonzero().flatten()).max() < 0.01 if whole.any() else True


def _inside(found, axis, n, size):
    centre = found.stride[axis] * (n + 0.5) + found.offset[axis]
    return 0.5 <= centre <= size[axis] - 0.5


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_a_map_of_nnunets_network_registers_with_its_image_to_a_tenth_of_a_voxel(kind):
    """A network of averages sees, along a ramp, the coordinate of the cell; beyond a window it
    continues what is at the window's edge, so that only what is declared and what is blended is tested."""
    encoder = averaging(unet(kind, strides=((1, 1, 1), (2, 2, 2), (2, 2, 2)), features=1)).encoder
    for module in encoder.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.padding_mode = "replicate"
    size, view, taps = (64, 52, 60), (40, 40, 40), unet_taps(encoder)
    middle = tuple(slice(n // 2 - 4, n // 2 + 4) for n in size)
    gains = [m.values.mean() for m in dense_maps(torch.ones(1, *view), encoder, taps, view)]  # residual blocks add two paths
    for axis in range(3):
        along = ramp(size)[axis : axis + 1]
        for m, gain in zip(dense_maps(along, encoder, taps, view, 0.5), gains):
            upsampled = on_grid([m], size, exactly=True)[0] / gain
            assert (upsampled[middle] - along[0][middle]).abs().max() < 0.1, (axis, m.stride)


@pytest.mark.parametrize("size", [(48, 64, 40), (24, 32, 16), (46, 61, 43)], ids=["larger", "smaller", "not divisible"])
def test_a_map_of_a_primus_registers_with_its_image_to_a_tenth_of_a_voxel(size):
    """Its tokenizer averages, its transformer lets tokens pass: every token is the coordinate of its middle. Outside the image
    are zeros: where an image of ones is less than one, some are in the token, and the ramp says nothing."""
    network, view = primus(size=(32, 48, 16)).eval(), (32, 48, 16)
    convolution = network.down_projection.proj
    torch.nn.init.constant_(convolution.weight, 1 / convolution.weight[0].numel())
    torch.nn.init.zeros_(convolution.bias)
    torch.nn.init.zeros_(network.eva.pos_embed)
    network.eva.blocks, network.eva.norm = torch.nn.ModuleList(), torch.nn.Identity()
    modules, taps = PRIMUS_V1.modules(network), PrimusBackbone.taps_of(network)

    def upsampled(image):
        (found,) = dense_maps(image, lambda v: PrimusBackbone.encode(modules, v)[0], taps, view)
        assert found.stride == (8, 8, 8)
        return on_grid([found], size, exactly=True)[0]

    whole = upsampled(torch.ones(1, *size)) > 0.9999
    for axis, along in enumerate(ramp(size)):
        among = whole & (along > 4) & (along < size[axis] - 4)  # beyond the outermost tokens nothing is interpolated
        assert among.any(dim=tuple(a for a in range(3) if a != axis)).sum() >= 6, axis
        assert (upsampled(along[None]) - along)[among].abs().max() < 0.1, axis


def test_one_window_is_the_networks_own_map():
    encoder = unet("residual").encoder.eval()
    image = torch.randn(1, 16, 32, 24)
    taps = unet_taps(encoder)
    with torch.no_grad():
        expected = encoder(image[None])
    for found, wanted, tap in zip(dense_maps(image, encoder, taps, (16, 32, 24)), expected, taps, strict=True):
        torch.testing.assert_close(found.values, wanted[0])
        assert (found.stride, found.offset) == (tap.stride, tap.offset)


def test_windows_cover_every_voxel_and_begin_at_multiples_of_the_step():
    for size, view, step, overlap in itertools.product(
        [(50, 33, 17), (16, 64, 48), (100, 9, 49)], [(16, 32, 48)], [(4, 8, 16), (16, 16, 16)], [0, 0.25, 0.5, 0.9]
    ):
        w = place_windows(size, view, step, overlap)
        seen = np.zeros([b + n + a for b, n, a in zip(w.before, size, w.after)], int)
        for start in w.starts:
            assert all(s % t == 0 for s, t in zip(start, step))
            seen[tuple(slice(s, s + v) for s, v in zip(start, view))] += 1
            assert all(s + v <= n for s, v, n in zip(start, view, seen.shape))
        assert seen.min() >= 1
        assert all(abs(b - a) <= 1 for b, a in zip(w.before, w.after))


def test_neighbouring_windows_overlap_at_least_as_asked():
    starts = sorted({s[0] for s in place_windows((200, 8, 8), (32, 8, 8), (8, 8, 8), 0.5).starts})
    assert max(b - a for a, b in itertools.pairwise(starts)) <= 16
    assert len(place_windows((200, 8, 8), (32, 8, 8), (8, 8, 8), 0.0).starts) == 7


def test_a_grid_averages_what_lies_in_its_cells():
    values = torch.arange(4 * 6 * 8, dtype=torch.float32).reshape(1, 4, 6, 8)
    found = on_grid([DenseMap(values, (1, 1, 1), (0.0, 0.0, 0.0), (4, 6, 8))], (2, 3, 4))
    expected = values.reshape(1, 2, 2, 3, 2, 4, 2).mean(dim=(2, 4, 6))
    torch.testing.assert_close(found, expected)


def test_window_vectors_are_means_over_windows():
    encoder = unet("plain").encoder.eval()
    image, taps = torch.randn(1, 24, 16, 18), unet_taps(encoder)
    starts, vectors = window_vectors(image, encoder, taps, (16, 16, 16), wanted=[-1])
    assert starts.tolist() == [[0, 0, -1], [0, 0, 3], [8, 0, -1], [8, 0, 3]]
    with torch.no_grad():
        expected = encoder(torch.nn.functional.pad(image[:, 8:], (1, 0))[..., :16][None])[-1].mean(dim=(0, 2, 3, 4))
    torch.testing.assert_close(vectors[2], expected)


def test_what_cannot_be():
    with pytest.raises(ValueError, match=r"Taps: expected numbers from 0 to 2 .* found \[3\]"):
        check_taps([3], TAPS)
    with pytest.raises(ValueError, match="overlap: expected 0 to less than 1, found 1"):
        place_windows((8, 8, 8), (8, 8, 8), (8, 8, 8), 1)
    with pytest.raises(ValueError, match="Windows of 8x8x9 are no multiples of the network's strides 4x4x4"):
        place_windows((8, 8, 8), (8, 8, 9), (4, 4, 4))
