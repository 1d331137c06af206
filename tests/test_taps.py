"""The centres law: a tap's cell is where its tap says."""

import pytest
import torch
from helpers.networks import unet
from torch import nn

from nnunetv2_cva.model.taps import Tap, image_vector, unet_taps

ISOTROPIC = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2))
ANISOTROPIC = ((1, 1, 1), (1, 2, 2), (2, 2, 2), (1, 2, 2))
THIN_KERNELS = ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3))


def averaging(network):
    """The same operations with every convolution an average and nothing else: positions add up exactly."""
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
            nn.init.zeros_(module.bias) if module.bias is not None else None
        for name, child in list(module.named_children()):
            if isinstance(child, (nn.InstanceNorm3d, nn.LeakyReLU)):
                setattr(module, name, nn.Identity())
    for module in network.modules():
        if isinstance(module, nn.Sequential):
            for i, child in enumerate(module):
                if isinstance(child, (nn.InstanceNorm3d, nn.LeakyReLU)):
                    module[i] = nn.Identity()
    return network


def centroid(encoder, level, size, lower, power):
    """Deviation of the gradient centroid of a middle cell from stride * (n + 0.5), per axis, in voxels."""
    views = torch.randn(1, 1, *size, requires_grad=True)
    level_map = encoder(views)[level]
    cell = [n // 2 - lower if n > 1 else 0 for n in level_map.shape[2:]]
    weights = torch.randn(level_map.shape[1]) if power == 2 else torch.ones(level_map.shape[1])
    (gradient,) = torch.autograd.grad((level_map[0, :, cell[0], cell[1], cell[2]] * weights).sum(), views)
    mass = gradient[0, 0].abs() ** power
    found = []
    for axis in range(3):
        along = mass.sum(tuple(a for a in range(3) if a != axis))
        found.append(float((along * (torch.arange(size[axis]) + 0.5)).sum() / mass.sum()))
    tap = unet_taps(encoder)[level]
    return [f - s * (n + 0.5) for f, s, n in zip(found, tap.stride, cell)]


@pytest.mark.parametrize("kind", ["plain", "residual"])
@pytest.mark.parametrize("strides, kernels", [(ISOTROPIC, None), (ANISOTROPIC, THIN_KERNELS)])
def test_cells_of_an_averaging_network_are_exactly_where_declared(kind, strides, kernels):
    encoder = averaging(unet(kind, strides=strides, kernels=kernels, features=2)).encoder
    size = (32, 80, 80) if strides is ANISOTROPIC else (80, 80, 80)
    for level, tap in enumerate(unet_taps(encoder)[:3]):
        assert centroid(encoder, level, size, 0, power=1) == pytest.approx(tap.offset, abs=2e-3), (level, tap)


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_cells_of_random_networks_are_where_declared_within_a_sixth_of_a_stride(kind):
    """Instance norm spreads a little gradient over the whole view, which pulls the centroid to the view's middle; the two middle
    cells are pulled in opposite directions and their mean is free of it."""
    size = (48, 56, 40)
    for level in (1, 2, 3):
        deviations = []
        for seed in range(3):
            encoder = unet(kind, strides=ISOTROPIC, seed=seed).encoder
            deviations += [centroid(encoder, level, size, lower, power=2) for lower in (0, 1)]
        tap = unet_taps(encoder)[level]
        found = torch.tensor(deviations).mean().item()
        assert abs(found - sum(tap.offset) / 3) < tap.stride[0] / 6, (level, found, tap)
        assert found < -0.1 * tap.stride[0], "offset 0 would be wrong"


def test_strides_and_channels_are_those_of_the_maps():
    for kind in ("plain", "residual"):
        encoder = unet(kind, strides=ANISOTROPIC, kernels=THIN_KERNELS).encoder
        maps = encoder(torch.zeros(1, 1, 16, 32, 48))
        for tap, level_map in zip(unet_taps(encoder), maps, strict=True):
            assert tap.channels == level_map.shape[1]
            assert tuple(n // s for n, s in zip((16, 32, 48), tap.stride)) == tuple(level_map.shape[2:])


def test_a_kernel_of_one_with_stride_two_lies_half_a_voxel_lower():
    encoder = unet("plain", strides=((1, 1, 1), (2, 2, 2)), kernels=((3, 3, 3), (1, 3, 3))).encoder
    assert unet_taps(encoder)[1] == Tap(12, (2, 2, 2), (-0.5, -0.5, -0.5))


def test_image_vector_is_the_mean_over_the_view():
    maps = [torch.randn(2, 3, 4, 5, 6), torch.randn(2, 7, 2, 2, 3)]
    expected = torch.stack([torch.cat([m[n].reshape(m.shape[1], -1).mean(1) for m in maps]) for n in range(2)])
    torch.testing.assert_close(image_vector(maps), expected)


def test_an_encoder_without_stages_is_refused():
    with pytest.raises(ValueError, match="Linear has no taps: expected an encoder with `stages`"):
        unet_taps(nn.Linear(2, 2))


def test_an_operation_whose_cells_cannot_be_located_is_refused():
    encoder = unet("plain").encoder
    encoder.stages[1] = nn.Upsample(scale_factor=2)
    with pytest.raises(ValueError, match="where the cells of a Upsample are"):
        unet_taps(encoder)
