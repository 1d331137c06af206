"""A network whose weights no longer change, as a source of features: any file that ``info`` reads, and the same network untrained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunetv2_cva.model.primus import PrimusBackbone
from nnunetv2_cva.model.taps import Tap, token_tap, unet_taps
from nnunetv2_cva.model.unet import UNetBackbone
from nnunetv2_cva.transfer.nnssl import filled_with_itself, own_target
from nnunetv2_cva.transfer.read import read
from nnunetv2_cva.transfer.target import Target

Encode = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Frozen:
    """An encoder and what it expects. ``encode``: views (N, C, *view) on ``device`` -> a map (N, C, cells) of every tap.

    ``plans`` and ``configuration`` say how images are preprocessed for it; ``view`` is the extent that it was trained with.
    """

    label: str
    encode: Encode
    taps: tuple[Tap, ...]
    view: tuple[int, int, int]
    channels: int
    plans: dict[str, Any]
    configuration: str
    device: torch.device

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Of preprocessed images, mm along (i, j, k)."""
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        i, j, k = PlansManager(self.plans).get_configuration(self.configuration).spacing
        return float(i), float(j), float(k)


def load_frozen(path: str | Path, branch: str = "student", trust: bool = False, device: str = "cpu", label: str = "") -> Frozen:
    """The network in a file. ``label``: how tables and pictures call it, the file's name by default.

    Raises:
        ValueError: the file holds no network that nnU-Net can build, or does not say how images are to be preprocessed for it.
    """
    source = read(path, branch, trust)
    target = own_target(source)
    network, _ = filled_with_itself(source, target)
    return _frozen(network, target, device, label or Path(path).stem)


def untrained(like: str | Path, trust: bool = False, device: str = "cpu", label: str = "untrained") -> Frozen:
    """The network of a file as nnU-Net initialises it: what any training has to be better than.

    Raises:
        ValueError: as ``load_frozen``.
    """
    target = own_target(read(like, trust=trust))
    return _frozen(target.build(), target, device, label)


def _frozen(network: nn.Module, target: Target, device: str, label: str) -> Frozen:
    chosen = torch.device(device)
    network = network.eval().requires_grad_(False).to(chosen)
    encode, taps = encoder_of(network)
    i, j, k = target.view
    channels = len(target.settings["normalization_schemes"])
    return Frozen(label, encode, taps, (i, j, k), channels, target.plans, target.configuration, chosen)


def encoder_of(network: Any) -> tuple[Encode, tuple[Tap, ...]]:
    """What turns views into maps, and where the cells of the maps are; of a U-Net or a Primus that nnU-Net built.

    Raises:
        ValueError: another family, or a layer whose cells cannot be located.
    """
    if hasattr(network, "eva") and hasattr(network, "down_projection"):
        modules: dict[str, nn.Module] = {"tokenizer": network.down_projection, "eva": network.eva}
        if network.register_tokens is not None:
            modules["registers"] = nn.ParameterList([network.register_tokens])
        return lambda views: PrimusBackbone.encode(modules, views)[0], (
            token_tap(network.down_projection, network.eva.embed_dim),
        )
    if hasattr(network, "encoder"):
        encoder = {"encoder": network.encoder}
        return lambda views: UNetBackbone.encode(encoder, views)[0], unet_taps(network.encoder)
    raise ValueError(f"{type(network).__name__} has no encoder whose features could be shown: expected a U-Net or a Primus.")
