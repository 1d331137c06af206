"""Files in the layout of nnssl, OpenMind and the SSL3D challenge, for their strict loading of encoder and stem.

Layout: plain types and tensors only, lists instead of tuples, storage shared between the names of one layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunetv2_cva.nnunet import TOKEN
from nnunetv2_cva.transfer.adapt import Transfer, fill, match
from nnunetv2_cva.transfer.architectures import built, named
from nnunetv2_cva.transfer.card import NO_RESAMPLING, completed, plain
from nnunetv2_cva.transfer.read import Source
from nnunetv2_cva.transfer.resize import token_grid
from nnunetv2_cva.transfer.target import Target, target_of
from nnunetv2_cva.transfer.write import write

CONSUMERS_VIEW = (160, 160, 160)


def own_target(source: Source) -> Target:
    """The network that the file was trained with.

    Raises:
        ValueError: the file does not say, or it was made for another network.
    """
    if source.kind in ("exported weights", "nnssl checkpoint"):
        raise ValueError(
            f"{source.path} ({source.kind}) is not the file of a training. Export from the checkpoint of the training itself."
        )
    try:
        return target_of(source)
    except ValueError as e:
        raise ValueError(f"{e} The nnssl format describes them: export from the training's folder, where they lie.") from None


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
    write(path, content, source.path, lambda file: check_strictly(file, network))
    return plan


def adaptation_plan(network: nn.Module, target: Target, channels: int) -> dict[str, Any]:
    """What consumers need to know about the network and its data, as plain types.

    Raises:
        ValueError: the format has no name for this network.
    """
    settings = target.settings
    spacing = None if settings.get("resampling_fn_data") == NO_RESAMPLING else settings.get("spacing")
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
    # Only where there is a position for every token: elsewhere it stops the organisers' script.
    view = {"pretrain_patch_size": settings["patch_size"]} if network.key_to_lpe is not None else {}
    return plain(
        {
            "architecture_plans": named(network, settings),
            "pretrain_plan": {**{k: target.plans.get(k) for k in kept}, "configurations": {style: configuration}},
            "pretrain_num_input_channels": channels,
            "recommended_downstream_patchsize": settings["patch_size"],
            "key_to_encoder": network.key_to_encoder,
            "key_to_stem": network.key_to_stem,
            "keys_to_in_proj": network.keys_to_in_proj,
            "key_to_lpe": network.key_to_lpe,
            **view,
        }
    )


def check_strictly(file: Path, network: nn.Module, view: tuple[int, ...] = CONSUMERS_VIEW) -> None:
    """Do what the consumers do: build the network that the file names, for ``view``, from the file alone; bring the position
    embedding to its grid; load encoder and stem strictly, each under its prefix; and compare every tensor.

    Raises:
        ValueError: missing or unexpected names, shapes that do not fit, tensors that differ or are no longer shared.
    """
    content = torch.load(file, map_location="cpu", weights_only=True)
    plan, weights = content["nnssl_adaptation_plan"], content["network_weights"]
    with torch.device("meta"):  # shapes and names; it may be large
        consumer = built(plan["architecture_plans"], plan["pretrain_num_input_channels"], 1, view)
    wanted, position = network.state_dict(), plan["key_to_lpe"]
    for prefix in (plan["key_to_encoder"], plan["key_to_stem"]):
        part = {k: v for k, v in weights.items() if k.startswith(f"{prefix}.")}
        for key in part:
            if not torch.equal(part[key], wanted[key]):
                raise ValueError(f"{key} is not the same after it has been loaded from the file.")
        if position in part:
            grids = [tuple(n // t for n, t in zip(size, TOKEN, strict=True)) for size in (plan["pretrain_patch_size"], view)]
            part[position], _ = token_grid(part[position], grids[0], grids[1], (0, 0))
        try:
            consumer.get_submodule(prefix).load_state_dict(
                {k[len(prefix) + 1 :]: v for k, v in part.items()}, strict=True, assign=True
            )
        except RuntimeError as e:
            raise ValueError(f"{prefix} of the file does not load strictly: {e}") from None
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
