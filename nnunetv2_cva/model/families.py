"""The families of networks that nnU-Net builds, as data: U-Nets with plain and residual encoders, and Primus.

Beside this, nothing in the package knows the names of their parameters; ``unet.py`` and ``primus.py`` compute with them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from nnunetv2_cva.model.naming import Family, Layout, Part, Stage, first_of, need


def layout_of(weights: Mapping[str, Tensor], stated: Family | None = None) -> Layout:
    """The layout of a network's weights. ``stated``: a family that goes before those of this module, if it fits.

    Raises:
        ValueError: of no known family; names what they are.
    """
    candidates = (stated, *FAMILIES) if stated is not None and stated.name not in {f.name for f in FAMILIES} else FAMILIES
    for family in candidates:
        try:
            if family is not None and first_of(weights, family.entrance[0]) is not None:
                return family.describe(weights)
        except (AttributeError, IndexError, KeyError):
            break  # begins like one of them and then lacks what each of them has
    shown = ", ".join(sorted({".".join(k.split(".")[:2]) for k in weights})[:6])
    raise ValueError(
        "Unknown architecture: expected the weights of an nnU-Net U-Net (encoder.stem, encoder.stages) or of a Primus "
        f"(down_projection, eva), found {shown or 'no weights'}."
    )


def _unet(weights: Mapping[str, Tensor], family: Family) -> Layout:
    residual = family is RESIDUAL
    pattern = r"encoder\.stages\.(\d+)\.blocks\.(\d+)\." if residual else r"encoder\.stages\.(\d+)\.0\.convs\.(\d+)\."
    blocks: dict[int, set[int]] = {}
    for key in weights:
        if found := re.match(pattern, key):
            blocks.setdefault(int(found.group(1)), set()).add(int(found.group(2)))
    upsampling = {
        len(blocks) - 1 - int(m.group(1)): tuple(w.shape[2:])
        for k, w in weights.items()
        if (m := re.match(r"decoder\.transpconvs\.(\d+)\.weight$", k))
    }
    stages = []
    for i in range(len(blocks)):
        if residual:
            main, last = _convolutions(weights, f"encoder.stages.{i}.blocks.0")
        else:
            main = last = need(weights, f"encoder.stages.{i}.0.convs.0")
        stages.append(Stage(last.shape[0], tuple(main.shape[2:]), len(blocks[i]), upsampling.get(i)))
    return Layout(family, need(weights, family.entrance[0]).shape[1], tuple(stages))


def _convolutions(weights: Mapping[str, Tensor], block: str) -> tuple[Tensor, Tensor]:
    """Of a residual block: the convolution with its kernel, and the last one, which is another where it is a bottleneck."""
    main = need(weights, f"{block}.conv2")
    third = first_of(weights, f"{block}.conv3")
    return main, main if third is None else third


def _primus(weights: Mapping[str, Tensor], family: Family) -> Layout:
    entry = need(weights, family.entrance[0])
    levels = {m.group(1) for k in weights if (m := re.match(r"down_projection\.stages\.(\d+)\.", k))}
    depth = len({m.group(1) for k in weights if (m := re.match(r"eva\.blocks\.(\d+)\.", k))})
    width = weights["eva.norm.weight"].shape[0]
    registers = weights["register_tokens"].shape[1] if "register_tokens" in weights else 0
    tokens = weights["eva.pos_embed"].shape[1] - registers if "eva.pos_embed" in weights else 0
    if family is PRIMUS_V1:
        return Layout(family, entry.shape[1], (), width, depth, tokens, registers, tuple(entry.shape[2:]))
    blocks = ["stem.blocks.0", *(f"stages.{i}.blocks.0" for i in range(len(levels)))]
    widths = tuple(_convolutions(weights, f"down_projection.{block}")[1].shape[0] for block in blocks)
    return Layout(family, entry.shape[1], (), width, depth, tokens, registers, (2 ** len(levels),) * 3, widths)


_UNET_PARTS = (
    Part("encoder.stem", "stem", "encoder"),
    Part("encoder.stages.*", "encoder stage {}", "encoder"),
    Part("decoder.stages.*", "decoder level {}", "decoder", from_end=True),
    Part("decoder.transpconvs.*", "decoder level {}", "decoder", from_end=True),
    Part("decoder.seg_layers.*", "output layer", "output"),
)
_PRIMUS_PARTS = (
    Part("down_projection", "tokenizer", "encoder"),
    Part("register_tokens", "register tokens", "encoder"),
    Part("eva.pos_embed", "position embedding", "encoder"),
    Part("eva.blocks.*", "block {}", "encoder"),
    Part("eva.norm", "last norm", "encoder"),
    Part("up_projection.decode.*.weight", "output layer", "output"),  # the last one: those before it are sequences
    Part("up_projection.decode.*.bias", "output layer", "output"),
    Part("up_projection", "decoder", "decoder"),
    Part("mask_token", "mask token", "other"),
)
RESIDUAL = Family(
    name="residual U-Net",
    parts=_UNET_PARTS,
    entrance=("encoder.stem.convs.0",),
    averaged={"encoder": "encoder"},
    second_names={"decoder.encoder": "encoder"},
    citation="Residual Encoder U-Net",
    layout=_unet,
)
PLAIN = Family(
    name="plain U-Net",
    parts=_UNET_PARTS,
    entrance=("encoder.stages.0.0.convs.0",),
    averaged={"encoder": "encoder"},
    second_names={"decoder.encoder": "encoder"},
    layout=_unet,
)
_AVERAGED = {"tokenizer": "down_projection", "eva": "eva", "registers": "register_tokens"}
PRIMUS_V1 = Family(
    name="Primus V1",
    parts=_PRIMUS_PARTS,
    entrance=("down_projection.proj",),
    averaged=_AVERAGED,
    kin="Primus",  # the transformer is the same, the tokenizer is not
    first="tokenizer",
    own_decoder=True,
    position="eva.pos_embed",
    citation="Primus",
    layout=_primus,
)
PRIMUS_V2_V3 = Family(
    name="Primus V2/V3",
    parts=_PRIMUS_PARTS,
    entrance=("down_projection.stem.blocks.0.conv1", "down_projection.stem.blocks.0.skip"),
    averaged=_AVERAGED,
    kin="Primus",
    first="tokenizer",
    own_decoder=True,
    position="eva.pos_embed",
    citation="Primus",
    layout=_primus,
)
FAMILIES = (PRIMUS_V1, PRIMUS_V2_V3, RESIDUAL, PLAIN)
