"""Which of torch's attention kernels is the fastest for a training on this GPU: found by trying them.

Measurements disagree between generations of GPUs and sizes of heads, so no order is the right one everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nnunetv2_cva.model.primus import PrimusBackbone
from nnunetv2_cva.training.clock import Clock, make_clock

KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
REPEATS = 3


@dataclass(frozen=True)
class Attention:
    """Self-attention of one size in a training step: how often it runs, and whether with its backward pass."""

    shape: tuple[int, int, int, int]  # views, heads, tokens, channels of a head
    count: int
    trained: bool


def attentions(backbone: Any, views: int) -> list[Attention]:
    """The self-attention of a training step on so many views, the teacher's included. A U-Net has none."""
    if not isinstance(backbone, PrimusBackbone):
        return []
    eva: Any = backbone.network.eva
    tokens, registers = math.prod(backbone.grid), eva.num_prefix_tokens
    kept = tokens - round(backbone.mask_ratio * tokens)

    def of(blocks: Any, length: int, trained: bool) -> Attention:
        heads = blocks[0].attn.num_heads
        return Attention((views, heads, length, backbone.image_channels // heads), len(blocks), trained)

    found = [of(eva.blocks, kept + registers, True)]
    added = (backbone.feature_blocks, backbone.decoder_blocks)
    found += [of(blocks.blocks, tokens, True) for blocks in added if blocks is not None]
    if backbone.feature_blocks is not None:  # a loss compares views: there is a teacher
        found.append(of(eva.blocks, tokens + registers, False))
    return found


def preferring(kernel: str | None) -> AbstractContextManager:
    """Attention by this kernel (of ``KERNELS``) where it can, else by another. It counts where a step is run and where it is
    compiled, forward and backward. None: torch's own order."""
    if kernel is None:
        return nullcontext()
    others = [backend for name, backend in KERNELS.items() if name != kernel]
    return sdpa_kernel([KERNELS[kernel], *others, SDPBackend.MATH], set_priority=True)


def measure(steps: Sequence[Attention], device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Seconds that the attention of a step takes when each kernel is preferred, the fastest first; a kernel that fails is
    infinitely slow."""
    clock = make_clock(device)
    found = {kernel: _seconds(kernel, steps, device, dtype, clock) for kernel in KERNELS}
    return dict(sorted(found.items(), key=lambda pair: pair[1]))


def _seconds(kernel: str, steps: Iterable[Attention], device: torch.device, dtype: torch.dtype, clock: Clock) -> float:
    total = 0.0
    generator = torch.Generator(device).manual_seed(0)
    for step in steps:
        q, k, v, gradient = (torch.randn(step.shape, generator=generator, device=device, dtype=dtype) for _ in range(4))
        for tensor in (q, k, v):
            tensor.requires_grad_(step.trained)
        try:
            with preferring(kernel):
                _once(q, k, v, gradient)  # kernels are loaded, cuDNN makes its plan
                clock.wait()
                begin = clock.mark(hold=False)
                for _ in range(REPEATS):
                    _once(q, k, v, gradient)
                end = clock.mark(hold=False)
                clock.wait()
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError:
            return math.inf
        total += step.count * clock.between(begin, end) / REPEATS
    return total


def _once(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> None:
    out = F.scaled_dot_product_attention(q, k, v)
    if q.requires_grad:
        torch.autograd.grad(out, (q, k, v), gradient)


def choose(
    configured: str, backbone: Any, views: int, device: torch.device, dtype: torch.dtype | None
) -> tuple[str | None, str | None]:
    """The kernel to prefer, and a line for the log; None and None where there is nothing to choose: no attention, no CUDA, or
    float32, for which there is one kernel."""
    steps = attentions(backbone, views)
    if not steps or device.type != "cuda" or dtype is None:
        return None, None
    if configured != "auto":
        return configured, f"Attention: {configured} where it can, as set."
    found = measure(steps, device, dtype)
    best = next(iter(found))
    listing = ", ".join(f"{name} {1000 * s:.0f} ms" if math.isfinite(s) else f"{name} fails" for name, s in found.items())
    if not math.isfinite(found[best]):
        return None, f"Attention: torch's own choice ({listing})."
    return best, f"Attention: {best} is the fastest here (of a step: {listing})."
