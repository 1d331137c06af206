"""Files in the layout of nnssl, OpenMind and the SSL3D challenge, for their strict loading of encoder and stem.

Layout: plain types and tensors only, lists instead of tuples, storage shared between the names of one layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunetv2_cva.sizes import by
from nnunetv2_cva.transfer.adapt import Transfer, fill, match
from nnunetv2_cva.transfer.card import completed, plain
from nnunetv2_cva.transfer.read import RESENC_L_STRIDES, Source
from nnunetv2_cva.transfer.target import Target, trainer_class
from nnunetv2_cva.transfer.write import write

PRIMUS_SIZES = {(396, 12, 6): "PrimusS", (792, 12, 12): "PrimusB", (864, 16, 12): "PrimusM", (1056, 24, 16): "PrimusL"}
RESENC_L = {
    "n_stages": 6,
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[3, 3, 3]] * 6,
    "strides": [list(s) for s in RESENC_L_STRIDES],
    "n_blocks_per_stage": [1, 3, 4, 6, 6, 6],
    "n_conv_per_stage_decoder": [1] * 5,
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
_DYNAMIC = ("ResidualEncoderUNet", "PlainConvUNet")


def own_target(source: Source) -> Target:
    """The network that the file was trained with.

    Raises:
        ValueError: the file does not say, or it was made for another network.
    """
    if source.kind in ("exported weights", "nnssl checkpoint"):
        raise ValueError(
            f"{source.path} ({source.kind}) is not the file of a training. Export from the checkpoint of the training itself."
        )
    if source.plans is None or source.configuration is None or source.dataset_json is None or source.builder is None:
        raise ValueError(
            f"{source.path} ({source.kind}) does not state plans, configuration, dataset and trainer, which this format "
            "describes. Export it from the folder of its training, which has plans.json and dataset.json."
        )
    return Target(source.plans, source.configuration, source.dataset_json, trainer_class(source.builder))


def write_for_nnssl(
    path: str | Path, network: nn.Module, transfer: Transfer, target: Target, licence: str | None = None
) -> dict[str, Any]:
    """Write ``network``, filled with its own weights by ``transfer``; returns the adaptation plan of the file.

    What was not trained (output layer; a decoder that starts afresh) is left out: consumers load encoder and stem.

    Raises:
        ValueError: the format has no name for this network, not all of the encoder is there, or the file cannot be written.
    """
    source = transfer.source
    left = [r.keys[0] for r in transfer.rows if r.role == "encoder" and r.action != "carried"]
    if left:
        raise ValueError(f"{source.path} does not hold the whole encoder of {target.label}: {left[0]} is missing or differs.")
    plan = adaptation_plan(network, target, transfer.target.channels)
    fresh = {k for r in transfer.rows if r.action == "fresh" for k in r.keys}
    card = completed(source.card, source.layout.family, source.branch, source.path, licence)
    content = {
        "network_weights": {k: v for k, v in network.state_dict().items() if k not in fresh},
        "nnssl_adaptation_plan": plan,
        "trainer_name": str(source.card.get("trainer")),
        "citations": card["citations"],
        "pretraining": card,
    }
    write(path, content, source.path, lambda file: check_strictly(file, network, target))
    return plan


def adaptation_plan(network: nn.Module, target: Target, channels: int) -> dict[str, Any]:
    """What consumers need to know about the network and its data, as plain types.

    Raises:
        ValueError: the format has no name for this network.
    """
    settings = target.settings
    spacing = settings.get("spacing")
    isotropic = spacing is not None and all(abs(s - 1) < 1e-6 for s in spacing)
    style = "noresample" if spacing is None else "onemmiso" if isotropic else "median"
    names = ("data_identifier", "preprocessor_name", "normalization_schemes", "use_mask_for_norm", "patch_size")
    configuration = {
        **{name: settings.get(name) for name in names},
        "spacing_style": style,
        "spacing": spacing,
        "resampling_fn_data": settings.get("resampling_fn_data"),
        "resampling_fn_data_kwargs": settings.get("resampling_fn_data_kwargs"),
        "resampling_fn_mask": settings.get("resampling_fn_seg"),
        "resampling_fn_mask_kwargs": settings.get("resampling_fn_seg_kwargs"),
    }
    kept = (
        "dataset_name",
        "plans_name",
        "original_median_spacing_after_transp",
        "image_reader_writer",
        "transpose_forward",
        "transpose_backward",
        "experiment_planner_used",
    )
    return plain(
        {
            "architecture_plans": architecture(network, settings),
            "pretrain_plan": {**{k: target.plans.get(k) for k in kept}, "configurations": {style: configuration}},
            "pretrain_num_input_channels": channels,
            "recommended_downstream_patchsize": settings["patch_size"],
            "key_to_encoder": network.key_to_encoder,
            "key_to_stem": network.key_to_stem,
            "keys_to_in_proj": network.keys_to_in_proj,
            "key_to_lpe": network.key_to_lpe,
        }
    )


def architecture(network: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """``architecture_plans``: ResEncL and PrimusS to L by name, other U-Nets by their arguments."""
    kind = type(network).__name__
    if kind == "Primus":
        eva = network.eva
        size = (eva.embed_dim, len(eva.blocks), eva.blocks[0].attn.num_heads)
        token = tuple(network.down_projection.proj.kernel_size)
        if size in PRIMUS_SIZES and token == (8, 8, 8):
            return {"arch_class_name": PRIMUS_SIZES[size], "arch_kwargs": None, "arch_kwargs_requiring_import": None}
        width, depth, heads = size
        raise ValueError(
            f"The nnssl format names Primus S, B, M and L with tokens of 8x8x8 voxels; this one has {width} channels, {depth} "
            f"blocks, {heads} heads and tokens of {by(token)}."
        )
    if kind not in _DYNAMIC:
        raise ValueError(f"The nnssl format has no name for {kind}: it knows Primus V1, {' and '.join(_DYNAMIC)}.")
    arguments = settings["architecture"]["arch_kwargs"]
    if kind == "ResidualEncoderUNet" and plain(arguments) == RESENC_L:
        return {"arch_class_name": "ResEncL", "arch_kwargs": None, "arch_kwargs_requiring_import": None}
    return {
        "arch_class_name": kind,
        "arch_kwargs": arguments,
        "arch_kwargs_requiring_import": settings["architecture"]["_kw_requires_import"],
    }


def check_strictly(file: Path, network: nn.Module, target: Target) -> None:
    """Load encoder and stem of ``file`` strictly, as the consumers do, and compare.

    Raises:
        ValueError: not plain types, missing or unexpected names, or tensors that differ or are no longer shared.
    """
    content = torch.load(file, map_location="cpu", weights_only=True)
    plan, weights = content["nnssl_adaptation_plan"], content["network_weights"]
    fresh = target.build()
    for prefix in (plan["key_to_encoder"], plan["key_to_stem"]):
        part = {k[len(prefix) + 1 :]: v for k, v in weights.items() if k.startswith(prefix + ".")}
        try:
            fresh.get_submodule(prefix).load_state_dict(part, strict=True)
        except RuntimeError as e:
            raise ValueError(f"{prefix} of the file does not load strictly: {e}") from None
    loaded, wanted = fresh.state_dict(), network.state_dict()
    for key, value in weights.items():
        inside = key.startswith((plan["key_to_encoder"] + ".", plan["key_to_stem"] + "."))
        if not torch.equal(value, wanted[key]) or (inside and not torch.equal(value, loaded[key])):
            raise ValueError(f"{key} is not the same after it has been loaded from the file.")
    if len(_storages(weights)) != len(_storages({k: wanted[k] for k in weights})):
        raise ValueError("The names of one layer no longer share storage in the file.")


def filled_with_itself(source: Source, target: Target, decoder: str | None = None) -> tuple[nn.Module, Transfer]:
    """The network that the file was trained with, filled from the file."""
    network = target.build()
    transfer = match(source, network, target.view, decoder)
    fill(network, transfer)
    return network, transfer


def _storages(weights: dict[str, Tensor]) -> set[int]:
    return {w.data_ptr() for w in weights.values()}
