"""Weights from anywhere: our checkpoints, nnU-Net's, those of nnssl and OpenMind, files that ``export`` wrote, state dicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunetv2_cva.files import read_object
from nnunetv2_cva.model.families import layout_of
from nnunetv2_cva.model.naming import UNKNOWN, Family, Layout, Names
from nnunetv2_cva.transfer.architectures import RESENC_L_STRIDES
from nnunetv2_cva.transfer.card import entry, from_nnssl, from_training, settings
from nnunetv2_cva.transfer.hub import located
from nnunetv2_cva.transfer.licence import NOT_STATED, known
from nnunetv2_cva.transfer.renaming import called, nnunet_names
from nnunetv2_cva.transfer.safety import check_tensors
from nnunetv2_cva.transfer.weights import opened

NNSSL = "nnssl checkpoint"
RECONSTRUCTING = ("keep", "it was trained to reconstruct masked images from this encoder's features")
AGAIN = "as when this file was exported: "


@dataclass(frozen=True)
class Source:
    """Weights under nnU-Net's names, and what the file says about them."""

    path: Path
    kind: str
    branch: str
    weights: dict[str, Tensor]
    layout: Layout
    card: dict[str, Any]  # of the training that made the weights (card.py)
    builder: str | None = None  # name of the trainer whose network this is
    plans: dict[str, Any] | None = None  # of the network in the file
    configuration: str | None = None
    dataset_json: dict[str, Any] | None = None
    view: tuple[int, ...] | None = None  # the extent the network in the file was built for
    decoder: tuple[str, str] = ("keep", "the file does not say that it was untrained")  # what becomes of it by default, and why
    obstacle: str | None = None  # to nnU-Net's own loader, in how the file is written
    notes: tuple[str, ...] = ()
    architecture: dict[str, Any] = dataclasses.field(default_factory=dict)  # of an adaptation plan


def read(path: str | Path, branch: str = "student", trust: bool = False, any_network: bool = False) -> Source:
    """The weights of ``path``, whoever wrote it.

    ``branch="teacher"`` takes the encoder from the moving average; a decoder is always the student's. The student is the default
    everywhere: it is what stock ``-pretrained_weights`` reads from the same file and what the decoder was trained with, and
    by the end of training, with a learning rate near 0, both branches agree. ``any_network``: a network that is none of nnU-Net's
    gets the layout ``UNKNOWN``, to be described and not to be transferred.

    Raises:
        ValueError: no checkpoint, unknown architecture, not finite, no such branch, or not to be opened without ``trust``.
    """
    origin, path = str(path), located(path, trust)
    content = opened(path, trust)
    stored = _state_dict(content, path)
    check_tensors(stored, path)
    check_tensors(entry(content, "cva", "teacher"), path)
    stated = Family.from_stated(entry(content, "cva", "family") or entry(content, "pretraining", "family"))
    weights, notes = nnunet_names(stored, entry(content, "nnssl_adaptation_plan"), stated, path)
    obstacle = None if "network_weights" in content else "it has no entry 'network_weights'"
    if weights.keys() != stored.keys():
        obstacle = "the names in the file are not nnU-Net's"
    try:
        layout = layout_of(weights, stated)
    except ValueError as e:
        if not any_network:
            foreign = called(weights)
            raise ValueError(f"{path}: {e}" + (f" This is {foreign}." if foreign else "")) from None
        layout = UNKNOWN
    if branch == "teacher":
        weights = _with_teacher(weights, layout.family, content, path)
        obstacle = "it reads the student of this file"
    for key, value in weights.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{path}: {key} holds NaN or Inf. The training that wrote it has diverged.")
    described = _nnssl if entry(content, "nnssl_adaptation_plan") else _nnunet
    source = described(path, branch, weights, layout, content)
    card = _with_licence(source.card, origin, path)
    return dataclasses.replace(source, obstacle=obstacle, notes=(*notes, *source.notes), card=card)


def _with_licence(card: dict[str, Any], origin: str, path: Path) -> dict[str, Any]:
    """The card with what is known of a published file, where the file itself does not say it."""
    found = known(origin, path, card)
    if found is None:
        return card
    stated = card.get("citations")
    cited = list(stated) if isinstance(stated, list) else []
    own = {"type": "Weights", "name": found.name, "apa_citations": [found.citation]}
    if found.citation and own not in cited:
        cited.append(own)
    licence = found.licence if card.get("licence") in (None, NOT_STATED) else card["licence"]
    return {**card, "licence": licence, "citations": cited or None, "published": found.source or None}


def _state_dict(content: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    for name in ("network_weights", "state_dict"):
        if isinstance(content.get(name), Mapping):
            return content[name]
    if content and all(isinstance(v, Tensor) for v in content.values()):
        return content
    found = ", ".join(map(str, content)) or "nothing"
    raise ValueError(f"{path} is not a checkpoint of a network: expected an entry 'network_weights', found {found}.")


def _with_teacher(weights: dict[str, Tensor], family: Family, content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The weights with the teacher's where it has any, under the first of their names."""
    teacher = entry(content, "cva", "teacher")
    if not teacher:
        raise ValueError(
            f"{path} holds no teacher. Only final and latest checkpoints of recipes with two views do; take the student."
        )
    found = {}
    for name, place in family.averaged.items():  # as model/branches.py names its copies
        start = f"encoder.{name}."
        for key in (k for k in teacher if k.startswith(start)):
            found[place if place in weights else f"{place}.{key[len(start) :]}"] = teacher[key]
    replaced = tuple(p for p in family.averaged.values() if any(k == p or k.startswith(f"{p}.") for k in found))
    starts = tuple(f"{p}." for p in replaced)
    missing = [k for k in weights if (k in replaced or k.startswith(starts)) and k not in found]
    if not found or missing:
        raise ValueError(f"{path}: the teacher does not hold the whole encoder (missing: {', '.join(missing) or 'all'}).")
    again = tuple(f"{second}." for second in family.second_names)
    kept = {k: v for k, v in weights.items() if k not in replaced and not k.startswith((*starts, *again))}
    return {**kept, **found}


def _nnunet(path: Path, branch: str, weights: dict[str, Tensor], layout: Layout, content: Mapping[str, Any]) -> Source:
    arguments, exported = entry(content, "init_args"), entry(content, "pretraining")
    configuration = arguments.get("configuration")
    plans = entry(arguments, "plans") or _beside(path, "plans.json", content) or None
    dataset_json = entry(arguments, "dataset_json") or _beside(path, "dataset.json", content) or None
    found = settings(plans, configuration)
    plans = plans if found else None  # else those of another training, or none at all
    kind = "nnU-Net checkpoint" if plans is not None else "checkpoint without plans"
    kind = "weights without a description" if "trainer_name" not in content else kind
    kind = "pretraining checkpoint" if entry(content, "cva") else "exported weights" if exported else kind
    return Source(
        path=path,
        kind=kind,
        branch=exported.get("branch", branch),
        weights=weights,
        layout=_with_strides(layout, entry(found, "architecture", "arch_kwargs").get("strides")),
        card=exported or from_training(content, plans, configuration, dataset_json),
        builder=_builder(content, layout),
        plans=plans,
        configuration=configuration,
        dataset_json=dataset_json,
        view=_extent(found.get("patch_size")),
        decoder=_decoder_default(content, layout, plans is not None and "trainer_name" in content),
    )


def _extent(value: Any) -> tuple[int, ...] | None:
    whole = isinstance(value, (list, tuple)) and all(isinstance(n, int) and n > 0 for n in value)
    return tuple(value) if whole else None


def _beside(path: Path, name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """What nnU-Net keeps in the results folder, one level above the checkpoints."""
    file = path.parent.parent / name
    if "trainer_name" not in content or not file.is_file():
        return {}
    try:
        return read_object(file)
    except ValueError:
        return {}


def _builder(content: Mapping[str, Any], layout: Layout) -> str | None:
    ours, name = entry(content, "cva"), content.get("trainer_name")
    if ours:
        name = ours.get("backbone_trainer") or ("nnUNetTrainer" if layout.stages else name)
    return name if isinstance(name, str) else None


def _decoder_default(content: Mapping[str, Any], layout: Layout, planned: bool) -> tuple[str, str]:
    ours, exported = entry(content, "cva"), entry(content, "transfer")
    if ours:
        if layout.family.own_decoder:
            return "fresh", f"pretraining trains a decoder of its own beside a {layout.family.kin}; this one was never trained"
        if entry(ours, "config").get("reconstruction_weight", 1) == 0:
            return "fresh", "this recipe reconstructs nothing, so it was never trained"
        return RECONSTRUCTING
    if exported.get("decoder") in ("keep", "fresh"):
        return exported["decoder"], f"{AGAIN}{exported.get('decoder_reason')}"
    if planned:
        return "keep", "it was trained to segment"
    return Source.decoder


def _nnssl(path: Path, branch: str, weights: dict[str, Tensor], layout: Layout, content: Mapping[str, Any]) -> Source:
    architecture = entry(content, "nnssl_adaptation_plan", "architecture_plans")
    resenc_l = architecture.get("arch_class_name") == "ResEncL"
    strides = entry(architecture, "arch_kwargs").get("strides") or (RESENC_L_STRIDES if resenc_l else None)
    notes: tuple[str, ...] = ()
    if "EvaMAE" in str(content.get("trainer_name")):
        notes = (
            "trained by nnssl's Primus MAE, which exchanges the first two axes of the token grid; taken as they are, as nnU-Net "
            "does",
        )
    return Source(
        path=path,
        kind=NNSSL,
        branch=branch,
        weights=weights,
        layout=_with_strides(layout, strides),
        card=entry(content, "pretraining") or from_nnssl(content),
        view=_extent(from_nnssl(content).get("view_size")),
        decoder=RECONSTRUCTING if entry(content, "pretraining", "config") else _foreign_decoder(weights, layout),
        notes=notes,
        architecture=architecture,
    )


def _foreign_decoder(weights: Mapping[str, Tensor], layout: Layout) -> tuple[str, str]:
    """A layer that was trained behind blocks that fine-tuning does not have has seen other features than it will see there."""
    names = Names(layout.family, weights)
    beside = any(".blocks." in key and names.part(key)[1] == "other" for key in weights)
    if layout.family.own_decoder and beside:
        return "fresh", "it was trained behind blocks of the file's decoder that the target does not have"
    return Source.decoder


def _with_strides(layout: Layout, strides: Any) -> Layout:
    """The layout with the strides that a plan states, where the shapes of a decoder have not told them."""
    if not layout.stages or not isinstance(strides, (list, tuple)) or len(strides) != len(layout.stages):
        return layout
    axes = len(layout.stages[0].kernel)
    full = [tuple(s) if isinstance(s, (list, tuple)) else (s,) * axes for s in strides]
    stages = [dataclasses.replace(s, stride=s.stride or f) for s, f in zip(layout.stages, full, strict=True)]
    return dataclasses.replace(layout, stages=tuple(stages))
