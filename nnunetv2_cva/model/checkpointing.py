"""Less memory for more time: activations that the backward pass computes again instead of keeping."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import flop_registry


def recompute_in_backward(modules: Iterable[nn.Module], how: bool | Literal["selective"]) -> None:
    """Keep less of each of these modules until the backward pass. What is random in them is drawn the same again.

    ``how``: True keeps their inputs alone, so all of them is computed twice. "selective" also keeps the results of
    convolutions, matrix products and attention: computed again are norms, activations, sums and changes of type, which
    takes no FLOPs that torch counts. False keeps everything.

    Set on the instances: nothing of it enters a state dict, and a deep copy recomputes the copy.
    """
    if not how:
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    for module in modules:
        module.forward = partial(checkpoint, module.forward, **options)


def _keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what an operation returns in which torch counts FLOPs. It does not know attention on a CPU."""
    packet = operation._overloadpacket
    product = packet in flop_registry or "scaled_dot_product" in packet.__name__
    return CheckpointPolicy.MUST_SAVE if product else CheckpointPolicy.PREFER_RECOMPUTE
