"""One page about a training, made from what lies in its folder: verdict, curves, views, matches, settings, what to do next."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_cva import nnunet
from nnunetv2_cva.files import read_object, write_json, write_text
from nnunetv2_cva.seeing.images import Image
from nnunetv2_cva.seeing.page import cell, page, table
from nnunetv2_cva.seeing.verdict import verdict
from nnunetv2_cva.training.checkpoint import BEST, FINAL, LATEST
from nnunetv2_cva.training.messages import of_plan
from nnunetv2_cva.training.metrics import METRICS
from nnunetv2_cva.transfer.card import entry
from nnunetv2_cva.transfer.read import read

REPORT, METRICS_FILE, WATCHED = "report.html", "metrics.jsonl", "watched.json"
PROGRESS, VIEWS, MATCHES = "progress.png", "views.png", "matches.png"
CASES = 3  # whose matches are shown
LARGEST = 1.5  # views: of larger cases the middle is shown


def write_report(folder: Path, tick: Callable[[], object] = lambda: None, matches: bool = True) -> Path:
    """Write ``report.html`` into the folder of a training; pictures of matches are drawn where weights and watched
    cases are there and the picture is not, or is older.

    Raises:
        ValueError: the folder holds no training.
    """
    folder = Path(folder)
    epochs = read_epochs(folder)
    settings = read_object(folder / "cva_config.json")
    plans = read_object(folder.parent / "plans.json")
    configuration = folder.parent.name.split("__")[-1]
    missing = _draw_matches(folder, plans, configuration, tick) if matches else ""
    parts = [
        _verdict(epochs),
        _metrics(epochs),
        _picture(folder / PROGRESS, "Curves", "Losses, agreement of the two views of watched cases, collapse, over the epochs."),
        _picture(folder / VIEWS, "Views", "Pairs of the training: what both show is framed, what is hidden is blue."),
        _picture(
            folder / MATCHES,
            "Matches of watched cases",
            "Points of the first case found in the others, by the trained network and by the same one untrained; principal "
            "components as colours, one basis for all; k-means regions.",
            missing,
        ),
        _data(folder, plans, configuration),
        _times(epochs),
        _next(folder, plans, configuration),
        _settings(settings),
    ]
    path = folder / REPORT
    write_text(path, page(f"{plans.get('dataset_name')}: {folder.parent.name}, fold {_fold(folder)}", "\n".join(parts)))
    return path


def report(folder: str) -> list[str]:
    """Write the page; returns the verdict, where the page is, and what to type for every target of the plan.

    Raises:
        ValueError: as ``write_report``.
    """
    at = Path(folder)
    said = [str(verdict(read_epochs(at))), f"Wrote {write_report(at)}."]
    return [*said, *_targets(at, read_object(at.parent / "plans.json"), at.parent.name.split("__")[-1])]


def read_epochs(folder: Path) -> list[dict[str, Any]]:
    """The metrics of all epochs.

    Raises:
        ValueError: the folder holds no training of ours, or one whose metrics somebody else has written.
    """
    file = folder / METRICS_FILE
    if not file.is_file():
        raise ValueError(f"{folder} is no folder of a pretraining: expected {METRICS_FILE}, as in .../fold_all.")
    try:
        epochs = [json.loads(line) for line in file.read_text("utf-8").splitlines() if line.strip()]
        if all(isinstance(e, dict) and all(isinstance(v, (int, float)) for v in e.values()) for e in epochs):
            return epochs
    except (ValueError, RecursionError):
        pass
    raise ValueError(f"{file}: expected one JSON object of numbers a line, found something else. Restore it.")


def note_watched(folder: Path, data: str | Path, cases: list[str]) -> None:
    """Say in the folder which cases are watched, and where their voxels are."""
    write_json(folder / WATCHED, {"data": str(data), "cases": list(cases)})


def read_watched(folder: Path) -> tuple[str, list[str]]:
    """What ``note_watched`` has written: where the data are, and which cases are watched. None where it is not there.

    Raises:
        ValueError: it holds something else.
    """
    file = folder / WATCHED
    if not file.is_file():
        return "", []
    noted = read_object(file)
    data, cases = noted.get("data"), noted.get("cases")
    if not (isinstance(data, str) and isinstance(cases, list) and all(isinstance(c, str) for c in cases)):
        raise ValueError(f"{file}: expected a folder and a list of cases, found something else. Restore or delete it.")
    return data, cases


def _verdict(epochs: list[dict[str, Any]]) -> str:
    found = verdict(epochs)
    words = f"<strong>{found.state}</strong> after {len(epochs)} epochs: {escape(found.reason)}"
    return f'<p class="verdict {found.state.replace(" ", "-")}">{words}</p>'


def _metrics(epochs: list[dict[str, Any]]) -> str:
    if not epochs:
        return ""
    first, last, rows = epochs[0], epochs[-1], []
    for name in last:
        if name.endswith("_null") or name in ("epoch", "seconds") or not isinstance(last[name], (int, float)):
            continue
        null = last.get(f"{name.removesuffix('_loss')}_null", "")
        rows.append([name, first.get(name, ""), last[name], null, METRICS[name].meaning if name in METRICS else ""])
    header = ("metric", "first epoch", "last epoch", "without learning", "meaning")
    note = "<p>“Without learning”: the same number for the same place in another case, or of a constant answer.</p>"
    return "<h2>Metrics</h2>" + note + table(header, [[float(c) if isinstance(c, (int, float)) else c for c in r] for r in rows])


def _picture(file: Path, title: str, caption: str, missing: str = "") -> str:
    if not file.is_file():
        return f"<h2>{title}</h2><p>{escape(missing)}</p>" if missing else ""
    data = base64.b64encode(file.read_bytes()).decode()
    return f'<h2>{title}</h2><p>{caption}</p><img alt="{title}" src="data:image/png;base64,{data}">'


def _data(folder: Path, plans: dict[str, Any], configuration: str) -> str:
    chosen = _configuration(plans, configuration)
    description = folder.parent / "dataset.json"
    dataset = read_object(description) if description.is_file() else {}
    watched = read_watched(folder)[1]
    rows = [
        ["dataset", plans.get("dataset_name")],
        ["cases", dataset.get("numTraining", "not stated")],
        ["channels", ", ".join(map(str, entry(dataset, "channel_names").values()))],
        ["plans, configuration", f"{plans.get('plans_name')}, {configuration}"],
        ["spacing, mm", ", ".join(cell(s) for s in chosen["spacing"])],
        ["view, voxels", " x ".join(map(str, chosen["patch_size"]))],
        ["cases per step", chosen.get("batch_size")],
        ["watched cases", ", ".join(watched)],
    ]
    return "<h2>Data</h2>" + table(("", ""), rows)


def _configuration(plans: dict[str, Any], name: str) -> dict[str, Any]:
    """Raises ValueError where it does not say what is looked at."""
    chosen = nnunet.configuration(plans, name)
    lacking = [key for key in ("spacing", "patch_size") if len(chosen.get(key, ())) != 3]
    if lacking:
        raise ValueError(f"plans.json, {name}: expected three numbers as {lacking[0]}, found {chosen.get(lacking[0])}.")
    return chosen


def _times(epochs: list[dict[str, Any]]) -> str:
    seconds = [e["seconds"] for e in epochs if "seconds" in e]
    if not seconds:
        return ""
    waits = [e.get("data_wait", 0.0) for e in epochs]
    rows = [
        ["epochs", len(seconds)],
        ["together, hours", sum(seconds) / 3600],
        ["median epoch, seconds", float(np.median(seconds))],
        ["share of the time waiting for data", float(np.mean(waits))],
    ]
    return "<h2>Times</h2>" + table(("", ""), rows)


def _next(folder: Path, plans: dict[str, Any], configuration: str) -> str:
    weights = shlex.quote(str(folder / FINAL))
    target, name = nnunet.fine_tuned(plans, configuration), plans.get("plans_name")
    lines = [
        "# what it learned",
        f"nnUNetv2_cva look {weights} -i IMAGE_A IMAGE_B IMAGE_C -o FOLDER",
        f"nnUNetv2_cva probe {weights} -d LABELLED_DATASET -o FOLDER",
        "# fine-tune with nnU-Net itself",
    ]
    lines += _targets(folder, plans, configuration) or [
        f"nnUNetv2_cva export {weights} -d DATASET -c {target} -p {name} -o weights.pth",
        f"nnUNetv2_train DATASET {target} FOLD -p {name} -pretrained_weights weights.pth",
    ]
    return f"<h2>Next</h2><pre>{escape(chr(10).join(lines))}</pre>"


def _targets(folder: Path, plans: dict[str, Any], configuration: str) -> list[str]:
    """The lines that ``plan`` printed for its targets; none before there are weights, which say whose network they are of."""
    there = (folder / name for name in (FINAL, LATEST, BEST))
    weights = next((file for file in there if file.is_file()), None)
    if weights is None:
        return []
    try:
        builder = read(str(weights), any_network=True).builder
    except ValueError:
        return []
    return of_plan(plans, configuration, builder, str(folder / FINAL))


def _settings(settings: dict[str, Any]) -> str:
    return "<h2>Settings of the method</h2>" + table(("setting", "value"), [[k, json.dumps(v)] for k, v in settings.items()])


def _fold(folder: Path) -> str:
    return folder.name.removeprefix("fold_")


def _draw_matches(folder: Path, plans: dict[str, Any], configuration: str, tick: Callable[[], object]) -> str:
    """Why there is no picture of matches, or nothing."""
    from nnunetv2_cva.seeing.frozen import load_frozen, untrained
    from nnunetv2_cva.seeing.look import look, picture

    weights = next(
        (folder / f"checkpoint_{n}.pth" for n in ("final", "latest") if (folder / f"checkpoint_{n}.pth").is_file()), None
    )
    if weights is None:
        return "There are no weights in this folder to look at."
    drawn = folder / MATCHES
    if drawn.is_file() and drawn.stat().st_mtime >= weights.stat().st_mtime:
        return ""
    chosen = _configuration(plans, configuration)
    images = _watched_images(folder, chosen)
    if len(images) < 2:
        return "Fewer than two watched cases can be read: there is nothing to match."
    networks = {"trained": load_frozen(weights), "untrained": untrained(weights)}
    picture(look(images, networks, tick=tick), drawn)
    return ""


def _watched_images(folder: Path, configuration: dict[str, Any]) -> list[Image]:
    """The middle of the first watched cases that can still be read."""
    import torch

    from nnunetv2_cva.views.cases import Cases

    data, watched = read_watched(folder)
    i, j, k = (float(s) for s in configuration["spacing"])
    images: list[Image] = []
    cases = Cases(data, watched)
    for key in watched:
        try:
            case = cases.open(key)
            shown = [min(n, int(LARGEST * v)) for n, v in zip(case.shape, configuration["patch_size"])]
            begin = [(n - s) // 2 for n, s in zip(case.shape, shown)]
            voxels = case.read(np.array([[b, b + s] for b, s in zip(begin, shown)]))
        except ValueError:
            continue
        images.append(Image(key, torch.from_numpy(voxels), (i, j, k), {}))
        if len(images) == CASES:
            break
    return images
