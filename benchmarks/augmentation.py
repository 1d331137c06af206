"""Milliseconds per view: our augmentation on the device beside batchgeneratorsv2's transforms in a loader process.

    python benchmarks/augmentation.py [--device cuda] [--views 96 128 160] [--repeats 12]

Every transform is timed when it is applied, ours on ``--device`` and batchgeneratorsv2's on one CPU thread; "mean" is what a
view costs on average with the default probabilities, which are the same on both sides (sum of probability times cost).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from time import perf_counter, process_time

import numpy as np
import torch
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.views import augment

CONFIG = CVAConfig()
# One channel; blur's second draw, whether the channel is blurred, is in the probability.
PROBABILITY = {
    "noise": CONFIG.noise_p,
    "blur": CONFIG.blur_p * CONFIG.blur_channel_p,
    "brightness": CONFIG.brightness_p,
    "contrast": CONFIG.contrast_p,
    "low resolution": CONFIG.low_resolution_p,
    "inverted gamma": CONFIG.inverted_gamma_p,
    "gamma": CONFIG.gamma_p,
}

WARM_UP = 12


def theirs() -> dict[str, Callable[..., dict]]:
    """batchgeneratorsv2's, with the arguments of nnU-Net's training, every channel changed."""
    gamma = {"gamma": BGContrast(CONFIG.gamma_range), "synchronize_channels": False, "p_per_channel": 1, "p_retain_stats": 1}
    return {
        "noise": GaussianNoiseTransform(CONFIG.noise_sigma, 1, True),
        "blur": GaussianBlurTransform(CONFIG.blur_sigma, False, False, 1, benchmark=True),
        "brightness": MultiplicativeBrightnessTransform(BGContrast(CONFIG.brightness_range), False, 1),
        "contrast": ContrastTransform(BGContrast(CONFIG.contrast_range), True, False, 1),
        "low resolution": SimulateLowResolutionTransform(CONFIG.low_resolution_zoom, False, True, None, None, 1),
        "inverted gamma": GammaTransform(p_invert_image=1, **gamma),
        "gamma": GammaTransform(p_invert_image=0, **gamma),
    }


def ours(device: torch.device) -> dict[str, Callable[[torch.Tensor], None]]:
    """Ours, on one view, parameters drawn as in training."""
    rng, noise = np.random.default_rng(0), torch.Generator(device).manual_seed(0)

    def factor(low_high: tuple[float, float]) -> torch.Tensor:
        return augment._transfer(augment._around_one(low_high, (1,), rng), device)

    return {
        "noise": lambda view: augment.add_noise(view, float(rng.uniform(*CONFIG.noise_sigma)), noise),
        "blur": lambda view: augment.blur(view, rng.uniform(*CONFIG.blur_sigma, (1, 3))),
        "brightness": lambda view: augment.scale_brightness(view, factor(CONFIG.brightness_range)),
        "contrast": lambda view: augment.scale_contrast(view, factor(CONFIG.contrast_range)),
        "low resolution": lambda view: augment.lower_resolution(view, float(rng.uniform(*CONFIG.low_resolution_zoom))),
        "inverted gamma": lambda view: augment.change_inverted_gamma(view, factor(CONFIG.gamma_range)),
        "gamma": lambda view: augment.change_gamma(view, factor(CONFIG.gamma_range)),
    }


def milliseconds(run: Callable[[torch.Tensor], object], view: torch.Tensor, repeats: int) -> float:
    """The median, of the device on CUDA, else of CPU time; each time on a fresh copy, which is not counted.

    The first dozen is not counted either: in it batchgeneratorsv2 tries which way of blurring is the faster one.
    """
    found = []
    for _ in range(WARM_UP + repeats):
        fresh = view.clone()
        if view.is_cuda:
            torch.cuda.synchronize()
        clock = perf_counter if view.is_cuda else process_time
        began = clock()
        run(fresh)
        if view.is_cuda:
            torch.cuda.synchronize()
        found.append(clock() - began)
    return 1000 * float(np.median(found[WARM_UP:]))


def main() -> None:
    """Print one table per size of view."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--views", type=int, nargs="+", default=[96, 128, 160])
    parser.add_argument("--repeats", type=int, default=12)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    for edge in args.views:
        torch.manual_seed(0)
        view = torch.randn(1, edge, edge, edge)
        print(f"\nView {edge}^3, ms\n\n| transform | probability | ours ({device.type}) | batchgeneratorsv2 (CPU) |")
        print("|---|---|---|---|")
        mean = [0.0, 0.0]
        mine, other = ours(device), theirs()
        for name, probability in PROBABILITY.items():
            cost = (
                milliseconds(mine[name], view.to(device), args.repeats),
                milliseconds(lambda x, t=other[name]: t(image=x), view, args.repeats),
            )
            mean = [m + probability * c for m, c in zip(mean, cost)]
            print(f"| {name} | {probability:.2f} | {cost[0]:.2f} | {cost[1]:.2f} |", flush=True)
        print(f"| mean of a view | | {mean[0]:.2f} | {mean[1]:.2f} |")


if __name__ == "__main__":
    main()
