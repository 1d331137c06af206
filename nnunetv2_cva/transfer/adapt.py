"""Fill a network with weights that were made for another one: what is carried, what is adapted and how, what starts afresh."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from nnunetv2_cva.model.families import layout_of
from nnunetv2_cva.model.naming import Layout, Names, Role
from nnunetv2_cva.sizes import by
from nnunetv2_cva.transfer.read import Source
from nnunetv2_cva.transfer.renaming import same
from nnunetv2_cva.transfer.resize import resized, token_grid
from nnunetv2_cva.transfer.weights import NeedsOption

Action = Literal["carried", "adapted", "fresh"]

ENOUGH = 0.9  # of the encoder's parameters, and of what makes its first features from the image


@dataclass(frozen=True)
class Row:
    """One tensor of the target, under all of its names. ``value`` is None where the target's own stays."""

    keys: tuple[str, ...]
    part: str
    role: Role
    action: Action
    how: str  # of what is adapted; why something is fresh
    parameters: int
    value: Tensor | None
    enters: bool = False  # whether it reads the image


@dataclass(frozen=True)
class Transfer:
    """What happens to every tensor of a target, decided before anything is changed."""

    source: Source
    target: Layout
    rows: tuple[Row, ...]
    decoder: str  # keep or fresh
    decoder_reason: str
    unused: tuple[tuple[str, int], ...]  # parts of the file's encoder that the target has no place for, parameters
    notes: tuple[str, ...] = ()  # what had to be assumed

    def share(self, *actions: str, rows: tuple[Row, ...] | None = None) -> float:
        """How many of the encoder's parameters (or of ``rows``) are carried, adapted, fresh."""
        rows = tuple(r for r in self.rows if r.role == "encoder") if rows is None else rows
        total = sum(r.parameters for r in rows)
        return sum(r.parameters for r in rows if r.action in actions) / total if total else 0.0

    def refusal(self) -> str | None:
        """Why these weights should not go into this target, or None."""
        family = self.target.family
        entrance = tuple(r for r in self.rows if r.part == family.first or r.enters)
        filled, first = self.share("carried", "adapted"), self.share("carried", "adapted", rows=entrance)
        if min(filled, first) >= ENOUGH:
            return None
        what = f"only {filled:.0%} of the target's encoder" if filled < ENOUGH else f"only {first:.0%} of its {family.first}"
        causes = "; ".join(self.source.layout.differences(self.target)) or "the weights differ in shape or name"
        return f"{self.source.path} fills {what} ({causes})"


class OtherFamily(ValueError):
    """The file holds a network of another kind than the target's."""


def match(
    source: Source,
    network: nn.Module,
    view: tuple[int, ...],
    decoder: str | None = None,
    source_view: tuple[int, ...] | None = None,
    images: Sequence[bool] | None = None,
) -> Transfer:
    """Decide about every tensor of ``network``, which was built for ``view``; nothing is changed yet.

    ``decoder``: "keep" or "fresh", None: what the source says. The output layer is always the target's own.
    ``source_view``: the extent the file's network was built for, where the file does not say it.
    ``images``: which of the target's input channels are images; None: all.

    Raises:
        OtherFamily: of another kind than the target.
        ValueError: a stale alias in the file, or a position embedding of unknown grid.
    """
    state = network.state_dict(keep_vars=True)
    target = layout_of(state, source.layout.family)
    _check_family(source, target)
    chosen, reason = (decoder, "chosen") if decoder else source.decoder
    assert chosen in ("keep", "fresh")
    found = _Found(source)
    transposed = {id(m.weight) for m in network.modules() if isinstance(m, nn.modules.conv._ConvTransposeNd)}
    trained = {id(p) for p in network.parameters()}
    names = Names(target.family, state)
    rows, notes = [], []
    for keys, tensor in sorted(_groups(state), key=lambda group: names.order(group[0][0])):
        part, role = names.part(keys[0])
        enters = any(map(names.enters, keys))
        value, how = found.take({names.canonical(k) for k in keys}), ""
        if role == "output":
            value, how = None, "always the target's own"
        elif role == "decoder" and chosen == "fresh":
            value, how = None, reason
        elif value is None:
            how = "not in the file"
        elif target.family.position in keys and value.shape[2] == tensor.shape[2]:
            grids, assumed = _grids(source, target, view, source_view)
            notes += assumed
            value, how = token_grid(value, *grids, registers=(source.layout.registers, target.registers))
        else:
            value, how = resized(value, tuple(tensor.shape), id(tensor) in transposed, enters, images)
        action: Action = "fresh" if value is None else "adapted" if how else "carried"
        parameters = tensor.numel() if id(tensor) in trained else 0
        rows.append(Row(keys, part, role, action, how, parameters, value, enters))
    if found.converted:
        notes.append(
            f"{found.converted} tensors of the file differ under their two names; taken is what the layer executes (all_modules)"
        )
    if chosen == "keep" and not any(r.role == "decoder" and r.value is not None for r in rows):
        there = any(r.role == "decoder" and r.how != "not in the file" for r in rows)
        chosen, reason = "fresh", "none of the file's fits" if there else "the file has none"
    return Transfer(source, target, tuple(rows), chosen, reason, found.unused(), tuple(notes))


def fill(network: nn.Module, transfer: Transfer) -> None:
    """Write the decided values into ``network``. Every tensor is written once, by storage, so all of its names agree.

    Raises:
        ValueError: nothing of the encoder would be filled.
    """
    if not any(r.role == "encoder" and r.value is not None for r in transfer.rows):
        raise ValueError(f"{transfer.source.path} fills nothing of the target's encoder: {transfer.refusal()}")
    state = network.state_dict(keep_vars=True)
    with torch.no_grad():
        for row in transfer.rows:
            if row.value is not None:
                state[row.keys[0]].copy_(row.value)


def stock_obstacle(source: Source, network: nn.Module) -> str | None:
    """Why nnU-Net's own loader would not take the file for ``network`` as it is, or None."""
    if source.obstacle is not None:
        return source.obstacle
    for key, tensor in network.state_dict().items():
        if ".seg_layers." in key:  # nnU-Net's loader asks for everything else
            continue
        if key not in source.weights:
            return f"{key} is missing"
        if source.weights[key].shape != tensor.shape:
            return f"{key} has shape {by(source.weights[key].shape)}, the target's {by(tensor.shape)}"
    return None


def _groups(state: dict[str, Tensor]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """The tensors of a network, each with every name it has."""
    groups: dict[int, list[str]] = {}
    for key, tensor in state.items():
        groups.setdefault(id(tensor), []).append(key)
    for keys in groups.values():
        yield tuple(keys), state[keys[0]]


class _Found:
    """The file's tensors by canonical name, and which of them have been taken."""

    def __init__(self, source: Source) -> None:
        self.path = source.path
        self.converted = 0  # layers whose two names are two tensors
        names = Names(source.layout.family, source.weights)
        self.named: dict[str, list[tuple[str, Tensor]]] = {}
        self.sizes: dict[str, tuple[str, int]] = {}
        for key, value in source.weights.items():
            name = names.canonical(key)
            self.named.setdefault(name, []).append((key, value))
            part, role = names.part(key)
            if role == "encoder" and ".all_modules." not in name:
                self.sizes[name] = part, value.numel()

    def take(self, names: set[str]) -> Tensor | None:
        """The one tensor that stands under ``names``. Where a layer and its second name in ``all_modules`` are two tensors, as
        in networks whose layers were converted one by one, it is the second: that is what is executed.

        Raises:
            ValueError: there are several, and it is not known which of them the network executes.
        """
        hits = [hit for name in sorted(names) for hit in self.named.get(name, ())]
        for name in names:
            self.sizes.pop(name, None)
        if not hits:
            return None
        executed = [hit for hit in hits if ".all_modules." in hit[0]] or hits
        first_key, first = executed[0]
        for key, value in executed[1:]:
            if not same(value, first):
                raise ValueError(
                    f"{self.path} holds two versions of one layer: {first_key} and {key} must be the same tensor and differ. "
                    "Whatever wrote this file has updated only one of them; remove the stale keys from it."
                )
        self.converted += any(not same(value, first) for _, value in hits)
        return first

    def unused(self) -> tuple[tuple[str, int], ...]:
        totals: dict[str, int] = {}
        for part, size in self.sizes.values():
            totals[part] = totals.get(part, 0) + size
        return tuple(totals.items())


def _check_family(source: Source, target: Layout) -> None:
    ours, theirs = source.layout.family, target.family
    if ours != theirs and not (ours.kin and ours.kin == theirs.kin):
        found = f"{source.path} holds a {ours.name}, the target is a {theirs.name}"
        raise OtherFamily(f"{found}: nothing of one fits into the other.")


def _grids(
    source: Source, target: Layout, view: tuple[int, ...], given: tuple[int, ...] | None
) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], list[str]]:
    """The grids of tokens that the position embeddings of file and target belong to; and what was assumed about them."""
    there = tuple(n // s for n, s in zip(view, target.token_size, strict=True))
    assert math.prod(there) == target.tokens, "the network was built for this view"
    tokens = source.layout.tokens
    for size in (given, source.view):
        if size is None or len(size) != 3:
            continue
        here = tuple(n // s for n, s in zip(size, source.layout.token_size, strict=True))
        if math.prod(here) == tokens:
            return (here, there), []
        if size is given:
            raise ValueError(f"A patch size of {by(size)} has {by(here)} tokens, but {source.path} holds {tokens}.")
    edge = round(tokens ** (1 / 3))
    for guess, reason in ((there, "the target's"), ((edge,) * 3, "a cube")):
        if math.prod(guess) == tokens:
            said = f"the file does not say what grid its {tokens} tokens form: taken for {reason}, {by(guess)}"
            return (guess, there), [said]
    raise NeedsOption(
        f"{source.path} does not say what patch size its position embedding of {tokens} tokens was made for.", "source_view"
    )
