"""Intensities: what nnU-Net does to them, on the training device, for a whole batch of views.

Every transform does what batchgeneratorsv2's does with the arguments of nnU-Net's ``get_training_transforms`` (2.8.1),
in nnU-Net's order; each view has parameters of its own. Only low resolution is drawn per case, and changes all channels
of both views alike.

Drawing is separate from applying. Parameters are drawn on the CPU, so they are the same whatever device the views are
on; only the field of Gaussian noise comes from the device's generator. Nothing is ever read back from the device.

Transforms work in place and view by view, all channels at once. Gathering the chosen views into one tensor would do the
same passes over memory and two more: on a CPU it took twice as long. Nothing needs the memory of more than two views.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nnunetv2_cva.config import CVAConfig

EPSILON = 1e-7  # batchgeneratorsv2's: smallest range and standard deviation that gamma divides by
BLUR_TRUNCATE = 6  # the kernel is about this many standard deviations wide, in total


@dataclass(frozen=True, eq=False)
class Choice:
    """Whom a transform changes and how.

    ``rows``: views (low resolution: cases), ascending; ``values[n]`` belongs to ``rows[n]``.
    """

    rows: list[int]
    values: np.ndarray


@dataclass(frozen=True, eq=False)
class Parameters:
    """All transforms of a batch in the order in which they are applied, and its number of cases.

    Behind each the shape of its values for S chosen views of C channels.
    """

    cases: int
    noise: Choice  # (S,) sigma
    blur: Choice  # (S, C, 3) sigma per axis in voxels, 0: this channel is not blurred
    brightness: Choice  # (S, C) factor
    contrast: Choice  # (S, C) factor
    low_resolution: Choice  # (S,) zoom, S chosen cases
    inverted_gamma: Choice  # (S, C) exponent
    gamma: Choice  # (S, C) exponent


def augment(
    views: Tensor,
    config: CVAConfig,
    generator: np.random.Generator,
    device_generator: torch.Generator,
    part_of: tuple[int, int, int] | None = None,
) -> Tensor:
    """The views with other intensities. Works in place: returns ``views`` (a changed copy if they are not contiguous).

    Args:
        views: (N, C, I, J, K) float32, view-major: view v of case b at ``v * B + b``. N = 2B, or B where no loss
            compares two views.
        generator: draws every parameter.
        device_generator: on the device of ``views``; draws the noise.
        part_of: ``(begin, end, cases)`` where ``views`` are those of cases ``begin`` to before ``end`` of a larger batch: the
            parameters are those that they have in that batch.

    Raises:
        ValueError: ``views`` have another shape or type, or an odd number of views where there should be two per case.
    """
    per_case = 2 if config.needs_second_view else 1
    if views.ndim != 5 or views.dtype != torch.float32 or len(views) % per_case:
        raise ValueError(
            f"augment: expected float32 views (N, C, I, J, K), {per_case} per case, found {views.dtype} {tuple(views.shape)}."
        )
    begin, end, cases = part_of or (0, len(views) // per_case, len(views) // per_case)
    parameters = part(draw(per_case * cases, cases, views.shape[1], config, generator), begin, end)
    return apply(views.contiguous(), parameters, device_generator)


def draw(views: int, cases: int, channels: int, config: CVAConfig, generator: np.random.Generator) -> Parameters:
    """Parameters for a batch. Uses up the same random numbers whatever is chosen."""

    def choice(probability: float, values: np.ndarray) -> Choice:
        rows = np.flatnonzero(generator.random(len(values)) < probability)
        return Choice(rows.tolist(), values[rows])

    def factors(range_: tuple[float, float]) -> np.ndarray:
        return _around_one(range_, (views, channels), generator)

    sigma = generator.uniform(*config.blur_sigma, (views, channels, 3))
    sigma *= generator.random((views, channels, 1)) < config.blur_channel_p
    return Parameters(
        cases=cases,
        noise=choice(config.noise_p, generator.uniform(*config.noise_sigma, views)),
        blur=choice(config.blur_p, sigma),
        brightness=choice(config.brightness_p, factors(config.brightness_range)),
        contrast=choice(config.contrast_p, factors(config.contrast_range)),
        low_resolution=choice(config.low_resolution_p, generator.uniform(*config.low_resolution_zoom, cases)),
        inverted_gamma=choice(config.inverted_gamma_p, factors(config.gamma_range)),
        gamma=choice(config.gamma_p, factors(config.gamma_range)),
    )


def part(parameters: Parameters, begin: int, end: int) -> Parameters:
    """Those of cases ``begin`` to before ``end``, counted from 0 again."""
    cases = parameters.cases
    count = end - begin
    if count == cases:
        return parameters

    def rows(choice: Choice) -> Choice:
        kept = [n for n, row in enumerate(choice.rows) if begin <= row % cases < end]
        return Choice([choice.rows[n] // cases * count + choice.rows[n] % cases - begin for n in kept], choice.values[kept])

    chosen = {f.name: rows(getattr(parameters, f.name)) for f in fields(parameters) if f.name != "cases"}
    return Parameters(cases=count, **chosen)


@torch.no_grad()
def apply(views: Tensor, parameters: Parameters, device_generator: torch.Generator) -> Tensor:
    """The transforms on a contiguous batch, in place. Independent of autocast: all of it is float32."""
    with torch.autocast(views.device.type, enabled=False):
        for row, sigma in zip(parameters.noise.rows, parameters.noise.values.tolist(), strict=True):
            add_noise(views[row], sigma, device_generator)
        for row, sigmas in zip(parameters.blur.rows, parameters.blur.values, strict=True):
            blur(views[row], sigmas)
        _per_channel(views, parameters.brightness, scale_brightness)
        _per_channel(views, parameters.contrast, scale_contrast)
        for case, zoom in zip(parameters.low_resolution.rows, parameters.low_resolution.values.tolist(), strict=True):
            for view in views[case :: parameters.cases]:
                lower_resolution(view, zoom)
        _per_channel(views, parameters.inverted_gamma, change_inverted_gamma)
        _per_channel(views, parameters.gamma, change_gamma)
    return views


def add_noise(view: Tensor, sigma: float, device_generator: torch.Generator) -> None:
    """Gaussian noise of one standard deviation for all channels, in place. view: (C, I, J, K).

    nnU-Net's range is called a variance, but batchgeneratorsv2 uses the number as standard deviation; so is ``sigma``.
    """
    view.add_(torch.randn(view.shape, generator=device_generator, device=view.device), alpha=sigma)


def blur(view: Tensor, sigma: np.ndarray) -> None:
    """Gaussian blur of one view, in place. view: (C, I, J, K); sigma: (C, 3) in voxels, 0: leave this channel as it is.

    One banded matrix per axis: kernels of every size and their reflection at the border are the same three products.
    """
    size = view.shape[1:]
    for channel in np.flatnonzero(sigma.all(axis=1)).tolist():
        matrices = (blur_matrix(n, s) for n, s in zip(size, sigma[channel].tolist(), strict=True))
        i, j, k = (_transfer(matrix, view.device) for matrix in matrices)
        image = view[channel]
        blurred = (i @ image.flatten(1)).view(size)
        blurred = torch.bmm(j.expand(size[0], -1, -1), blurred)  # matmul would copy the matrix for every plane
        torch.mm(blurred.flatten(0, 1), k.T, out=image.flatten(0, 1))


def blur_matrix(length: int, sigma: float) -> np.ndarray:
    """(length, length): row n holds the weights of output voxel n, beyond the border the voxels mirrored at its centre.

    Kernel as batchgeneratorsv2 builds it (3 to 7 voxels for sigma 0.5 to 1). An axis shorter than half the kernel is
    mirrored again and again, where torch's reflect padding gives up.
    """
    width = round(BLUR_TRUNCATE * sigma + 0.5)
    if width % 2 == 0:  # the nearer odd number
        width += 1 if BLUR_TRUNCATE * sigma + 0.5 >= width else -1
    offsets = np.arange(width) - width // 2
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    voxels = np.arange(length)[:, None]
    period = max(1, 2 * (length - 1))
    source = np.abs(voxels + offsets) % period
    source = np.minimum(source, period - source)
    matrix = np.zeros((length, length))
    np.add.at(matrix, (voxels, source), kernel / kernel.sum())
    return matrix


def scale_brightness(view: Tensor, factor: Tensor) -> None:
    """Multiply, in place. view: (C, I, J, K); factor: (C,)."""
    view.flatten(1).mul_(factor[:, None])


def scale_contrast(view: Tensor, factor: Tensor) -> None:
    """Multiply the distance to the mean, keep to the range of values, in place. view: (C, I, J, K); factor: (C,)."""
    x = view.flatten(1)
    # Not aminmax: along a dimension it is 20 times slower on CPUs than amin and amax together.
    mean, low, high = x.mean(1, keepdim=True), x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    x.sub_(mean).mul_(factor[:, None]).add_(mean).clamp_(low, high)


def lower_resolution(view: Tensor, zoom: float) -> None:
    """What is left of a view after a coarser grid, in place: nearest voxel down, linear up. view: (C, I, J, K).

    The grid has round(zoom * size) voxels along each axis (half to even) and, unlike batchgeneratorsv2's, at least one.
    """
    size = view.shape[1:]
    coarse = F.interpolate(view[None], [max(1, round(zoom * n)) for n in size], mode="nearest-exact")
    view.copy_(F.interpolate(coarse, size, mode="trilinear", align_corners=False)[0])


def change_gamma(view: Tensor, gamma: Tensor, inverted: bool = False) -> None:
    """Raise to a power, smallest value as 0, largest as 1, in place. Every channel keeps mean and standard deviation.

    view: (C, I, J, K); gamma: (C,). ``inverted``: gamma of the negative image, negated again. A constant channel stays.
    """
    x = view.flatten(1)
    mean, deviation = _centre(x)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    range_ = high - low
    sign = -1.0 if inverted else 1.0
    # At the anchor the quotient is exactly 0 and nowhere negative, where a power would be NaN.
    x.sub_(high if inverted else low).div_(sign * range_.clamp(min=EPSILON)).pow_(gamma[:, None])
    _, deviation_now = _centre(x)
    x.mul_(sign * range_ * deviation / (range_ * deviation_now).clamp(min=EPSILON)).add_(mean)


def change_inverted_gamma(view: Tensor, gamma: Tensor) -> None:
    """:func:`change_gamma` of the negative image."""
    change_gamma(view, gamma, inverted=True)


def _centre(x: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract the mean in place. x: (C, V); returns mean and standard deviation (sample: V - 1), both (C, 1).

    On CPUs ``std`` along a dimension takes thirty times as long, and ``vector_norm`` of 160^3 voxels is off by 1e-4.
    """
    mean = x.mean(1, keepdim=True)
    x.sub_(mean)
    return mean, (x.square().sum(1, keepdim=True) / max(1, x.shape[1] - 1)).sqrt_()


def _around_one(range_: tuple[float, float], shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Factors as batchgeneratorsv2's BGContrast draws them: as often below 1 as above, uniform on either side.

    A range that ends below 1 is drawn uniformly (BGContrast would leave it), as is one that begins at 1 or above.
    """
    low, high = range_
    middle = min(max(low, 1.0), high)
    below = generator.random(shape) < (0.0 if low >= 1 else 1.0 if high < 1 else 0.5)
    share = generator.random(shape)
    return np.where(below, low + share * (middle - low), middle + share * (high - middle))


def _per_channel(views: Tensor, choice: Choice, change: Callable[[Tensor, Tensor], None]) -> None:
    if choice.rows:
        for row, values in zip(choice.rows, _transfer(choice.values, views.device), strict=True):
            change(views[row], values)


def _transfer(values: np.ndarray, device: torch.device) -> Tensor:
    """float32 on the device, by way of pinned memory: a copy from ordinary memory may wait for the GPU."""
    tensor = torch.from_numpy(values.astype(np.float32))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
