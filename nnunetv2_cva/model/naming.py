"""What the names of a network's parameters say: stated once for every family of networks, beside its backbone.

A file of unknown origin and a network just built are described by the same statement and can be compared, so that neither reading
weights nor fitting them needs to know how the network computes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, Literal, get_args

from torch import Tensor, nn

from nnunetv2_cva.sizes import by

Role = Literal["encoder", "decoder", "output", "other"]


@dataclass(frozen=True)
class Part:
    """Parameters that fare together. ``pattern``: how their names begin, in whole words between dots; ``*`` is a number, which
    ``name`` may show. ``from_end``: the number counts from the last one, as decoders are compared at full resolution.
    """

    pattern: str
    name: str
    role: Role
    from_end: bool = False


@dataclass(frozen=True)
class Stage:
    """One stage of a U-Net's encoder; ``stride`` is None where neither decoder nor plans tell it."""

    features: int
    kernel: tuple[int, ...]
    blocks: int
    stride: tuple[int, ...] | None


@dataclass(frozen=True)
class Family:
    """Networks whose parameters are named alike."""

    name: str
    parts: tuple[Part, ...]  # in the order of the data's path; the first that fits a name counts
    entrance: tuple[str, ...]  # modules that read the image: only there the number of its channels shows
    averaged: Mapping[str, str] = field(default_factory=dict)  # what the teacher copies: name there, name in the network
    second_names: Mapping[str, str] = field(default_factory=dict)  # beginnings of names under which a part is held once more
    kin: str = ""  # weights of families of one kin may fill each other; empty: of this one only
    first: str = "input layers"  # the part, or else the entrance, that makes the first features from the image
    own_decoder: bool = False  # pretraining reconstructs through heads: the network's decoder is never trained
    position: str | None = None  # the parameter with a position for every token
    citation: str | None = None
    layout: Callable[[Mapping[str, Tensor], Family], Layout] | None = None  # None: the number of channels is all that is told

    def modules(self, network: nn.Module) -> dict[str, nn.Module]:
        """The modules of ``network`` that the teacher has a copy of; a parameter that stands by itself as a list of one."""
        found: dict[str, nn.Module] = {}
        for name, path in self.averaged.items():
            holder, _, last = path.rpartition(".")
            member = getattr(network.get_submodule(holder), last)
            if member is not None:
                found[name] = nn.ParameterList([member]) if isinstance(member, nn.Parameter) else member
        return found

    def describe(self, weights: Mapping[str, Tensor]) -> Layout:
        """Raises KeyError when ``weights`` lack what every network of the family has."""
        if self.layout is not None:
            return self.layout(weights, self)
        return Layout(self, need(weights, self.entrance[0]).shape[1])

    def stated(self) -> dict[str, Any]:
        """As plain types, for a checkpoint: whoever reads it need not have the code of the network."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layout"}
        parts = [[p.pattern, p.name, p.role, p.from_end] for p in self.parts]
        dicts = {k: dict(v) for k, v in plain.items() if isinstance(v, Mapping)}
        return {**plain, **dicts, "parts": parts, "entrance": list(self.entrance)}

    @classmethod
    def from_stated(cls, stated: Any) -> Family | None:
        """What ``stated`` has written; None for anything else. Patterns know words and numbers only."""
        try:
            parts = tuple(Part(*part) for part in stated["parts"])
            found = cls(**{**stated, "parts": parts, "entrance": tuple(stated["entrance"])})
            texts = [found.name, found.kin, found.first, *found.entrance]
            texts += [t for pairs in (found.averaged.items(), found.second_names.items()) for pair in pairs for t in pair]
            texts += [t for p in parts for t in (p.pattern, p.name)]
            sound = found.layout is None and found.entrance and all(isinstance(t, str) for t in texts)
            sound = sound and all(p.role in get_args(Role) and isinstance(p.from_end, bool) for p in parts)
            sound = sound and all(isinstance(t, (str, type(None))) for t in (found.position, found.citation))
        except (TypeError, KeyError, AttributeError, ValueError):
            return None
        return found if sound else None


@dataclass(frozen=True)
class Layout:
    """What the shapes say about a network. U-Nets have ``stages``, a Primus has the rest."""

    family: Family
    channels: int
    stages: tuple[Stage, ...] = ()
    width: int = 0
    depth: int = 0
    tokens: int = 0  # of the position embedding, without registers; 0: it has none
    registers: int = 0
    token_size: tuple[int, ...] = ()
    tokenizer: tuple[int, ...] = ()  # widths of its stem and stages; Primus V1 has none

    def __str__(self) -> str:
        if self.family == UNKNOWN.family:
            return self.family.name
        start = f"{self.family.name}, {self.channels} input channel{'s' * (self.channels != 1)}"
        if self.stages:
            features = " ".join(str(s.features) for s in self.stages)
            blocks = " ".join(str(s.blocks) for s in self.stages)
            return f"{start}, {len(self.stages)} stages, features {features}, blocks {blocks}"
        if self.width:
            return f"{start}, width {self.width}, depth {self.depth}, tokens of {by(self.token_size)} voxels"
        return start

    def differences(self, target: Layout) -> list[str]:
        """How this network, of a file, differs from a target's, one short statement each."""
        found = []

        def compare(name: str, a: object, b: object) -> None:
            if a != b and a is not None and b is not None:
                shown = [by(v) if isinstance(v, tuple) else str(v) for v in (a, b)]
                found.append(f"{name}: {shown[0]} in the file, {shown[1]} in the target")

        compare("architecture", self.family.name, target.family.name)
        compare("input channels", self.channels, target.channels)
        compare("number of stages", len(self.stages), len(target.stages))
        for i, (a, b) in enumerate(zip(self.stages, target.stages, strict=False)):
            for name in ("stride", "kernel", "features", "blocks"):
                compare(f"{name}{'s' * (name == 'stride')} of stage {i}", getattr(a, name), getattr(b, name))
        for name in ("width", "depth", "registers", "token_size"):
            compare(name.replace("_", " "), getattr(self, name), getattr(target, name))
        if self.tokenizer and target.tokenizer:
            compare("widths of the tokenizer", *(" ".join(map(str, layout.tokenizer)) for layout in (self, target)))
        return found


UNKNOWN = Layout(Family("unknown", (), ()), 0)


class Names:
    """A family's parts, among the names of one network."""

    def __init__(self, family: Family, keys: Iterable[str]) -> None:
        self.family = family
        self._counts = dict.fromkeys((p.pattern for p in family.parts), 0)
        for key in keys:
            number, part = self._found(key)
            if part is not None:
                self._counts[part.pattern] = max(self._counts[part.pattern], number + 1)

    def part(self, key: str) -> tuple[str, Role]:
        """What tables call the part that ``key`` belongs to, and its role."""
        number, part = self._found(key)
        if part is None:
            return "rest", "other"
        number = self._counts[part.pattern] - 1 - number if part.from_end else number
        return part.name.replace("{}", str(number)), part.role

    def order(self, key: str) -> tuple[int, int]:
        """Encoder before decoder before output; within them as the family lists them."""
        _, part = self._found(key)
        if part is None:
            return len(get_args(Role)), 0
        return get_args(Role).index(part.role), self.family.parts.index(part)

    def canonical(self, key: str) -> str:
        """One name for what corresponds in two networks: second names replaced, numbers from the end where they count from there,
        the convolution of a residual block's skip (which comes after a pooling or not) without its number."""
        key = re.sub(r"\.skip\.\d+\.", ".skip.", self._first_name(key))
        number, part = self._found(key)
        if part is None or not part.from_end:
            return key
        at = part.pattern.split(".").index("*")
        words = key.split(".")
        words[at] = f"level{self._counts[part.pattern] - 1 - number}"
        return ".".join(words)

    def enters(self, key: str) -> bool:
        """Whether the image itself may enter here."""
        return any(key.startswith(f"{module}.") for module in self.family.entrance)

    def _first_name(self, key: str) -> str:
        for second, first in self.family.second_names.items():
            if key.startswith(f"{second}."):
                return first + key[len(second) :]
        return key

    def _found(self, key: str) -> tuple[int, Part | None]:
        key = self._first_name(key)
        for part in self.family.parts:
            if hit := _expression(part.pattern).match(key):
                return int(hit.group(1)) if hit.groups() else 0, part
        return 0, None


@lru_cache(maxsize=256)
def _expression(pattern: str) -> re.Pattern[str]:
    words = [r"(\d{1,9})" if word == "*" else re.escape(word) for word in pattern.split(".")]
    return re.compile(r"\.".join(words) + r"(?:\.|$)", re.ASCII)


def first_of(weights: Mapping[str, Tensor], module: str) -> Tensor | None:
    """The weight of a convolution, under whichever of its names it stands."""
    for name in (".weight", ".conv.weight", ".all_modules.0.weight"):
        if module + name in weights:
            return weights[module + name]
    return None


def need(weights: Mapping[str, Tensor], module: str) -> Tensor:
    """Raises KeyError where ``first_of`` finds none."""
    found = first_of(weights, module)
    if found is None:
        raise KeyError(module)
    return found
