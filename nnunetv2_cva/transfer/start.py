"""``init_from``: the start of a pretraining from whatever file."""

from __future__ import annotations

from torch import nn

from nnunetv2_cva.transfer.adapt import fill, match
from nnunetv2_cva.transfer.read import read
from nnunetv2_cva.transfer.table import table


def start_from(path: str, network: nn.Module, view: tuple[int, ...]) -> list[str]:
    """Fill ``network``, built for ``view``, with the weights of ``path``; returns the table's lines.

    Raises:
        ValueError: the file cannot be read, is of another architecture, or fills too little of the encoder.
    """
    source = read(path)
    transfer = match(source, network, view)
    reason = transfer.refusal()
    if reason is not None:
        raise ValueError(
            f"init_from: {reason}. If that is what you want, write a file with `nnUNetv2_cva export ... --allow-partial` for "
            "this trainer and pass it with -pretrained_weights."
        )
    fill(network, transfer)
    return [f"Weights of {path} ({source.kind}):", *table(transfer)]
