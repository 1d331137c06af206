"""Weights from anywhere: our checkpoints, nnU-Net's, those of nnssl and OpenMind, files that ``export`` wrote, state dicts."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunetv2_cva.transfer.card import configuration_of, from_nnssl, from_training
from nnunetv2_cva.transfer.opening import opened
from nnunetv2_cva.transfer.parts import PRIMUS, Layout, layout_of

# The teacher's modules (model/branches.py, model/primus.py) and where nnU-Net's network holds what they average.
TEACHER_MODULES = {
    "encoder.encoder.": "encoder.",
    "encoder.tokenizer.": "down_projection.",
    "encoder.eva.": "eva.",
    "encoder.registers.0": "register_tokens",
}
AGAIN = "as when this file was exported: "
RESENC_L_STRIDES = ((1, 1, 1), *((2, 2, 2),) * 5)


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
    decoder: tuple[str, str] = ("keep", "the file does not say that it was untrained")  # default of --decoder, and why
    obstacle: str | None = None  # to nnU-Net's own loader, in how the file is written
    notes: tuple[str, ...] = ()


def read(path: str | Path, branch: str = "student", trust: bool = False) -> Source:
    """The weights of ``path``, whoever wrote it.

    ``branch="teacher"`` takes the encoder from the moving average; a decoder is always the student's. The student is the default
    everywhere: it is what stock ``-pretrained_weights`` reads from the same file and what the decoder was trained with, and
    by the end of training, with a learning rate near 0, both branches agree.

    Raises:
        ValueError: no checkpoint, unknown architecture, not finite, no such branch, or not to be opened without ``trust``.
    """
    path = Path(path)
    content = opened(path, trust)
    stored = _state_dict(content, path)
    weights = _plain_names(stored)
    obstacle = None if "network_weights" in content else "it has no entry 'network_weights'"
    if weights.keys() != stored.keys():
        obstacle = "the names in the file are not nnU-Net's"
    if branch == "teacher":
        weights = _with_teacher(weights, content, path)
        obstacle = "it reads the student of this file"
    for key, value in weights.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{path}: {key} holds NaN or Inf. The training that wrote it has diverged.")
    try:
        layout = layout_of(weights)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    known = _nnssl if "nnssl_adaptation_plan" in content else _nnunet
    return dataclasses.replace(known(path, branch, weights, layout, content), obstacle=obstacle)


def _state_dict(content: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    for name in ("network_weights", "state_dict"):
        if isinstance(content.get(name), Mapping):
            return content[name]
    if content and all(isinstance(v, Tensor) for v in content.values()):
        return content
    found = ", ".join(map(str, content)) or "nothing"
    raise ValueError(f"{path} is not a checkpoint of a network: expected an entry 'network_weights', found {found}.")


def _plain_names(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Without what DistributedDataParallel (``module.``) and torch.compile (``_orig_mod.``) put into names."""
    return {
        re.sub(r"^(module\.)+", "", re.sub(r"(^|(?<=\.))_orig_mod\.", "", str(key))): value
        for key, value in weights.items()
        if isinstance(value, Tensor)
    }


def _with_teacher(weights: dict[str, Tensor], content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    teacher = (content.get("cva") or {}).get("teacher")
    if not teacher:
        raise ValueError(
            f"{path} holds no teacher. Only checkpoint_final and checkpoint_latest of a recipe with two views do; use "
            "--branch student."
        )
    found = {
        ours + key[len(theirs) :]: value
        for key, value in teacher.items()
        for theirs, ours in TEACHER_MODULES.items()
        if key.startswith(theirs)
    }
    replaced = tuple({TEACHER_MODULES[m] for m in TEACHER_MODULES if any(k.startswith(m) for k in teacher)})
    missing = [k for k in weights if k.startswith(replaced) and k not in found]
    if not found or missing:
        raise ValueError(f"{path}: the teacher does not hold the whole encoder (missing: {', '.join(missing) or 'all'}).")
    kept = {k: v for k, v in weights.items() if not k.startswith((*replaced, "decoder.encoder."))}
    return {**kept, **found}


def _nnunet(path: Path, branch: str, weights: dict[str, Tensor], layout: Layout, content: Mapping[str, Any]) -> Source:
    arguments = content.get("init_args") or {}
    configuration = arguments.get("configuration")
    plans = arguments.get("plans") or _beside(path, "plans.json", content)
    dataset_json = arguments.get("dataset_json") or _beside(path, "dataset.json", content)
    if plans is not None and configuration not in plans["configurations"]:
        plans = None  # of another training
    kind = "weights without a description" if "trainer_name" not in content else "nnU-Net checkpoint"
    kind = "pretraining checkpoint" if "cva" in content else "exported weights" if "pretraining" in content else kind
    found = configuration_of(plans, configuration) if plans is not None and configuration is not None else {}
    return Source(
        path=path,
        kind=kind,
        branch=content["pretraining"].get("branch", branch) if "pretraining" in content else branch,
        weights=weights,
        layout=_with_strides(layout, found.get("architecture", {}).get("arch_kwargs", {}).get("strides")),
        card=content.get("pretraining") or from_training(content, plans, configuration, dataset_json),
        builder=_builder(content, layout),
        plans=plans,
        configuration=configuration,
        dataset_json=dataset_json,
        view=tuple(found["patch_size"]) if "patch_size" in found else None,
        decoder=_decoder_default(content, layout),
    )


def _beside(path: Path, name: str, content: Mapping[str, Any]) -> dict[str, Any] | None:
    """What nnU-Net keeps in the results folder, one level above the checkpoints."""
    file = path.parent.parent / name
    if "trainer_name" not in content or not file.is_file():
        return None
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _builder(content: Mapping[str, Any], layout: Layout) -> str | None:
    if "cva" not in content:
        return content.get("trainer_name")
    return content["cva"].get("backbone_trainer") or ("nnUNetTrainer" if layout.stages else content.get("trainer_name"))


def _decoder_default(content: Mapping[str, Any], layout: Layout) -> tuple[str, str]:
    if "cva" in content:
        if layout.family in PRIMUS:
            return "fresh", "pretraining trains a decoder of its own beside a Primus; this one was never trained"
        if content["cva"].get("config", {}).get("reconstruction_weight", 1) == 0:
            return "fresh", "this recipe reconstructs nothing, so it was never trained"
        return "keep", "it was trained to reconstruct masked images from this encoder's features"
    if "transfer" in content:
        exported = content["transfer"]
        return exported["decoder"], AGAIN + exported["decoder_reason"]
    if "trainer_name" in content:
        return "keep", "it was trained to segment"
    return Source.decoder


def _nnssl(path: Path, branch: str, weights: dict[str, Tensor], layout: Layout, content: Mapping[str, Any]) -> Source:
    card = content.get("pretraining") or from_nnssl(content)
    adaptation = content["nnssl_adaptation_plan"]
    architecture = adaptation.get("architecture_plans") or {}
    name = architecture.get("arch_class_name")
    strides = (architecture.get("arch_kwargs") or {}).get("strides") or (RESENC_L_STRIDES if name == "ResEncL" else None)
    notes: tuple[str, ...] = ()
    if "EvaMAE" in str(content.get("trainer_name")):
        notes = (
            "trained by nnssl's Primus MAE, which exchanges the first two axes of the token grid; taken as they are, as nnU-Net "
            "does",
        )
    view = from_nnssl(content).get("view_size")
    return Source(
        path=path,
        kind="nnssl checkpoint",
        branch=branch,
        weights=weights,
        layout=_with_strides(layout, strides),
        card=card,
        view=tuple(view) if view else None,
        notes=notes,
    )


def _with_strides(layout: Layout, strides: Any) -> Layout:
    """The layout with the strides that a plan states, where the shapes of a decoder have not told them."""
    if not isinstance(strides, (list, tuple)) or len(strides) != len(layout.stages):
        return layout
    axes = len(layout.stages[0].kernel)
    full = [tuple(s) if isinstance(s, (list, tuple)) else (s,) * axes for s in strides]
    stages = [dataclasses.replace(s, stride=s.stride or f) for s, f in zip(layout.stages, full, strict=True)]
    return dataclasses.replace(layout, stages=tuple(stages))
