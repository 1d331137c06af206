"""Files for nnU-Net: written whole or not at all, and loaded back with nnU-Net's own loader before they get their name."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nnunetv2_cva.transfer.adapt import Transfer
from nnunetv2_cva.transfer.card import completed, plain
from nnunetv2_cva.transfer.read import AGAIN
from nnunetv2_cva.transfer.target import Target
from nnunetv2_cva.transfer.weights import check_writable, save_whole


def write_for_nnunet(
    path: str | Path, network: nn.Module, transfer: Transfer, target: Target, licence: str | None = None
) -> None:
    """Write ``network``, filled by ``transfer``, as a file for stock ``nnUNetv2_train -pretrained_weights``.

    Raises:
        ValueError: the file cannot be written, or does not come back the same; then nothing is written.
    """
    source = transfer.source
    content = {
        "network_weights": network.state_dict(),
        "init_args": {
            "plans": plain(target.plans),
            "configuration": target.configuration,
            "fold": None,
            "dataset_json": plain(target.dataset_json),
        },
        "trainer_name": target.trainer.__name__,
        "inference_allowed_mirroring_axes": None,
        "pretraining": completed(source.card, source.layout.family, source.branch, source.path, licence),
        "transfer": {
            "decoder": transfer.decoder,
            "decoder_reason": transfer.decoder_reason.removeprefix(AGAIN),
            "encoder_carried": transfer.share("carried"),
            "encoder_adapted": transfer.share("adapted"),
            "adapted": {r.keys[0]: r.how for r in transfer.rows if r.action == "adapted"},
            "fresh": {r.keys[0]: r.how for r in transfer.rows if r.action == "fresh"},
        },
    }
    write(path, content, source.path, lambda file: check_with_stock_loader(file, network, target))


def check_with_stock_loader(file: Path, network: nn.Module, target: Target) -> None:
    """Load ``file`` into a fresh target with nnU-Net's loader and compare every tensor under every name.

    Raises:
        ValueError: nnU-Net refuses the file, or a tensor differs.
    """
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    fresh = target.build()
    with torch.no_grad():
        for tensor in fresh.state_dict().values():  # the target always starts alike: a tensor that is not loaded must show
            tensor.add_(1)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            load_pretrained_weights(fresh, str(file))
    except (AssertionError, RuntimeError) as e:
        raise ValueError(f"nnU-Net does not load the file into {target.label}: {e}") from None
    loaded = fresh.state_dict()
    for key, value in network.state_dict().items():
        if ".seg_layers." not in key and not torch.equal(value, loaded[key]):  # nnU-Net never loads these
            raise ValueError(f"{key} is not the same after nnU-Net has loaded the file into {target.label}.")


def write(path: str | Path, content: dict[str, Any], source: Path, check: Callable[[Path], None]) -> None:
    """Save ``content``, made from the file ``source``, under ``path`` when ``check`` of the new file raises nothing; else leave
    ``path`` as it was.

    Raises:
        ValueError: not writable, or ``path`` is ``source``; or whatever ``check`` raises.
    """
    check_writable(path, source)
    try:
        save_whole(content, path, check)
    except OSError as e:
        raise ValueError(f"{e} Nothing was written.") from None
