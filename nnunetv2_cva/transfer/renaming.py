"""From the names in a file to nnU-Net's: what wrappers have put before them, and what an adaptation plan says of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunetv2_cva.model.families import layout_of
from nnunetv2_cva.model.naming import Family

# Where nnU-Net's networks have what an adaptation plan calls encoder, stem and position embedding.
PLACES = {
    "Primus": {"key_to_encoder": "eva", "key_to_stem": "down_projection", "key_to_lpe": "eva.pos_embed"},
    "ResEnc": {"key_to_encoder": "encoder.stages", "key_to_stem": "encoder.stem"},
    "ResidualEncoderUNet": {"key_to_encoder": "encoder.stages", "key_to_stem": "encoder.stem"},
    "PlainConvUNet": {"key_to_encoder": "encoder.stages", "key_to_stem": "encoder.stages.0"},
}
DEPTH = 3  # wrappers within each other
OTHERS = (  # networks that people have weights of and that nnU-Net's loader cannot take
    (r"conv_blocks_context\.\d+\.blocks\.", "a network of nnU-Net v1"),
    (r"conv_blocks_context\.\d+\.\d+\.conv1\.", "an STU-Net"),
    (r"(enc_block_\d+|bottleneck)\.\d+\.conv1\.", "a MedNeXt"),
    (r"swinViT\.", "a SwinUNETR"),
)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of a file are one, or hold the same numbers."""
    return a.shape == b.shape and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))


def nnunet_names(
    stored: Mapping[str, Any], plan: Mapping[str, Any], stated: Family | None, path: Path
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of ``stored`` under the names of nnU-Net's networks, as far as they can be found, and what was done for it.

    ``plan``: the adaptation plan of the file, whose prefixes count before any guess. What DistributedDataParallel (``module.``)
    and torch.compile (``_orig_mod.``) put into names goes silently.

    Raises:
        ValueError: two tensors that differ would get one name, or several parts of the file hold a network each; names them.
    """
    found: dict[str, Tensor] = {}
    for key, value in stored.items():
        if isinstance(value, Tensor):
            name = re.sub(r"^(module\.)+", "", re.sub(r"(^|(?<=\.))_orig_mod\.", "", str(key)))
            _put(found, name, value, str(key), path)
    renamed, notes = _as_stated(found, plan, path)
    if notes or _known(renamed, stated):
        return renamed, notes
    wrappers = [w for w in _wrappers(renamed) if _known(_within(renamed, w), stated)]
    wrappers = [w for w in wrappers if not any(w.startswith(f"{outer}.") for outer in wrappers)]
    if len(wrappers) > 1 and any("student" in w.split(".") for w in wrappers):
        wrappers = [w for w in wrappers if "student" in w.split(".")]  # as everywhere
    if len(wrappers) > 1:
        listed = ", ".join(wrappers)
        raise ValueError(f"{path} holds {len(wrappers)} networks ({listed}). Keep the tensors of the one that is wanted.")
    if not wrappers:
        return renamed, []
    inner = _within(renamed, wrappers[0])
    left = len(renamed) - len(inner)
    beside = f"; {left} tensors that stand beside it are left out" if left else ""
    return inner, [f"the network of the file is called {wrappers[0]!r} there, which is taken off its names{beside}"]


def called(weights: Mapping[str, Any]) -> str | None:
    """What a network is that nnU-Net does not have, where its names tell."""
    return next((what for pattern, what in OTHERS if any(re.search(pattern, key) for key in weights)), None)


def _put(found: dict[str, Tensor], name: str, value: Tensor, key: str, path: Path) -> None:
    if name in found and not same(found[name], value):
        raise ValueError(
            f"{path} holds two versions of {name}, one of them as {key}, and they differ. Remove the weights that are not "
            "wanted from the file."
        )
    found[name] = value


def _as_stated(weights: dict[str, Tensor], plan: Mapping[str, Any], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Encoder, stem and position embedding moved from where ``plan`` says to where nnU-Net's network of that class has them."""
    architecture = plan.get("architecture_plans")
    kind = str(architecture.get("arch_class_name")) if isinstance(architecture, Mapping) else ""
    places = next((p for name, p in PLACES.items() if name in kind), {})
    moves = {str(plan[k]): here for k, here in places.items() if isinstance(plan.get(k), str) and plan[k] != here}
    moves = {there: here for there, here in moves.items() if any(k == there or k.startswith(f"{there}.") for k in weights)}
    if not moves:
        return weights, []
    # What the encoder is wrapped in, the rest may be wrapped in, too.
    for there, here in list(moves.items()):
        if there.endswith(f".{here}"):
            moves.setdefault(there[: -len(here) - 1], "")
    renamed: dict[str, Tensor] = {}
    for key, value in weights.items():
        for there in sorted(moves, key=len, reverse=True):
            if key == there or key.startswith(f"{there}."):
                name = (moves[there] + key[len(there) :]).removeprefix(".")
                break
        else:
            name = key
        _put(renamed, name, value, key, path)
    listed = ", ".join(f"{there} for {here}" for there, here in moves.items() if here)
    return renamed, [f"the file's own names for its parts were followed ({listed})"]


def _known(weights: Mapping[str, Tensor], stated: Family | None) -> bool:
    try:
        layout_of(weights, stated)
    except ValueError:
        return False
    return True


def _wrappers(weights: Mapping[str, Tensor]) -> list[str]:
    """Beginnings of names, shortest first."""
    found = {".".join(k.split(".")[:n]) for n in range(1, DEPTH + 1) for k in weights if k.count(".") >= n}
    return sorted(found, key=lambda w: (w.count("."), w))[:300]


def _within(weights: Mapping[str, Tensor], wrapper: str) -> dict[str, Tensor]:
    return {k[len(wrapper) + 1 :]: v for k, v in weights.items() if k.startswith(f"{wrapper}.")}
