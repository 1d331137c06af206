"""The parts of nnU-Net's networks, told from the names and shapes of their weights alone.

So a file of unknown origin and a network just built are described by the same code and can be compared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Role = Literal["encoder", "decoder", "output", "other"]

# A file of one may start a network of the other: the transformer is the same, the tokenizer is not.
PRIMUS = ("Primus V1", "Primus V2/V3")


@dataclass(frozen=True)
class Stage:
    """One stage of a U-Net's encoder; ``stride`` is None where neither decoder nor plans tell it."""

    features: int
    kernel: tuple[int, ...]
    blocks: int
    stride: tuple[int, ...] | None


@dataclass(frozen=True)
class Layout:
    """What the shapes say about a network. U-Nets have ``stages``, a Primus has the rest."""

    family: str
    channels: int
    stages: tuple[Stage, ...] = ()
    width: int = 0
    depth: int = 0
    tokens: int = 0  # of the position embedding, without registers; 0: it has none
    registers: int = 0
    token_size: tuple[int, ...] = ()
    tokenizer: tuple[int, ...] = ()  # widths of its stem and stages; V1 has none

    def __str__(self) -> str:
        if self == UNKNOWN:
            return self.family
        channels = f"{self.channels} input channel{'s' * (self.channels != 1)}"
        if self.stages:
            features = " ".join(str(s.features) for s in self.stages)
            blocks = " ".join(str(s.blocks) for s in self.stages)
            return f"{self.family}, {channels}, {len(self.stages)} stages, features {features}, blocks {blocks}"
        return f"{self.family}, {channels}, width {self.width}, depth {self.depth}, tokens of {by(self.token_size)} voxels"


UNKNOWN = Layout("unknown", 0)


def by(size: tuple[int, ...]) -> str:
    """``(1, 3, 3)`` -> ``1x3x3``."""
    return "x".join(map(str, size))


def layout_of(weights: Mapping[str, Tensor]) -> Layout:
    """The layout of a network's weights.

    Raises:
        ValueError: not the weights of an nnU-Net U-Net or Primus; names what they are.
    """
    try:
        if _first(weights, "down_projection.proj") is not None:
            return _primus(weights, PRIMUS[0], "down_projection.proj")
        if _first(weights, "down_projection.stem.blocks.0.conv1") is not None:
            return _primus(weights, PRIMUS[1], "down_projection.stem.blocks.0.conv1")
        if _first(weights, "encoder.stem.convs.0") is not None:
            return _unet(weights, "residual U-Net", "encoder.stem.convs.0", r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.")
        if _first(weights, "encoder.stages.0.0.convs.0") is not None:
            return _unet(weights, "plain U-Net", "encoder.stages.0.0.convs.0", r"encoder\.stages\.(\d+)\.0\.convs\.(\d+)\.")
    except (AttributeError, IndexError, KeyError):
        pass  # begins like one of them and then lacks what each of them has
    shown = ", ".join(sorted({".".join(k.split(".")[:2]) for k in weights})[:6])
    raise ValueError(
        "Unknown architecture: expected the weights of an nnU-Net U-Net (encoder.stem, encoder.stages) or of a Primus "
        f"(down_projection, eva), found {shown or 'no weights'}."
    )


def part_of(key: str, decoder_stages: int) -> tuple[str, Role]:
    """The part of the network that ``key`` belongs to, and its role. Decoder levels count from full resolution."""
    if key == "eva.pos_embed":
        return "position embedding", "encoder"
    if re.match(r"decoder\.seg_layers\.|up_projection\.decode\.\d+\.(weight|bias)$", key):
        return "output layer", "output"
    for pattern, name, role in _PARTS:
        if found := re.match(pattern, key):
            number = int(found.group(1)) if found.groups() else 0
            return name.format(number, decoder_stages - 1 - number), role
    return "rest", "other"


_PARTS: tuple[tuple[str, str, Role], ...] = (
    (r"(?:decoder\.)?encoder\.stem\.", "stem", "encoder"),
    (r"(?:decoder\.)?encoder\.stages\.(\d+)\.", "encoder stage {0}", "encoder"),
    (r"decoder\.(?:stages|transpconvs)\.(\d+)\.", "decoder level {1}", "decoder"),
    (r"down_projection\.", "tokenizer", "encoder"),
    (r"eva\.blocks\.(\d+)\.", "block {0}", "encoder"),
    (r"eva\.norm\.", "last norm", "encoder"),
    (r"register_tokens$", "register tokens", "encoder"),
    (r"up_projection\.", "decoder", "decoder"),
    (r"mask_token$", "mask token", "other"),
)


def is_input_layer(key: str) -> bool:
    """Whether the image itself may enter here: the only places where the number of input channels shows."""
    return re.match(_INPUT, key) is not None


_INPUT = (
    r"encoder\.stem\.convs\.0\.|encoder\.stages\.0\.0\.convs\.0\."  # U-Nets
    r"|down_projection\.proj\.|down_projection\.stem\.blocks\.0\.(conv1|skip)\."  # Primus V1; V2 and V3
)


def decoder_stages(keys: Mapping[str, Tensor]) -> int:
    """How many stages a U-Net's decoder has."""
    found = [int(m.group(1)) for k in keys if (m := re.match(r"decoder\.(?:stages|transpconvs)\.(\d+)\.", k))]
    return max(found, default=-1) + 1


def canonical(key: str, stages: int) -> str:
    """One name for what corresponds in two networks: the encoder's second mention dropped, decoder stages (of ``stages``)
    numbered from full resolution, the convolution of a skip (which comes after a pooling or not) without its number."""
    key = re.sub(r"^decoder\.encoder\.", "encoder.", key)
    key = re.sub(r"\.skip\.\d+\.", ".skip.", key)
    return re.sub(
        r"^decoder\.(stages|transpconvs|seg_layers)\.(\d+)\.",
        lambda m: f"decoder.{m.group(1)}.level{stages - 1 - int(m.group(2))}.",
        key,
    )


def differences(file: Layout, target: Layout) -> list[str]:
    """How the network of the file differs from the target, one short statement each."""
    found = []

    def compare(name: str, a: object, b: object) -> None:
        if a != b and a is not None and b is not None:
            shown = [by(v) if isinstance(v, tuple) else str(v) for v in (a, b)]
            found.append(f"{name}: {shown[0]} in the file, {shown[1]} in the target")

    compare("architecture", file.family, target.family)
    compare("input channels", file.channels, target.channels)
    compare("number of stages", len(file.stages), len(target.stages))
    for i, (a, b) in enumerate(zip(file.stages, target.stages, strict=False)):
        for name in ("stride", "kernel", "features", "blocks"):
            compare(f"{name}{'s' * (name == 'stride')} of stage {i}", getattr(a, name), getattr(b, name))
    for name in ("width", "depth", "registers", "token_size"):
        compare(name.replace("_", " "), getattr(file, name), getattr(target, name))
    if file.tokenizer and target.tokenizer:
        compare("widths of the tokenizer", *(" ".join(map(str, layout.tokenizer)) for layout in (file, target)))
    return found


def _first(weights: Mapping[str, Tensor], module: str) -> Tensor | None:
    """The weight of a convolution, under whichever of its names it stands."""
    for name in (".weight", ".conv.weight", ".all_modules.0.weight"):
        if module + name in weights:
            return weights[module + name]
    return None


def _need(weights: Mapping[str, Tensor], module: str) -> Tensor:
    found = _first(weights, module)
    if found is None:
        raise KeyError(module)
    return found


def _unet(weights: Mapping[str, Tensor], family: str, stem: str, pattern: str) -> Layout:
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
        if family == "plain U-Net":
            main = last = _need(weights, f"encoder.stages.{i}.0.convs.0")
        else:
            main, last = _convolutions(weights, f"encoder.stages.{i}.blocks.0")
        stages.append(Stage(last.shape[0], tuple(main.shape[2:]), len(blocks[i]), upsampling.get(i)))
    return Layout(family, _need(weights, stem).shape[1], tuple(stages))


def _convolutions(weights: Mapping[str, Tensor], block: str) -> tuple[Tensor, Tensor]:
    """Of a residual block: the convolution with its kernel, and the last one, which is another where it is a bottleneck."""
    main = _need(weights, f"{block}.conv2")
    third = _first(weights, f"{block}.conv3")
    return main, main if third is None else third


def _primus(weights: Mapping[str, Tensor], family: str, first: str) -> Layout:
    entry = _need(weights, first)
    levels = {m.group(1) for k in weights if (m := re.match(r"down_projection\.stages\.(\d+)\.", k))}
    depth = len({m.group(1) for k in weights if (m := re.match(r"eva\.blocks\.(\d+)\.", k))})
    width = weights["eva.norm.weight"].shape[0]
    registers = weights["register_tokens"].shape[1] if "register_tokens" in weights else 0
    tokens = weights["eva.pos_embed"].shape[1] - registers if "eva.pos_embed" in weights else 0
    if family == PRIMUS[0]:
        return Layout(family, entry.shape[1], (), width, depth, tokens, registers, tuple(entry.shape[2:]))
    blocks = ["stem.blocks.0", *(f"stages.{i}.blocks.0" for i in range(len(levels)))]
    widths = tuple(_convolutions(weights, f"down_projection.{block}")[1].shape[0] for block in blocks)
    return Layout(family, entry.shape[1], (), width, depth, tokens, registers, (2 ** len(levels),) * 3, widths)
