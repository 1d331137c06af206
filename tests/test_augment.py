"""Intensities: every transform against batchgeneratorsv2's with the same parameters, and how parameters are drawn."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from helpers.reads import Reads
from scipy.ndimage import correlate1d

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.views import augment as module
from nnunetv2_cva.views.augment import Parameters, apply, augment, draw

SIZE = (11, 16, 21)
LARGER = (24, 52, 37)  # different zooms give different grids
TRANSFORMS = [field.name for field in fields(Parameters) if field.name != "cases"]
OFF = CVAConfig(**{f"{name}_p": 0.0 for name in TRANSFORMS})
ALL = CVAConfig(**{f"{name}_p": 1.0 for name in TRANSFORMS})


def batch(views=4, channels=2, size=SIZE, seed=0):
    """Smooth and rough at once, another mean and deviation in every channel."""
    noise = torch.randn(views, channels, *size, generator=torch.Generator().manual_seed(seed))
    ramp = torch.linspace(-2, 2, size[-1])
    return noise * torch.linspace(0.5, 2, channels)[:, None, None, None] + ramp + 0.3


def generators(seed=0):
    return np.random.default_rng(seed), torch.Generator().manual_seed(seed)


class Reference:
    """batchgeneratorsv2's transforms with nnU-Net's arguments, on one view (C, I, J, K) with given parameters."""

    def noise(self, view, sigma, device_generator):
        """``_apply_to_image`` takes torch's global generator: set it to the state of ours."""
        every = torch.arange(len(view))
        parameters = {"apply_idx": every, "num_apply": len(view), "sigmas": float(sigma)}
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(device_generator.get_state())
            found = GaussianNoiseTransform((0, 0.1), 1, True)._apply_to_image(view.clone(), **parameters)
            device_generator.set_state(torch.get_rng_state())
        return found

    def blur(self, view, sigma):
        chosen = (sigma > 0).all(1)
        parameters = {"apply_to_channel": torch.from_numpy(chosen), "sigmas": sigma[chosen].tolist()}
        return GaussianBlurTransform((0.5, 1), False, False, 0.5)._apply_to_image(view.clone(), **parameters)

    def brightness(self, view, factor):
        parameters = {"apply_to_channel": torch.arange(len(view)), "multipliers": torch.tensor(factor).float()}
        return MultiplicativeBrightnessTransform((1, 1), False, 1)._apply_to_image(view.clone(), **parameters)

    def contrast(self, view, factor):
        parameters = {"apply_to_channel": torch.arange(len(view)), "multipliers": torch.tensor(factor).float()}
        return ContrastTransform((1, 1), True, False, 1)._apply_to_image(view.clone(), **parameters)

    def low_resolution(self, view, zoom):
        scales = torch.full((len(view), 3), float(zoom))
        transform = SimulateLowResolutionTransform((0.5, 1), True, True, None)
        return transform._apply_to_image(view.clone(), apply_to_channel=torch.arange(len(view)), scales=scales)

    def gamma(self, view, exponent, inverted=False):
        every = torch.ones(len(view), dtype=torch.bool)
        parameters = {"retain_stats": every, "invert_image": every & inverted, "gamma": torch.tensor(exponent).float()}
        transform = GammaTransform((1, 1), float(inverted), False, 1, 1)
        return transform._apply_to_image(view.clone(), apply_to_channel=torch.arange(len(view)), **parameters)

    def inverted_gamma(self, view, exponent):
        return self.gamma(view, exponent, inverted=True)

    def __call__(self, views, parameters, device_generator, order):
        """A batch, view by view, the transforms in this order."""
        views = views.clone()
        for name in order:
            choice = getattr(parameters, name)
            for row, value in zip(choice.rows, choice.values, strict=True):
                group = [row] if name != "low_resolution" else range(row, len(views), parameters.cases)
                extra = [device_generator] if name == "noise" else []
                for view in group:
                    views[view] = getattr(self, name)(views[view], value, *extra)
        return views


NNUNET_ORDER = ["noise", "blur", "brightness", "contrast", "low_resolution", "inverted_gamma", "gamma"]


# Each transform


@pytest.mark.parametrize("name", NNUNET_ORDER)
@pytest.mark.parametrize("channels", [1, 3])
def test_transform_is_that_of_batchgeneratorsv2(name, channels):
    views = batch(channels=channels)
    parameters = draw(4, 2, channels, replace(OFF, **{f"{name}_p": 1.0}), generators()[0])
    found = apply(views.clone(), parameters, generators()[1])
    expected = Reference()(views, parameters, generators()[1], [name])
    assert (found - views).abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.05, 0.3, 0.5, 0.5833, 0.5834, 0.7, 0.9166, 0.9167, 1.0, 1.4, 2.0])
def test_blur_has_the_kernel_of_batchgeneratorsv2_for_every_sigma(sigma):
    view = batch(1)[0]
    sigmas = np.array([[sigma, 0.8 * sigma, 1.2 * sigma], [1.1 * sigma, sigma, 0.9 * sigma]])
    found = view.clone()
    module.blur(found, sigmas)
    torch.testing.assert_close(found, Reference().blur(view, sigmas), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 9])
def test_blur_of_a_thin_axis_goes_on_mirroring(length):
    """scipy's "mirror" is torch's "reflect", for any length."""
    signal = np.random.default_rng(0).normal(size=length)
    kernel = np.exp(-0.5 * (np.arange(-3, 4) / 1.0) ** 2)
    expected = correlate1d(signal, kernel / kernel.sum(), mode="mirror")
    np.testing.assert_allclose(module.blur_matrix(length, 1.0) @ signal, expected, atol=1e-12)


def test_blur_leaves_the_channels_that_are_not_chosen_as_they_are():
    view = batch(1, channels=3)[0]
    found = view.clone()
    module.blur(found, np.array([[0, 0, 0], [0.6, 0.7, 0.9], [0, 0, 0]]))
    assert torch.equal(found[[0, 2]], view[[0, 2]]) and not torch.equal(found[1], view[1])


@pytest.mark.parametrize("transform", [module.change_gamma, module.change_inverted_gamma])
def test_gamma_keeps_mean_and_deviation_of_every_channel(transform):
    view = batch(1, channels=3)[0]
    found = view.clone()
    transform(found, torch.tensor([0.7, 1.1, 1.5]))
    torch.testing.assert_close(found.mean((1, 2, 3)), view.mean((1, 2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.std((1, 2, 3)), view.std((1, 2, 3)), rtol=1e-5, atol=1e-5)


def test_inverted_gamma_is_gamma_of_the_negative_image():
    view, exponent = batch(1)[0], torch.tensor([0.7, 1.4])
    inverted, negative = view.clone(), -view
    module.change_inverted_gamma(inverted, exponent)
    module.change_gamma(negative, exponent)
    torch.testing.assert_close(inverted, -negative, rtol=1e-5, atol=1e-5)


def test_contrast_stays_in_the_range_of_the_channel():
    view = batch(1)[0]
    found = view.clone()
    module.scale_contrast(found, torch.tensor([1.25, 1.25]))
    low, high = view.amin((1, 2, 3), keepdim=True), view.amax((1, 2, 3), keepdim=True)
    assert torch.equal(found.clamp(low, high), found)


def test_statistics_of_large_views_are_as_exact_as_of_small_ones():
    """float32 sums over millions of voxels: an accumulation one by one is off by 1e-3 here."""
    x = 0.1 + 1e-2 * torch.randn(1, 3_000_000, generator=torch.Generator().manual_seed(0))
    expected = x.double().mean(), x.double().std()
    mean, deviation = module._centre(x)
    assert abs(mean.item() / expected[0] - 1) < 1e-6 and abs(deviation.item() / expected[1] - 1) < 1e-6


@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e4])
def test_constant_views_stay_finite(value):
    """And constant, but for the noise."""
    found = augment(torch.full((4, 2, *SIZE), value), replace(ALL, noise_p=0.0), *generators())
    assert found.isfinite().all()
    assert (found.amax((2, 3, 4)) - found.amin((2, 3, 4))).max() <= 1e-5 * max(1, abs(value))
    assert augment(torch.full((4, 2, *SIZE), value), ALL, *generators()).isfinite().all()


@pytest.mark.parametrize("size", [(1, 9, 14), (2, 1, 5), (13, 3, 1)])
def test_thin_views_stay_finite(size):
    assert augment(batch(size=size), ALL, *generators()).isfinite().all()


def test_gamma_of_the_darkest_and_brightest_voxel_is_a_number():
    """Subtracting the anchor must give exactly 0, never the smallest negative number, whose power is NaN."""
    for seed in range(20):
        for transform in (module.change_gamma, module.change_inverted_gamma):
            view = batch(1, seed=seed)[0] * 10.0 ** (seed - 10)
            transform(view, torch.tensor([0.7, 1.5]))
            assert view.isfinite().all()


# The batch


def test_all_transforms_in_the_order_of_nnunet():
    views = batch()
    parameters = draw(4, 2, 2, ALL, generators()[0])
    found = augment(views.clone(), ALL, *generators())
    assert TRANSFORMS == NNUNET_ORDER
    expected = Reference()(views, parameters, generators()[1], NNUNET_ORDER)
    torch.testing.assert_close(found, expected, rtol=5e-5, atol=5e-5)  # seven roundings, two powers
    for a, b in [(0, 1), (0, 2), (1, 3), (3, 4), (4, 5), (5, 6)]:  # brightness commutes with blur and contrast
        order = list(NNUNET_ORDER)
        order[a], order[b] = order[b], order[a]
        other = Reference()(views, parameters, generators()[1], order)
        assert (other - found).abs().max() > 1e-3, order


@pytest.mark.parametrize("name", NNUNET_ORDER)
def test_only_the_chosen_views_change(name):
    views = batch(8)
    parameters = draw(8, 4, 2, replace(OFF, **{f"{name}_p": 0.5, "blur_channel_p": 1.0}), generators(5)[0])
    rows = getattr(parameters, name).rows
    changed = set(rows) | ({row + 4 for row in rows} if name == "low_resolution" else set())
    found = apply(views.clone(), parameters, generators()[1])
    assert 0 < len(changed) < 8
    assert {n for n in range(8) if not torch.equal(found[n], views[n])} == changed


def test_nothing_happens_when_no_transform_may():
    views = batch()
    assert torch.equal(augment(views.clone(), OFF, *generators()), views)


def test_works_in_place_and_returns_the_batch():
    views = batch()
    before = views.clone()
    assert augment(views, ALL, *generators()) is views and not torch.equal(views, before)


def test_views_in_another_memory_order_become_the_same():
    views = batch()
    strided = views.to(memory_format=torch.channels_last_3d)
    assert not strided.is_contiguous()
    torch.testing.assert_close(augment(strided, ALL, *generators()), augment(views, ALL, *generators()))


def test_same_seeds_same_views_other_seed_other_views():
    found = [augment(batch(), ALL, *generators(seed)) for seed in (1, 1, 2)]
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_autocast_changes_nothing():
    expected = augment(batch(), ALL, *generators())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(batch(), ALL, *generators()), expected)


def test_low_resolution_is_shared_by_both_views_of_a_case_and_all_channels():
    """Two equal views of a case stay equal, as do equal channels; those of other cases differ."""
    views = batch(1, 1, LARGER).expand(6, 3, -1, -1, -1).clone()
    found = augment(views, replace(OFF, low_resolution_p=1.0), *generators())
    assert torch.equal(found[:3], found[3:]) and torch.equal(found[:, :1].expand_as(found), found)
    assert all(not torch.equal(found[a], found[b]) for a, b in [(0, 1), (0, 2), (1, 2)])


def test_where_no_loss_compares_views_every_view_is_a_case():
    config = replace(OFF, low_resolution_p=1.0, consistency_weight=0.0, contrastive_weight=0.0)
    found = augment(batch(1, 1, LARGER).expand(3, -1, -1, -1, -1).clone(), config, *generators())
    assert all(not torch.equal(found[a], found[b]) for a, b in [(0, 1), (0, 2), (1, 2)])


@pytest.mark.parametrize("name", [name for name in NNUNET_ORDER if name != "low_resolution"])
def test_every_view_has_parameters_of_its_own(name):
    """Equal views, both of a case included, become different ones."""
    config = replace(OFF, **{f"{name}_p": 1.0, "blur_channel_p": 1.0})
    found = augment(batch(1, 1).expand(4, 2, -1, -1, -1).clone(), config, *generators())
    for a in range(4):
        assert not torch.equal(found[a, 0], found[a, 1])  # and every channel has, or noise of its own
        assert all(not torch.equal(found[a], found[b]) for b in range(a))


# Drawing


def test_every_transform_is_applied_as_often_as_configured():
    config, views = CVAConfig(), 8000
    parameters = draw(views, views // 2, 2, config, generators()[0])
    for name in NNUNET_ORDER:
        count = views // 2 if name == "low_resolution" else views
        p = getattr(config, f"{name}_p")
        assert abs(len(getattr(parameters, name).rows) / count - p) < 4.5 * math.sqrt(p * (1 - p) / count), name
    p = config.blur_channel_p
    channels = parameters.blur.values.all(2)
    assert abs(channels.mean() - p) < 4.5 * math.sqrt(p * (1 - p) / channels.size)


def test_transforms_are_chosen_independently_of_each_other():
    views, config = 8000, replace(OFF, **{f"{name}_p": 0.5 for name in NNUNET_ORDER})
    parameters = draw(views, views, 1, config, generators()[0])
    chosen = np.zeros((len(NNUNET_ORDER), views))
    for n, name in enumerate(NNUNET_ORDER):
        chosen[n, getattr(parameters, name).rows] = 1
    correlation = np.corrcoef(chosen) - np.eye(len(NNUNET_ORDER))
    assert np.abs(correlation).max() < 4.5 / math.sqrt(views)


def test_parameters_fill_their_ranges_uniformly():
    config = replace(ALL, blur_channel_p=1.0)
    parameters = draw(4000, 2000, 2, config, generators()[0])
    uniform = {"noise": config.noise_sigma, "blur": config.blur_sigma, "low_resolution": config.low_resolution_zoom}
    for name, (low, high) in uniform.items():
        counts = np.histogram(getattr(parameters, name).values, 4, (low, high))[0]
        n = getattr(parameters, name).values.size
        assert counts.sum() == n and np.abs(counts / n - 0.25).max() < 5 * math.sqrt(0.25 * 0.75 / n)


@pytest.mark.parametrize("name", ["brightness", "contrast", "inverted_gamma", "gamma"])
def test_factors_are_below_1_as_often_as_above_and_uniform_on_either_side(name):
    low, high = (0.7, 1.5) if "gamma" in name else (0.75, 1.25)
    values = getattr(draw(4000, 2000, 2, ALL, generators()[0]), name).values
    edges = [low, (low + 1) / 2, 1, (1 + high) / 2, high]
    counts = np.histogram(values, edges)[0]
    assert counts.sum() == values.size
    assert np.abs(counts / values.size - 0.25).max() < 5 * math.sqrt(0.25 * 0.75 / values.size)


@pytest.mark.parametrize("range_", [(1.2, 1.6), (0.4, 0.8), (1.0, 1.0), (0.5, 1.0), (1.0, 2.0)])
def test_factors_stay_in_a_range_on_one_side_of_1(range_):
    values = draw(500, 250, 2, replace(ALL, brightness_range=range_), generators()[0]).brightness.values
    assert range_[0] <= values.min() and values.max() <= range_[1]
    assert np.ptp(values) > 0.9 * (range_[1] - range_[0]) - 1e-12


# What is refused


@pytest.mark.parametrize(
    "views", [torch.zeros(2, 1, 4, 5), torch.zeros(2, 1, 4, 5, 6, dtype=torch.float16), torch.zeros(3, 1, 4, 5, 6)]
)
def test_views_of_another_form_are_refused(views):
    with pytest.raises(ValueError, match=r"expected float32 views \(N, C, I, J, K\), 2 per case"):
        augment(views, CVAConfig(), *generators())


# The device


def test_the_check_for_reads_notices_them():
    x = torch.arange(4.0)
    with Reads() as reads:
        x[x > 1], float(x[0]), x.nonzero()
    assert {"index by bool", "_local_scalar_dense", "nonzero"} <= set(reads.found)


def test_nothing_is_read_back_from_the_device():
    with Reads() as reads:
        augment(batch(), ALL, *generators())
    assert reads.found == []


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_never_waited_for_and_agrees_with_the_cpu():
    config = replace(ALL, noise_p=0.0)  # the field of noise is the device's
    views, noise = batch().cuda(), torch.Generator("cuda").manual_seed(0)
    augment(views.clone(), ALL, generators()[0], noise)  # libraries initialise themselves at their first call
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = augment(views.clone(), config, generators()[0], noise)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), augment(batch(), config, *generators()), rtol=1e-4, atol=1e-4)
