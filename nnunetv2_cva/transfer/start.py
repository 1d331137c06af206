"""``init_from``: the start of a pretraining from whatever file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from nnunetv2_cva.transfer.adapt import fill, match
from nnunetv2_cva.transfer.card import inheritance
from nnunetv2_cva.transfer.hub import SCHEME
from nnunetv2_cva.transfer.licence import reminders
from nnunetv2_cva.transfer.read import read
from nnunetv2_cva.transfer.table import table
from nnunetv2_cva.transfer.target import Target
from nnunetv2_cva.transfer.weights import NeedsOption


@dataclass(frozen=True)
class Start:
    """``lines``: the table. ``inherited``: licence, citations and origin of the weights, for the training to keep."""

    lines: list[str]
    inherited: dict[str, Any]


def start_from(path: str, network: nn.Module, target: Target) -> Start:
    """Fill ``network``, that of the training ``target``, with the weights of ``path``.

    Raises:
        ValueError: the file cannot be read, is of another architecture, or fills too little of the encoder.
    """
    try:
        source = read(path)
        transfer = match(source, network, target.view, images=target.images)
        reason = transfer.refusal()
        if reason is not None:
            raise NeedsOption(f"{reason}.", "allow_partial")
    except NeedsOption as e:
        raise ValueError(
            f"init_from: {e} If you want these weights all the same, make a file for this training with `nnUNetv2_cva export`, "
            f"which can be told to {_WAYS[e.option]}, and pass it with nnU-Net's -pretrained_weights in place of init_from."
        ) from None
    except ValueError as e:
        raise ValueError(f"init_from: {e}") from None
    fill(network, transfer)
    licence = [f"Licence: {source.card['licence']}, which the trained weights inherit."] if source.card.get("licence") else []
    reminded = [f"WARNING: {line}." for line in reminders(source.card.get("licence"))]
    lines = [f"Weights of {path} ({source.kind}):", *table(transfer), *licence, *reminded]
    return Start(lines, inheritance(source.card, path if path.startswith(SCHEME) else Path(path).name))


_WAYS = {"trust": "trust the file", "source_view": "take a patch size for the file's", "allow_partial": "write it all the same"}
