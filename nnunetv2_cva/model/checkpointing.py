"""Less memory for more time: activations that the backward pass computes again instead of keeping."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_in_backward(modules: Iterable[nn.Module]) -> None:
    """Keep only the inputs of these modules until the backward pass. What is random in them is drawn the same again.

    Set on the instances: nothing of it enters a state dict, and a deep copy recomputes the copy.
    """
    for module in modules:
        module.forward = partial(checkpoint, module.forward, use_reentrant=False)
