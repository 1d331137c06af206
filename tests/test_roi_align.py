"""RoIAlign against loops, against torchvision, and the ramp law: bins lie where the roi says."""

import itertools
import math

import pytest
import torch
from torchvision.ops import roi_align

from nnunetv2_cva.model.roi_align import interpolation_matrices, roi_align_3d

ROIS = torch.tensor(
    [
        [[0.10, 0.25, 0.00], [0.80, 0.95, 0.55]],
        [[0.90, 0.30, 1.00], [0.35, 0.70, 0.45]],  # mirrored along the first and last axis
        [[0.00, 1.00, 0.20], [1.00, 0.00, 0.40]],  # reaching both ends of the view, mirrored along the second axis
    ]
)


def slow_roi_align(features, rois, bins, view_size, stride, offset, samples):
    """Every sample of every bin on its own."""

    def neighbours(axis, position):
        """Cells and weights for the linear function through the two cells next to a position in voxels."""
        cells = features.shape[2 + axis]
        if cells == 1:
            return [(0, 1.0)]
        centres = [stride[axis] * (n + 0.5) + offset[axis] for n in range(cells)]
        left = max([n for n in range(cells - 1) if centres[n] <= position], default=0)
        t = (position - centres[left]) / (centres[left + 1] - centres[left])
        return [(left, 1 - t), (left + 1, t)]

    out = torch.zeros(*features.shape[:2], *bins, dtype=torch.float64)
    for view, (begin, end) in enumerate(rois.tolist()):
        for r in itertools.product(*map(range, bins)):
            for s in itertools.product(*map(range, samples)):
                at = [(r[a] + (s[a] + 0.5) / samples[a]) / bins[a] for a in range(3)]
                at = [(begin[a] + (end[a] - begin[a]) * at[a]) * view_size[a] for a in range(3)]
                for corner in itertools.product(*[neighbours(a, at[a]) for a in range(3)]):
                    (i, wi), (j, wj), (k, wk) = corner
                    out[view, :, r[0], r[1], r[2]] += wi * wj * wk * features[view, :, i, j, k] / math.prod(samples)
    return out


@pytest.mark.parametrize(
    ("cells", "view_size", "stride", "offset", "bins", "given", "samples"),
    [
        ((5, 4, 7), (10, 16, 7), (2, 4, 1), (-0.5, -1.5, 0.0), (2, 3, 2), None, (3, 2, 4)),
        ((2, 6, 1), (32, 12, 8), (16, 2, 8), (-4.0, 0.25, 1.0), (3, 2, 2), None, (2, 3, 2)),
        ((3, 5, 4), (9, 5, 8), (3, 1, 2), (0.0, 0.0, -0.5), (1, 2, 3), 1, (1, 1, 1)),
    ],
)
def test_equals_slow_loops(cells, view_size, stride, offset, bins, given, samples):
    features = torch.randn(3, 2, *cells, dtype=torch.float64)
    found = roi_align_3d(features, ROIS, bins, view_size=view_size, stride=stride, offset=offset, samples=given)
    expected = slow_roi_align(features, ROIS, bins, view_size, stride, offset, samples)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    place = {"view_size": view_size, "stride": stride, "offset": offset}
    single = roi_align_3d(features.float(), ROIS, bins, **place, samples=given)
    assert single.dtype == torch.float32 and single.shape == (3, 2, *bins)
    torch.testing.assert_close(single, expected.float(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("extra", [0, 1, 2])
@pytest.mark.parametrize("thickness", [1, 6])
def test_equals_torchvision_on_slices(samples, extra, thickness):
    """Away from the edge, where torchvision clamps. Along the third axis the map is constant or a ramp."""
    cells, bins, strides = (11, 9), (3, 4), (4, 2)
    flat = torch.randn(2, 3, *cells)
    rois = torch.tensor([[[0.15, 0.2], [0.8, 0.7]], [[0.3, 0.1], [0.6, 0.85]]])
    scale = torch.tensor(cells)
    boxes = [torch.cat((r[0] * scale, r[1] * scale))[None, [1, 0, 3, 2]] for r in rois]  # torchvision: x before y
    expected = roi_align(flat, boxes, bins, spatial_scale=1.0, sampling_ratio=samples, aligned=True)

    along = torch.arange(thickness) + 1.0
    shape = [1, 1, 1, 1, 1]
    shape[2 + extra] = thickness
    features = flat.unsqueeze(2 + extra) * along.reshape(shape)

    def insert(values, value):
        return (*values[:extra], value, *values[extra:])

    third = torch.tensor([0.2, 0.7]).expand(2, 2)
    rois = torch.cat((rois[..., :extra], third[..., None], rois[..., extra:]), dim=-1)
    found = roi_align_3d(
        features,
        rois,
        insert(bins, 1),
        view_size=insert((44, 18), thickness),
        stride=insert(strides, 1),
        offset=(0.0, 0.0, 0.0),
        samples=samples,
    )
    factor = 1.0 if thickness == 1 else 0.45 * thickness + 0.5
    torch.testing.assert_close(found.squeeze(2 + extra), expected * factor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [(1, 2, 4), (8, 4, 16), (16, 32, 1), (32, 8, 2)])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("samples", [None, 1])
def test_ramp_law(stride, shifted, samples):
    """A map of its cells' coordinates gives those of the bins' centres, up to and beyond the last cell centre."""
    view_size, bins = (64, 128, 96), (5, 7, 3)
    offset = tuple(-0.55 * (s - 1) if shifted else 0.0 for s in stride)
    ramps = [s * (torch.arange(size // s) + 0.5) + o for size, s, o in zip(view_size, stride, offset, strict=True)]
    features = torch.stack(torch.meshgrid(*ramps, indexing="ij")).expand(3, -1, -1, -1, -1)
    found = roi_align_3d(features, ROIS, bins, view_size=view_size, stride=stride, offset=offset, samples=samples)
    for axis in range(3):
        middles = (torch.arange(bins[axis], dtype=torch.float64) + 0.5) / bins[axis]
        begin, end = ROIS[:, 0, axis, None].double(), ROIS[:, 1, axis, None].double()
        expected = (begin + (end - begin) * middles) * view_size[axis]
        expected = expected.reshape(3, *[-1 if a == axis else 1 for a in range(3)]).expand(3, *bins)
        assert (found[:, axis] - expected).abs().max() < 1e-4


def test_one_cell_is_constant():
    features = torch.randn(3, 2, 1, 1, 1)
    found = roi_align_3d(features, ROIS, (2, 1, 3), view_size=(32, 16, 8), stride=(32, 16, 8), offset=(-9.0, 0.0, 3.0))
    torch.testing.assert_close(found, features.expand(3, 2, 2, 1, 3))


def test_mirroring_a_roi_reverses_its_bins():
    features = torch.randn(3, 2, 6, 5, 8)
    place = {"view_size": (12, 5, 32), "stride": (2, 1, 4), "offset": (-0.5, 0.0, -1.5)}
    found = roi_align_3d(features, ROIS, (4, 3, 2), **place)
    reversed_ = roi_align_3d(features, ROIS.flip(1), (4, 3, 2), **place)
    torch.testing.assert_close(found.flip(2, 3, 4), reversed_, rtol=1e-4, atol=1e-5)


def test_gradient():
    features = torch.randn(3, 2, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    place = {"view_size": (6, 4, 8), "stride": (2, 1, 4), "offset": (-0.5, 0.0, 1.0)}
    assert torch.autograd.gradcheck(lambda x: roi_align_3d(x, ROIS, (2, 1, 3), **place), features)


def test_gradient_has_the_maps_type_and_memory_order():
    features = torch.randn(3, 4, 3, 4, 6, dtype=torch.bfloat16, requires_grad=True)
    place = {"view_size": (6, 4, 6), "stride": (2, 1, 1), "offset": (0.0, 0.0, 0.0)}
    roi_align_3d(features, ROIS, (2, 1, 3), **place).sum().backward()
    assert features.grad.dtype == torch.bfloat16 and features.grad.is_contiguous()
    # Every bin is a mean: a channel gets 1 from each of the 6.
    torch.testing.assert_close(features.grad.float().sum((2, 3, 4)), torch.full((3, 4), 6.0), rtol=1e-2, atol=0)


@pytest.mark.parametrize(("low", "tolerance"), [(torch.bfloat16, 5e-4), (torch.float16, 1e-4)])
@pytest.mark.parametrize("stride", [1, 4, 16])
def test_low_precision_weights_do_not_move_bins(low, tolerance, stride):
    """Maps that are 1 in one cell show the weights as they are used: what they add up to, and around which voxel."""
    cells = 160 // stride
    rois = torch.zeros(3, 2, 3)
    rois[:, 1] = 1.0
    rois[:, :, 2] = ROIS[:, :, 0]
    place = {"view_size": (1, 1, 160), "stride": (1, 1, stride), "offset": (0.0, 0.0, 0.5 - stride / 2)}
    one_hot = torch.eye(cells).reshape(1, cells, 1, 1, cells).expand(3, -1, -1, -1, -1)
    used = roi_align_3d(one_hot.to(low), rois, (1, 1, 7), **place)[:, :, 0, 0].double()
    assert (used.sum(1) - 1).abs().max() < tolerance / 10
    centres = stride * (torch.arange(cells, dtype=torch.float64) + 0.5) + 0.5 - stride / 2 - 80
    begin, end = rois[:, 0, 2, None].double(), rois[:, 1, 2, None].double()
    expected = (begin + (end - begin) * (torch.arange(7) + 0.5) / 7) * 160 - 80
    assert (torch.einsum("ncr,c->nr", used, centres) - expected).abs().max() < 2 * tolerance


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_low_precision_maps_keep_their_precision(low):
    features = torch.randn(3, 4, 12, 10, 20).to(low)
    place = {"view_size": (12, 10, 20), "stride": (1, 1, 1), "offset": (0.0, 0.0, 0.0)}
    found = roi_align_3d(features, ROIS, (2, 3, 4), **place)
    expected = roi_align_3d(features.float(), ROIS, (2, 3, 4), **place)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < torch.finfo(low).eps * expected.abs().max()


def test_autocast_changes_nothing():
    features = torch.randn(3, 2, 6, 5, 8)
    place = {"view_size": (12, 5, 32), "stride": (2, 1, 4), "offset": (-0.5, 0.0, -1.5)}
    expected = roi_align_3d(features, ROIS, (4, 3, 2), **place)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = roi_align_3d(features, ROIS, (4, 3, 2), **place)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_traces_without_a_break():
    features = torch.randn(3, 2, 6, 5, 8)
    place = {"view_size": (12, 5, 32), "stride": (2, 1, 4), "offset": (-0.5, 0.0, -1.5)}
    traced = torch.compile(roi_align_3d, backend="eager", fullgraph=True)
    expected = roi_align_3d(features, ROIS, (4, 3, 2), **place)
    torch.testing.assert_close(traced(features, ROIS, (4, 3, 2), **place), expected)


def test_rows_of_matrices_sum_to_one_and_extrapolate():
    ends = torch.tensor([[0.0, 1.0], [0.9, 0.1]], dtype=torch.float64)
    weights = interpolation_matrices(ends, 7, 5, view_size=160, stride=32, offset=-12.0)
    assert weights.shape == (2, 7, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 7, dtype=torch.float64))
    assert (weights[0, -1] < 0).any()  # the last bin lies beyond the last centre, 132
    by_hand = interpolation_matrices(ends[:1], 1, 2, view_size=8, stride=4, offset=0.0, samples=1)
    assert by_hand.tolist() == [[[0.5, 0.5]]]


def test_refuses_what_does_not_fit():
    features, place = torch.zeros(3, 2, 4, 5, 6), {"stride": (1, 1, 1), "offset": (0.0, 0.0, 0.0)}
    with pytest.raises(ValueError, match=r"rois \(N, 2, 3\) of the same N, found .* and \(2, 2, 3\)"):
        roi_align_3d(features, ROIS[:2], (2, 2, 2), view_size=(4, 5, 6), **place)
    with pytest.raises(ValueError, match=r"expected features \(N, C, I, J, K\)"):
        roi_align_3d(features[0], ROIS, (2, 2, 2), view_size=(4, 5, 6), **place)
    with pytest.raises(ValueError, match=r"at least 1, found bins \(2, 0, 2\)"):
        roi_align_3d(features, ROIS, (2, 0, 2), view_size=(4, 5, 6), **place)
    with pytest.raises(ValueError, match="samples 0"):
        roi_align_3d(features, ROIS, (2, 2, 2), view_size=(4, 5, 6), samples=0, **place)
