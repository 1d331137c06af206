"""The networks that adaptation plans name (nnssl, OpenMind, SSL3D), built as their consumers build them."""

from __future__ import annotations

import pydoc
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nnunetv2_cva.nnunet import TOKEN
from nnunetv2_cva.sizes import by
from nnunetv2_cva.transfer.card import entry, plain

RESENC_L_STRIDES = ((1, 1, 1), *((2, 2, 2),) * 5)
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
IMPORTED = ("conv_op", "norm_op", "dropout_op", "nonlin")
PRIMUS_SIZES = {(396, 12, 6): "PrimusS", (792, 12, 12): "PrimusB", (864, 16, 12): "PrimusM", (1056, 24, 16): "PrimusL"}
DYNAMIC = ("ResidualEncoderUNet", "PlainConvUNet")
HEAD_WIDTHS = (66, 72)
_HOME = "dynamic_network_architectures.architectures"
PRIMUS = f"{_HOME}.primus.Primus"


def built(
    architecture: Mapping[str, Any],
    channels: int,
    classes: int,
    view: tuple[int, ...],
    weights: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """The network that ``architecture_plans`` describe; a Primus of a size without a name as its ``weights`` do.

    Raises:
        ValueError: the format has no such network, or an argument names something that is no layer of torch.
    """
    from dynamic_network_architectures.architectures import primus, unet

    name, arguments = str(architecture.get("arch_class_name")).rpartition(".")[2], entry(architecture, "arch_kwargs")
    sizes = {n: size for size, n in PRIMUS_SIZES.items()}
    if name in sizes:
        width, depth, heads = sizes[name]
        return primus.Primus(channels, width, TOKEN, classes, depth, heads, view, init_values=0.1, scale_attn_inner=True)
    if weights is not None and "Primus" in name:
        return primus.Primus(channels, num_classes=classes, input_shape=view, **primus_arguments(weights, arguments))
    if name == "ResEncL":
        name, arguments = DYNAMIC[0], dict(RESENC_L)
    if name not in DYNAMIC:
        known = ", ".join(("ResEncL", *sizes, *DYNAMIC))
        raise ValueError(f"Unknown network {name!r}: expected one of {known}.")
    arguments = {k: torch_class(v) if k in IMPORTED else v for k, v in arguments.items()}
    try:
        return getattr(unet, name)(input_channels=channels, num_classes=classes, **arguments)
    except (TypeError, ValueError, AssertionError, AttributeError) as e:
        raise ValueError(f"{name} cannot be built from the arguments that the file states: {e}") from None


def primus_arguments(weights: Mapping[str, Tensor], stated: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The arguments of the Primus V1 whose state dict this is, but for channels, classes and view.

    Everything but the number of heads follows from names and shapes. Heads are those that are ``stated`` (``arch_kwargs`` of the
    adaptation plan: ``eva_numheads``); else they are taken to have 66 channels, or 72 where that does not divide, as all of
    Primus S, B, M, L and nnFoundation's have.

    Raises:
        ValueError: heads of neither width divide the channels.
    """
    width, hidden = weights["eva.norm.weight"].shape[0], weights["eva.blocks.0.mlp.fc1_x.weight"].shape[0]
    heads = (stated or {}).get("eva_numheads", next((width // n for n in HEAD_WIDTHS if width % n == 0), None))
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise ValueError(
            f"A Primus of {width} channels: expected a multiple of {' or '.join(map(str, HEAD_WIDTHS))}, or a number of heads "
            "that divides them as eva_numheads in arch_kwargs of the adaptation plan (beside safetensors: adaptation_plan.json)."
        )
    return {
        "embed_dim": width,
        "patch_embed_size": list(weights["down_projection.proj.weight"].shape[2:]),
        "eva_depth": len({k.split(".")[2] for k in weights if k.startswith("eva.blocks.")}),
        "eva_numheads": heads,
        "mlp_ratio": hidden / width + 1e-6,  # the network rounds down
        "num_register_tokens": weights["register_tokens"].shape[1] if "register_tokens" in weights else 0,
        "use_abs_pos_embed": "eva.pos_embed" in weights,
        "init_values": 0.1 if "eva.blocks.0.gamma_1" in weights else None,
        "scale_attn_inner": "eva.blocks.0.attn.norm.weight" in weights,
        "drop_path_rate": 0.2,
    }


def importable(architecture: Mapping[str, Any]) -> None:
    """That nothing but networks of dynamic_network_architectures and layers of torch is named in ``architecture`` of plans, which
    nnU-Net imports and calls.

    Raises:
        ValueError: something else; names it.
    """
    kind = architecture.get("network_class_name")
    if kind is None:
        return  # plans of another time, whose network nnU-Net names itself
    allowed = {f"{_HOME}.{module}.{name}" for module in ("unet", "residual_unet") for name in DYNAMIC} | {PRIMUS}
    if kind not in allowed:
        raise ValueError(
            f"The plans in the file name {kind!r} as their network, which is not imported: expected a U-Net or Primus of {_HOME}."
        )
    imported = architecture.get("_kw_requires_import")
    for name in imported if isinstance(imported, list) else []:
        torch_class(entry(architecture, "arch_kwargs").get(name))


def in_plans(architecture: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The U-Net of ``architecture_plans``, or the Primus V1 whose ``weights`` these are, as plans describe it; else None."""
    name, arguments = str(architecture.get("arch_class_name")).rpartition(".")[2], entry(architecture, "arch_kwargs")
    if "down_projection.proj.weight" in weights:
        return {"network_class_name": PRIMUS, "arch_kwargs": primus_arguments(weights, arguments), "_kw_requires_import": []}
    if name == "ResEncL":
        name, arguments = DYNAMIC[0], dict(RESENC_L)
    if name not in DYNAMIC or not arguments:
        return None
    found = {"network_class_name": f"{_HOME}.unet.{name}", "arch_kwargs": arguments, "_kw_requires_import": list(IMPORTED)}
    importable(found)
    return found


def torch_class(name: Any) -> Any:
    """The layer of ``torch.nn`` that a file names; None for None. Nothing else is imported, and nothing is called.

    Raises:
        ValueError: it names something else.
    """
    if name is None:
        return None
    found = pydoc.locate(name) if isinstance(name, str) and name.startswith("torch.nn.") else None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"Expected the name of a layer in torch.nn, found {name!r}.")
    return found


def named(network: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """``architecture_plans`` of a network that nnU-Net built: ResEncL and PrimusS to L by name, other U-Nets by their arguments.

    Raises:
        ValueError: the format has no name for it.
    """
    kind = type(network).__name__
    if kind == "Primus":
        eva = network.eva
        size = (eva.embed_dim, len(eva.blocks), eva.blocks[0].attn.num_heads)
        token = tuple(network.down_projection.proj.kernel_size)
        if size in PRIMUS_SIZES and token == TOKEN:
            return {"arch_class_name": PRIMUS_SIZES[size], "arch_kwargs": None, "arch_kwargs_requiring_import": None}
        width, depth, heads = size
        raise ValueError(
            f"The nnssl format names Primus S, B, M and L with tokens of 8x8x8 voxels; this one has {width} channels, {depth} "
            f"blocks, {heads} heads and tokens of {by(token)}."
        )
    if kind not in DYNAMIC:
        raise ValueError(f"The nnssl format has no name for {kind}: it knows Primus V1, {' and '.join(DYNAMIC)}.")
    arguments = settings["architecture"]["arch_kwargs"]
    if kind == DYNAMIC[0] and plain(arguments) == RESENC_L:
        return {"arch_class_name": "ResEncL", "arch_kwargs": None, "arch_kwargs_requiring_import": None}
    return {
        "arch_class_name": kind,
        "arch_kwargs": arguments,
        "arch_kwargs_requiring_import": settings["architecture"]["_kw_requires_import"],
    }
