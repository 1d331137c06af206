"""Less memory for more time: activations that the backward pass computes again instead of keeping."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import flop_registry


def recompute_in_backward(modules: Iterable[nn.Module], how: bool | Literal["selective"]) -> None:
    """Keep less of each of these modules until the backward pass.

    ``how``: True keeps what enters them, so everything in them is computed twice. "selective" also keeps the results of
    convolutions, matrix products and attention: computed again are norms, activations, sums and changes of type, which
    takes no FLOPs that torch counts. False keeps everything. Dropped paths are the same when computed again.

    Set on the instances: nothing of it enters a state dict, and a deep copy recomputes the copy.

    Raises:
        ValueError: a module has running statistics, which would move twice in a step.
    """
    if not how:
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
        logging.getLogger("torch._higher_order_ops.wrap").addFilter(_has_news)
    for module in modules:
        for part in module.modules():
            if getattr(part, "running_mean", None) is not None:
                raise ValueError(
                    f"gradient_checkpointing: the network has {type(part).__name__} with running statistics, which would move "
                    "twice in a step. Set it to false."
                )
            if how == "selective" and hasattr(part, "inplace"):
                setattr(part, "inplace", False)  # noqa: B010  the result of a convolution is kept: nothing may change it
        module.forward = partial(checkpoint, module.forward, **options)


def _has_news(record: logging.LogRecord) -> bool:
    """When torch compiles, it asks that nothing be changed in place. Nothing that is kept is."""
    return "context_fn is passed" not in record.getMessage()


def _keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what an operation returns in which torch counts FLOPs. It does not know attention on a CPU."""
    packet = getattr(operation, "_overloadpacket", operation)
    product = packet in flop_registry or "scaled_dot_product" in str(packet)
    return CheckpointPolicy.MUST_SAVE if product else CheckpointPolicy.PREFER_RECOMPUTE
