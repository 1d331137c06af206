"""A transfer as lines of text: by part what is carried, adapted and fresh, why, and what the two trainings differ in."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nnunetv2_cva.transfer.adapt import Row, Transfer
from nnunetv2_cva.transfer.card import entry
from nnunetv2_cva.transfer.card import settings as settings_of

ACTIONS = ("carried", "adapted", "fresh")


def table(transfer: Transfer) -> list[str]:
    """The table, a line per part, and below it the share of the encoder that is filled."""
    lines: list[tuple[str, ...]] = [("part", "parameters", *ACTIONS, "")]
    # Why the decoder starts afresh stands below the table, once.
    for name, rows in _parts(tuple(replace(r, how="") if r.how == transfer.decoder_reason else r for r in transfer.rows)):
        total = sum(r.parameters for r in rows)
        shares = [transfer.share(a, rows=rows) for a in ACTIONS] if total else [float(rows[0].action == a) for a in ACTIONS]
        lines.append((name, f"{total:,}", *map(_percent, shares), _how(rows)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [_aligned(line, widths) for line in lines]
    text.append("")
    carried, adapted = transfer.share("carried"), transfer.share("adapted")
    encoder = sum(r.parameters for r in transfer.rows if r.role == "encoder")
    text.append(
        f"Encoder: {_shown(carried + adapted):.1%} of {encoder:,} parameters come from the file "
        f"({_shown(carried):.1%} carried, {_shown(adapted):.1%} adapted)."
    )
    if any(r.role == "decoder" for r in transfer.rows):
        text.append(f"Decoder: {transfer.decoder}; {transfer.decoder_reason}. Output layer: always the target's own.")
    return text + [f"Note: {note}." for note in notes(transfer)]


def notes(transfer: Transfer) -> list[str]:
    """What a reader of the table should know beside it."""
    source = transfer.source
    found = [*source.notes, *transfer.notes]
    if transfer.unused:
        left = ", ".join(f"{part} ({size:,} parameters)" for part, size in transfer.unused)
        found.append(f"the target has no place for {left}")
    different = [d for d in source.layout.differences(transfer.target) if not d.startswith("input channels")]
    if different:
        found.append("the networks differ: " + "; ".join(different))
    if source.branch == "teacher":
        found.append("encoder of the teacher, decoder of the student: the teacher has none")
    return found


def data_warnings(card: Mapping[str, Any], settings: Mapping[str, Any], dataset_json: Mapping[str, Any]) -> list[str]:
    """Where the images that the weights have seen differ from the target's: spacing, normalisation, channel names."""
    found = []
    pairs = (
        ("spacing", card.get("spacing"), settings.get("spacing")),
        ("normalisation", card.get("normalization_schemes"), settings.get("normalization_schemes")),
        ("channel names", _names(entry(card, "dataset").get("channel_names")), _names(_channels(dataset_json))),
    )
    for name, there, here in pairs:
        if there is None and name == "spacing" and "spacing" in card and entry(card, "plans"):
            found.append(f"the images of the pretraining were not resampled; the target's have spacing {_text(here)}")
        elif there is None:
            found.append(f"the file does not state its {name}; the target's: {_text(here)}")
        elif name == "normalisation" and _same_but_in_number(there, here):
            continue  # the channels' names say that their number differs
        elif not _alike(there, here):
            found.append(f"{name} of the pretraining {_text(there)}, of the target {_text(here)}")
    return found + _other_layers(card, settings)


def _other_layers(card: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Layers without weights of their own, or with others, that make another function of the same convolutions."""
    theirs, found = settings_of(card.get("plans"), card.get("configuration")), []
    for key, what in (("norm_op", "normalisation layers"), ("nonlin", "activations")):
        there, here = (_layer(s, key) for s in (theirs, settings))
        if there and here and there != here:
            fresh = "; their running statistics start fresh" if "BatchNorm" in here else ""
            found.append(f"the {what} differ, {there} in the file, {here} in the target: the encoder is another function{fresh}")
    return found


def _layer(settings: Mapping[str, Any], key: str) -> str:
    architecture = settings.get("architecture")
    arguments = architecture.get("arch_kwargs") if isinstance(architecture, Mapping) else None
    return str(arguments.get(key) or "").rpartition(".")[2] if isinstance(arguments, Mapping) else ""


def _parts(rows: tuple[Row, ...]) -> list[tuple[str, tuple[Row, ...]]]:
    """Rows by part; neighbouring parts of one kind that fare alike are one line."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row.part, []).append(row)
    merged: list[tuple[str, tuple[Row, ...]]] = []
    for name, found in grouped.items():
        last = merged[-1] if merged else None
        kind = re.sub(r"\d+$", "", name)
        if last and kind != name and re.sub(r"\d+(-\d+)?$", "", last[0]) == kind and _fate(last[1]) == _fate(tuple(found)):
            first = re.search(r"(\d+)(-\d+)?$", last[0])
            assert first is not None
            merged[-1] = f"{kind}{first.group(1)}-{name[len(kind) :]}", (*last[1], *found)
        else:
            merged.append((name, tuple(found)))
    return merged


def _fate(rows: tuple[Row, ...]) -> tuple[frozenset[str], str]:
    return frozenset(r.action for r in rows), _how(rows)


def _how(rows: tuple[Row, ...]) -> str:
    """What was done, or why nothing was carried; at most two different reasons are spelled out."""
    said = list(dict.fromkeys(r.how for r in rows if r.how))
    return "; ".join(said[:2]) + (f"; and {len(said) - 2} more" if len(said) > 2 else "")


def _percent(share: float) -> str:
    if share in (0, 1):
        return "100%" if share else "-"
    return "<1%" if share < 0.005 else ">99%" if share >= 0.995 else f"{share:.0%}"


def _shown(share: float) -> float:
    """Rounded so that what is not everything is never shown as 100 %."""
    return share if share == 1 else min(share, 0.999)


def _aligned(cells: tuple[str, ...], widths: list[int]) -> str:
    first, *numbers, last = cells
    middle = "  ".join(c.rjust(w) for c, w in zip(numbers, widths[1:-1], strict=True))
    return f"{first.ljust(widths[0])}  {middle}  {last}".rstrip()


def _same_but_in_number(a: Any, b: Any) -> bool:
    lists = isinstance(a, (list, tuple)) and isinstance(b, (list, tuple))
    return lists and len(a) != len(b) and set(map(str, a)) == set(map(str, b))


def _channels(dataset_json: Mapping[str, Any]) -> Any:
    return dataset_json.get("channel_names") or dataset_json.get("modality")


def _names(channels: Any) -> list[str] | None:
    """In their order, as nnU-Net takes them, whatever their keys are."""
    return [str(name).lower() for name in channels.values()] if isinstance(channels, Mapping) else None


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return abs(a - b) <= 0.01 * max(abs(a), abs(b))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_alike, a, b))
    return a == b


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in value) + "]"
    return "not stated" if value is None else str(value)
