"""What a file of weights says about itself, as facts with names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nnunetv2_cva.transfer.card import entry
from nnunetv2_cva.transfer.read import read


@dataclass(frozen=True)
class Description:
    """``facts``: name and text, what the file does not state left out. ``plans``: of the pretraining."""

    facts: tuple[tuple[str, str], ...]
    plans: dict[str, Any]


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
        ("spacing", card.get("spacing")),
        ("normalisation", card.get("normalization_schemes")),
        ("view size", card.get("view_size")),
        ("epochs", card.get("epochs")),
        ("metrics", card.get("metrics")),
        ("settings", card.get("config")),
        ("branch", source.branch),
        ("decoder", ", ".join(source.decoder)),
        ("version", card.get("version")),
        ("exported with", card.get("exported_with")),
        ("licence", card.get("licence") or "not stated"),
        ("published", card.get("published")),
        ("started from", _text({k: v for k, v in entry(card, "started_from").items() if k != "citations"}) or None),
    ]
    citations = card.get("citations")
    facts += [("cite", _citation(c)) for c in (citations if isinstance(citations, list) else [])]
    facts += [("note", note) for note in source.notes]
    return Description(tuple((name, _text(value)) for name, value in facts if value not in (None, {}, [])), plans)


def _citation(value: Any) -> str:
    if isinstance(value, dict) and isinstance(value.get("apa_citations"), list):
        return f"{value.get('name')}: {' '.join(map(str, value['apa_citations']))}"
    return _text(value)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    return str(value)
