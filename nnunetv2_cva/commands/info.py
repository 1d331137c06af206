"""``nnUNetv2_cva info``: what a checkpoint is and where it comes from."""

from __future__ import annotations

import argparse
import json
from typing import Any

HELP = "Print what a checkpoint holds: network, data, plans, settings, metrics, licence, citations."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``nnUNetv2_cva info``."""
    parser.add_argument("weights", metavar="FILE", help="a checkpoint of nnunetv2_cva, nnU-Net, nnssl or OpenMind, or exported")
    parser.add_argument("--trust", action="store_true", help="open files that hold more than weights; may execute code in them")
    parser.add_argument("--plans", action="store_true", help="print the whole plans of the pretraining, too")


def run(args: argparse.Namespace) -> int:
    """Print one line per fact; what the file does not state is left out."""
    from nnunetv2_cva.transfer.card import entry
    from nnunetv2_cva.transfer.read import read

    source = read(args.weights, trust=args.trust, any_network=True)
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
    ]
    for name, value in facts:
        if value not in (None, {}, []):
            print(f"{name:14} {_text(value)}")
    citations = card.get("citations")
    for citation in citations if isinstance(citations, list) else []:
        print(f"{'cite':14} {_citation(citation)}")
    for note in source.notes:
        print(f"{'note':14} {note}")
    if args.plans:
        print(json.dumps(plans, indent=2))
    return 0


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
