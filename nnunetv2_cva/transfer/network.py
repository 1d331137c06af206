"""nnU-Net's network as a file of weights has it, for work that no command does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunetv2_cva.model.branches import backbone_class
from nnunetv2_cva.model.families import FAMILIES
from nnunetv2_cva.model.naming import Names
from nnunetv2_cva.model.taps import Tap
from nnunetv2_cva.transfer.adapt import fill, match
from nnunetv2_cva.transfer.architectures import built
from nnunetv2_cva.transfer.card import entry
from nnunetv2_cva.transfer.inferred import check_same, inferred
from nnunetv2_cva.transfer.nnssl import CONSUMERS_VIEW
from nnunetv2_cva.transfer.read import Source, read
from nnunetv2_cva.transfer.target import target_of, trainer_class


@dataclass(frozen=True)
class Loaded:
    """A network with its weights, on the CPU, in evaluation mode; and where the cells of its feature maps are.

    ``card``: where the weights come from, plain types.
    """

    network: nn.Module
    taps: tuple[Tap, ...]
    card: dict[str, Any]
    _encode: Callable[[Tensor], list[Tensor]]

    def maps(self, views: Tensor) -> list[Tensor]:
        """``views`` (N, C, I, J, K) -> a map (N, channels, cells) for every tap: what pretraining aligns."""
        return self._encode(views)


def load_network(file: str | Path, branch: str = "student", trust: bool = False) -> Loaded:
    """The network of ``file`` with its weights: a checkpoint of ours, nnU-Net's or nnssl's, or one that was exported.

    ``branch="teacher"``: the encoder is the moving average's. What the file does not hold stays as it is initialised. A
    state dict alone is built from its shapes, as nnU-Net builds networks (``inferred.py``).

    Raises:
        ValueError: as ``read``; or neither the file nor its shapes say how its network is built, or it lacks part of the encoder.
    """
    source = read(file, branch, trust)
    network, view = _built(source)
    transfer = match(source, network, view, "keep", view or None)
    left = [r.keys[0] for r in transfer.rows if r.role == "encoder" and r.action != "carried"]
    if left:
        raise ValueError(f"{source.path} does not hold the whole encoder of its network: {left[0]} is missing or differs.")
    fill(network, transfer)
    state = network.state_dict()
    with torch.no_grad():
        for key in (k for r in transfer.rows if r.role == "output" for k in r.keys):
            if key in source.weights and source.weights[key].shape == state[key].shape:
                state[key].copy_(source.weights[key])
    return _with_taps(network.eval(), source)


def untrained_network(file: str | Path, trust: bool = False) -> Loaded:
    """The network of ``file`` as it is initialised, the same at every call: what any training has to be better than.

    Raises:
        ValueError: as ``load_network``, but for the weights, which are not looked at.
    """
    source = read(file, trust=trust)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network, _ = _built(source)
    return _with_taps(network.eval(), source)


def _with_taps(network: nn.Module, source: Source) -> Loaded:
    family = source.layout.family
    if family in FAMILIES:
        kind: Any = backbone_class(network)
        taps = kind.taps_of(network)
    else:  # a recipe's own
        recipe = trainer_class(str(source.card.get("trainer")))
        gradients = [p.requires_grad for p in network.parameters()]
        kind = recipe.backbone(network, recipe.config)
        taps = kind.taps
        for parameter, required in zip(network.parameters(), gradients, strict=True):
            parameter.requires_grad_(required)
    return Loaded(network, taps, _described(source), lambda views: kind.encode(family.modules(network), views)[0])


def _described(source: Source) -> dict[str, Any]:
    """The card; where it says nothing of images, with what the target says that the file was made for."""
    if entry(source.card, "plans") or source.plans is None:
        return source.card
    return {**source.card, "plans": source.plans, "configuration": source.configuration}


def _built(source: Source) -> tuple[nn.Module, tuple[int, ...]]:
    """The network, and the extent that it was built for; () where this changes nothing of it."""
    if source.plans is not None and source.builder is not None:
        # Pretraining reconstructs: as many outputs as inputs. Exported weights have the outputs of their target.
        outputs = source.layout.channels if source.kind == "pretraining checkpoint" else None
        return target_of(source).build(outputs, deep_supervision=False), source.view or ()
    architecture, view = source.architecture, source.view
    names = Names(source.layout.family, source.weights)
    classes = [w.shape[0] for k, w in source.weights.items() if k.endswith(".bias") and names.part(k)[1] == "output"]
    shape = source.layout.channels, classes[-1] if classes else 1
    if architecture:
        return built(architecture, *shape, view or CONSUMERS_VIEW, source.weights), view or ()
    try:
        architecture, view = inferred(source.layout, source.weights)
        network = built(architecture, *shape, view, source.weights)
        check_same(network.state_dict(), source.weights)
    except ValueError as e:
        raise ValueError(
            f"{source.path} ({source.kind}) does not state how its network is built, {e}. Make a file of it for a target that "
            "has this network, with `nnUNetv2_cva export`: that one states it."
        ) from None
    return network, view
