"""A folder as one uploads it to the Hugging Face hub: weights in two formats, how they were made, and a model card."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nnunetv2_cva import __version__
from nnunetv2_cva.files import write_json, write_text
from nnunetv2_cva.sizes import by
from nnunetv2_cva.transfer.adapt import Transfer
from nnunetv2_cva.transfer.card import completed, entry
from nnunetv2_cva.transfer.licence import NOT_STATED, reminders
from nnunetv2_cva.transfer.nnssl import adaptation_plan
from nnunetv2_cva.transfer.read import read
from nnunetv2_cva.transfer.target import Target
from nnunetv2_cva.transfer.weights import save_whole, to_safetensors

CURVES = "progress.png"  # beside the checkpoint
_HUB_LICENCES: tuple[str, ...] = ("apache-2.0", "mit", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nd-4.0")
_HUB_LICENCES += ("cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0")


def write_hub_folder(
    folder: str | Path, network: nn.Module, transfer: Transfer, target: Target, licence: str | None = None
) -> list[str]:
    """Write ``folder``, which must not exist or be empty; returns what was written, a line each. It appears as a whole.

    Nothing of single cases is in it: no names of patients or files, no voxels.

    Raises:
        ValueError: the folder holds something, cannot be written, or does not come back the same.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder. Choose another name.")
    source = transfer.source
    fresh = {k for r in transfer.rows if r.action == "fresh" for k in r.keys}
    weights = {k: v for k, v in network.state_dict().items() if k not in fresh}
    card = completed(source.card, source.layout.family, source.branch, source.path, licence)
    try:
        plan: dict[str, Any] | None = adaptation_plan(network, target, transfer.target.channels)
        note = ""
    except ValueError as e:
        plan, note = None, str(e)
    content = {
        "network_weights": weights,
        "trainer_name": str(card.get("trainer")),
        "citations": card["citations"],
        "pretraining": card,
    }
    described = {} if plan is None else {"nnssl_adaptation_plan": plan}
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as made:
            part = Path(made) / "folder"
            part.mkdir()
            save_whole({**content, **described}, part / "checkpoint_final.pth")
            to_safetensors(weights, part / "model.safetensors")
            write_json(part / "config.json", {"nnunetv2_cva": __version__, "pretraining": card})
            if plan is not None:
                write_json(part / "adaptation_plan.json", plan)
            if (source.path.parent / CURVES).is_file():
                shutil.copyfile(source.path.parent / CURVES, part / CURVES)
            curves = (part / CURVES).is_file()
            write_text(part / "README.md", model_card(card, str(source.layout), target, folder.name, curves))
            for name in ("checkpoint_final.pth", "model.safetensors"):
                _check(part / name, weights)
            if folder.exists():
                folder.rmdir()
            part.rename(folder)
    except OSError as e:
        raise ValueError(f"{folder} cannot be written: {e.strerror or e}. Nothing was written.") from None
    lines = [f"  {file.name:22} {file.stat().st_size:>13,} bytes" for file in sorted(folder.iterdir())]
    return lines + ([f"  no adaptation_plan.json: {note}"] if note else [])


def _check(file: Path, weights: dict[str, Tensor]) -> None:
    found = read(file).weights
    for key, value in weights.items():
        if key not in found or not torch.equal(value, found[key]):
            raise ValueError(f"{key} does not come back the same from {file.name}. Nothing was written.")


def model_card(card: dict[str, Any], network: str, target: Target, name: str, curves: bool) -> str:
    """``README.md`` with front matter, as the hub shows it. What is not known is left out, and nothing is claimed that is not."""
    data, licence = entry(card, "dataset"), str(card.get("licence"))
    code = re.sub(r"[\s_]+", "-", licence.lower())
    terms = ["license: " + (code if code in _HUB_LICENCES else "other")]
    if code not in _HUB_LICENCES:
        terms.append(f"license_name: {re.sub(r'[^a-z0-9.-]+', '-', code) or 'not-stated'}")
    front = ["---", *terms, "library_name: nnunetv2", "pipeline_tag: image-feature-extraction", "tags:"]
    front += [f"- {tag}" for tag in ("medical-imaging", "3d", "self-supervised", "nnunet", "consistent-view-alignment")] + ["---"]
    facts = [
        ("network", network),
        ("branch", card.get("branch")),
        ("recipe", card.get("trainer")),
        ("epochs", card.get("epochs")),
        ("cases", data.get("cases")),
        ("channels", _joined(data.get("channel_names"))),
        ("spacing (mm)", _by(card.get("spacing"), "not resampled")),
        ("normalisation", _joined(card.get("normalization_schemes"))),
        ("view (voxels)", _by(card.get("view_size"), "not stated")),
        ("licence", licence),
        ("made with", f"nnunetv2_cva {__version__}"),
    ]
    shown = [f"| {k} | {v} |" for k, v in facts if v not in (None, "", [])]
    body = [f"# {name}", "", "Weights of an nnU-Net network, pretrained without labels by Consistent View Alignment."]
    body += ["They do not segment: they are a start for fine-tuning."]
    body += ["", "| | |", "|---|---|", *shown, ""]
    body += [f"- {line}" for line in reminders(licence)]
    if licence == NOT_STATED:
        body.append("- No licence is stated: ask before you use or pass on these weights.")
    started = entry(card, "started_from")
    if started:
        body.append(f"- The pretraining started from {started.get('file')} (licence {started.get('licence', NOT_STATED)}).")
    body += ["", "## Use", "", "```bash", *usage(name, target), "```", ""]
    if curves:
        body += ["## Curves", "", f"![losses and alignment over epochs]({CURVES})", ""]
    metrics = card.get("metrics")
    if isinstance(metrics, dict) and metrics:
        body += ["## Last epoch", "", *(f"- {k}: {v:.4g}" for k, v in metrics.items() if isinstance(v, (int, float))), ""]
    if card.get("config"):
        body += ["## Settings", "", "```json", *_settings(card["config"]), "```", ""]
    body += ["## Cite", "", *(f"- {c}" for c in _citations(card.get("citations")))]
    return "\n".join([*front, "", *body, ""])


def usage(name: str, target: Target) -> list[str]:
    """The three lines that use it."""
    trainer = target.trainer.__name__
    option = "" if trainer == "nnUNetTrainer" else f" -tr {trainer}"
    there = f"-d DATASET -c 3d_fullres -p PLANS{option}"
    return [
        f"nnUNetv2_cva info hf://ORGANISATION/{name}",
        f"nnUNetv2_cva export hf://ORGANISATION/{name} {there} -o weights.pth",
        f"nnUNetv2_train DATASET 3d_fullres FOLD -p PLANS{option} -pretrained_weights weights.pth",
    ]


def _settings(config: Any) -> list[str]:
    return json.dumps(config, indent=1).splitlines()


def _citations(value: Any) -> list[str]:
    found = []
    for citation in value if isinstance(value, list) else []:
        texts = citation.get("apa_citations") or citation.get("bibtex_citations") if isinstance(citation, dict) else [citation]
        found += [str(t) for t in (texts if isinstance(texts, list) else [])]
    return list(dict.fromkeys(found))


def _joined(value: Any) -> str:
    values = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return ", ".join(map(str, values))


def _by(value: Any, missing: str) -> str:
    numbers = isinstance(value, list) and all(isinstance(v, (int, float)) for v in value)
    return by(value) if numbers and value else missing
