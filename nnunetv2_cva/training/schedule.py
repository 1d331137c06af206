"""Optimizer and learning rate. The rate is a function of the epoch alone, so a resumed run continues it exactly."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from nnunetv2_cva.config import CVAConfig, FinetuneConfig

POLY_EXPONENT = 0.9  # nnU-Net's


def learning_rate(epoch: int, config: CVAConfig | FinetuneConfig) -> float:
    """Linear warm-up, then polynomial decay that reaches 0 after the last epoch."""
    if epoch < config.warmup:
        return config.learning_rate * (epoch + 1) / config.warmup
    progress = (epoch - config.warmup) / max(1, config.epochs - config.warmup)
    return config.learning_rate * max(0.0, 1 - progress) ** POLY_EXPONENT


def make_optimizer(
    parameters: Iterable[nn.Parameter], config: CVAConfig | FinetuneConfig, device: torch.device
) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum (the paper's U-Nets) or AdamW (the paper's Primus), on CUDA fused if configured."""
    trained = [p for p in parameters if p.requires_grad]
    fused = config.fused_optimizer if device.type in ("cuda", "cpu") else None  # fused ones can skip a step without waiting
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            trained,
            config.learning_rate,
            config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
            fused=fused,
        )
        if fused:  # torch leaves them uninitialised where the first step is skipped
            optimizer.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in trained if config.momentum > 0})
        return optimizer
    return torch.optim.AdamW(trained, config.learning_rate, betas=config.betas, weight_decay=config.weight_decay, fused=fused)
