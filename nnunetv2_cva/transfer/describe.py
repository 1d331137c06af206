"""What a file of weights says about itself, as facts with names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nnunetv2_cva.model.naming import UNKNOWN, Names
from nnunetv2_cva.transfer.card import entry, plain
from nnunetv2_cva.transfer.licence import NOT_STATED
from nnunetv2_cva.transfer.read import Source, read

# What has a line of its own, is said elsewhere, or is long: the plans, and the family of the network.
_SAID = {"trainer", "configuration", "spacing", "normalization_schemes", "view_size", "epochs", "metrics", "config", "branch"}
_SAID |= {"version", "exported_with", "licence", "citations", "dataset", "plans", "family"}


@dataclass(frozen=True)
class Description:
    """``facts``: name and text, what the file does not state left out. ``everything``: the whole card and what was found."""

    facts: tuple[tuple[str, str], ...]
    everything: dict[str, Any]

    @property
    def plans(self) -> dict[str, Any]:
        """Of the pretraining."""
        return entry(self.everything, "card", "plans")


def describe(file: str, trust: bool = False) -> Description:
    """The facts about ``file``.

    Raises:
        ValueError: as ``read``, but any network will do.
    """
    source = read(file, trust=trust, any_network=True)
    card = source.card
    plans, data = entry(card, "plans"), entry(card, "dataset")
    facts: list[tuple[str, Any]] = [
        ("file", f"{source.path}, {source.kind}"),
        ("network", source.layout),
        ("trainer", card.get("trainer")),
        ("made for", f"{source.plans.get('dataset_name')}, {source.configuration}" if source.plans else None),
        ("pretrained on", data.get("name")),
        ("cases", data.get("cases")),
        ("channels", data.get("channel_names")),
        ("plans", plans.get("plans_name")),
        ("configuration", card.get("configuration")),
        ("spacing", card.get("spacing") or ("not resampled" if "spacing" in card and plans else None)),
        ("normalisation", card.get("normalization_schemes")),
        ("view size", card.get("view_size")),
        ("epochs", card.get("epochs")),
        ("metrics", card.get("metrics")),
        ("settings", card.get("config")),
        ("branch", source.branch),
        ("decoder", ", ".join(source.decoder) if _has_decoder(source) else "none in the file"),
        ("version", card.get("version")),
        ("exported with", card.get("exported_with")),
        ("licence", card.get("licence") or NOT_STATED),
    ]
    # Whatever else the card holds: nothing in it is kept from its reader.
    others = {**card, "started_from": {k: v for k, v in entry(card, "started_from").items() if k != "citations"}}
    facts += [(name.replace("_", " "), value) for name, value in others.items() if name not in _SAID]
    citations = card.get("citations")
    facts += [("cite", _citation(c)) for c in (citations if isinstance(citations, list) else [])]
    facts += [("note", note) for note in source.notes]
    said = tuple((name, _text(value)) for name, value in facts if value not in (None, {}, []))
    everything = {
        "file": str(source.path),
        "kind": source.kind,
        "network": str(source.layout),
        "builder": source.builder,
        "parameters": sum(v.numel() for v in _once(source.weights)),
        "decoder": list(source.decoder),
        "notes": list(source.notes),
        "card": plain(card),
    }
    return Description(said, everything)


def _has_decoder(source: Source) -> bool:
    names = Names(source.layout.family, source.weights)
    return source.layout.family == UNKNOWN.family or any(names.part(key)[1] == "decoder" for key in source.weights)


def _once(weights: Mapping[str, Tensor]) -> list[Tensor]:
    """Tensors without their second names."""
    return list({(w.data_ptr(), w.shape): w for w in weights.values()}.values())


def _citation(value: Any) -> str:
    texts = (value.get("apa_citations") or value.get("bibtex_citations")) if isinstance(value, dict) else None
    return f"{value.get('name')}: {' '.join(map(str, texts))}" if isinstance(texts, list) else _text(value)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    return str(value)
