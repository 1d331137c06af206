"""Where weights come from, as plain types: what every exported file carries and ``nnUNetv2_cva info`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_cva import __version__, nnunet
from nnunetv2_cva.model.naming import Family
from nnunetv2_cva.transfer.licence import chosen, terms

NO_RESAMPLING = "no_resampling_hack"  # nnU-Net's name for leaving images at their spacing
CITATIONS = {
    "Consistent View Alignment": "Vaish, P., et al. (2025). Consistent View Alignment Improves Foundation Models for 3D Medical "
    "Image Segmentation. arXiv preprint arXiv:2509.13846.",
    "nnU-Net": "Isensee, F., Jaeger, P. F., Kohl, S. A., Petersen, J., & Maier-Hein, K. H. (2021). nnU-Net: a self-configuring "
    "method for deep learning-based biomedical image segmentation. Nature methods, 18(2), 203-211.",
    "Residual Encoder U-Net": "Isensee, F., Wald, T., Ulrich, C., Baumgartner, M., Roy, S., Maier-Hein, K., & Jaeger, P. F. "
    "(2024). nnU-Net Revisited: A Call for Rigorous Validation in 3D Medical Image Segmentation. arXiv preprint "
    "arXiv:2404.09556.",
    "Primus": "Wald, T., Roy, S., Isensee, F., Ulrich, C., Ziegler, S., Trofimova, D., et al. (2025). Primus: Enforcing "
    "Attention Usage for 3D Medical Image Segmentation. arXiv preprint arXiv:2503.01835.",
}


def plain(value: Any) -> Any:
    """``value`` with lists instead of tuples, Python numbers instead of NumPy's, and text instead of anything else."""
    if isinstance(value, Mapping):
        return {k if isinstance(k, (str, int)) else str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(v) for v in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def entry(holder: Any, *names: str) -> dict[str, Any]:
    """What stands in ``holder`` under ``names``, one within the other; empty where there is none, or no dictionary.

    Files of others may lack anything or hold something else in its place: that is then not stated, and no reason to refuse them.
    """
    for name in names:
        holder = holder.get(name) if isinstance(holder, Mapping) else None
    return dict(holder) if isinstance(holder, Mapping) else {}


def settings(plans: Any, name: Any) -> dict[str, Any]:
    """A configuration of a plans file with what it inherits; empty where the plans of a file have no such configuration."""
    if not isinstance(plans, Mapping) or not isinstance(name, str):
        return {}
    try:
        return nnunet.configuration(plans, name, resampled=False)
    except ValueError:
        return {}


def from_training(
    content: Mapping[str, Any], plans: dict[str, Any] | None, configuration: str | None, dataset_json: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The card of a checkpoint that a trainer of ours or of nnU-Net has written."""
    ours = entry(content, "cva")
    history = ours.get("history")
    metrics = {k: v[-1] for k, v in entry(content, "logging").items() if isinstance(v, list) and v}
    card: dict[str, Any] = {
        "trainer": content.get("trainer_name"),
        "version": f"nnunetv2_cva {ours['version']}" if "version" in ours else None,
        "epochs": content.get("current_epoch"),
        "metrics": history[-1] if isinstance(history, list) and history else metrics,
        "config": ours.get("config"),
        "plans": plans,
        "configuration": configuration,
        "fold": entry(content, "init_args").get("fold"),
        "family": ours.get("family"),
    }
    if found := settings(plans, configuration):
        card["spacing"] = None if found.get("resampling_fn_data") == NO_RESAMPLING else found.get("spacing")
        card["normalization_schemes"] = found.get("normalization_schemes")
        card["view_size"] = found.get("patch_size")
    data = dataset_json or {}
    card["dataset"] = {
        "name": (plans or {}).get("dataset_name") or data.get("name"),
        "cases": data.get("numTraining"),
        "channel_names": data.get("channel_names") or data.get("modality"),
        "reference": data.get("reference"),
    }
    card["licence"] = data.get("licence") or data.get("license")
    named = entry(_without_paths(ours.get("config"))).get("init_from")  # all that old checkpoints say of their start
    started = entry(ours, "started_from") or ({"file": named} if named else {})
    if started:  # what is made of weights inherits their terms, whatever the images are under
        card["started_from"] = started
        inherited = started.get("licence")
        if isinstance(inherited, str) and (card["licence"] is None or terms(inherited) - terms(str(card["licence"]))):
            card["licence"] = inherited
        card["citations"] = _cited(card, started.get("citations"))
    return plain(card)


def inheritance(card: Mapping[str, Any], file: str) -> dict[str, Any]:
    """What a training that starts from the weights of ``card`` has to remember of them."""
    kept = {k: card[k] for k in ("fold", "licence", "published", "trainer", "started_from") if card.get(k) not in (None, "", {})}
    cited = _cited(card, None)
    return plain({"file": file, "dataset": entry(card, "dataset").get("name"), **kept, **({"citations": cited} if cited else {})})


def _without_paths(config: Any) -> Any:
    """Settings as others may see them: of a file that was started from its name, not where it lay."""
    started = config.get("init_from") if isinstance(config, Mapping) else None
    if not isinstance(started, str) or started.startswith("hf://"):
        return config
    return {**config, "init_from": Path(started).name}


def _cited(card: Mapping[str, Any], more: Any) -> list[dict[str, Any]]:
    """The citations of a card, its dataset's reference among them, and ``more``; each once."""
    data, found = entry(card, "dataset"), card.get("citations")
    known = list(found) if isinstance(found, list) else []
    if data.get("reference"):
        known.append({"type": "Dataset", "name": data.get("name"), "apa_citations": [data["reference"]]})
    for citation in more if isinstance(more, list) else []:
        if citation not in known:
            known.append(citation)
    return known


def from_nnssl(content: Mapping[str, Any]) -> dict[str, Any]:
    """The card of a checkpoint of nnssl, OpenMind or the SSL3D challenge."""
    adaptation = entry(content, "nnssl_adaptation_plan")
    plan = entry(adaptation, "pretrain_plan")
    name = next(iter(entry(plan, "configurations")), None)
    found = entry(plan, "configurations", str(name))
    return plain(
        {
            "trainer": content.get("trainer_name"),
            "plans": plan,
            "configuration": name,
            "spacing": found.get("spacing"),
            "normalization_schemes": found.get("normalization_schemes"),
            "view_size": adaptation.get("pretrain_patch_size")
            or found.get("patch_size")
            or adaptation.get("recommended_downstream_patchsize"),
            "dataset": {"name": plan.get("dataset_name")},
            "citations": content.get("citations"),
        }
    )


def completed(card: Mapping[str, Any], family: Family, branch: str, file: Path, licence: str | None) -> dict[str, Any]:
    """The card as an exported file carries it: which weights of which file, under which licence, what to cite."""
    methods = ["nnU-Net"]
    if card.get("config") is not None:
        methods.insert(0, "Consistent View Alignment")
    methods += [family.citation] if family.citation in CITATIONS else []
    known: list[dict[str, Any]] = [{"type": "Method", "name": m, "apa_citations": [CITATIONS[m]]} for m in methods]
    stated = card.get("citations") if card.get("config") is None else None
    found = stated or _cited({"citations": known, "dataset": card.get("dataset")}, card.get("citations"))
    return plain(
        {
            **card,
            "branch": branch,
            "file": file.name,
            "config": _without_paths(card.get("config")),
            "licence": chosen(licence, card.get("licence"), file),
            "citations": found,
            "exported_with": f"nnunetv2_cva {__version__}",
        }
    )
