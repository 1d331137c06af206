"""What simple classifiers find in the features of files of weights: a table and a plot, the untrained network among them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunetv2_cva.datasets.tables import read_table
from nnunetv2_cva.files import written_whole
from nnunetv2_cva.seeing.dense import dense_maps, mean_vector
from nnunetv2_cva.seeing.frozen import Frozen, check_comparable, load_frozen, untrained
from nnunetv2_cva.seeing.images import find_image, preprocess
from nnunetv2_cva.seeing.labelled import labelled_cases
from nnunetv2_cva.seeing.probing import probe_images, probe_voxels
from nnunetv2_cva.seeing.propagation import mean_and_interval
from nnunetv2_cva.seeing.requests import ProbeRequest, Progress, counting, device_of
from nnunetv2_cva.transfer.hub import name_of

MOST_CASES = 40  # of a dataset that are read
TABLE, PLOT = "probe.csv", "probe.png"


def probe_weights(request: ProbeRequest, progress: Progress) -> list[str]:
    """Write table and plot. Returns the table as lines.

    Raises:
        ValueError: neither or both kinds of probe, or files that cannot be read or do not fit together.
    """
    if (request.dataset is None) == (request.csv is None):
        raise ValueError("Give either `dataset`, whose voxels are probed, or `csv`, a table of labelled images.")
    networks = _networks(request)
    scores = _voxels(request, networks, progress) if request.dataset else _images(request, networks, progress)
    output = Path(request.output)
    output.mkdir(parents=True, exist_ok=True)
    rows = _table(scores)
    _write(rows, output / TABLE)
    _plot(scores, output / PLOT)
    widths = [max(len(r[c]) for r in rows) for c in range(len(rows[0]))]
    said = ["  ".join(v.ljust(w) for v, w in zip(row, widths)).rstrip() for row in rows]
    said.append(f"Wrote {output / TABLE} and {PLOT}. Mean and 95 % interval over {'seeds' if request.dataset else 'folds'}.")
    return said


def _networks(request: ProbeRequest) -> dict[str, Frozen]:
    """By the names of their files, made longer until they differ; the untrained one first.

    Raises:
        ValueError: a file's network wants other images or windows than the first one's.
    """
    device, names = device_of(request.device), _names([name_of(w) for w in request.weights])
    found = {"untrained": untrained(request.weights[0], request.trust, device)}
    first = found["untrained"]
    for name, path in zip(names, request.weights):
        network = load_frozen(path, request.branch, request.trust, device, name)
        check_comparable(first, network, (request.weights[0], path), views=True)
        found[name] = network
    return found


def _names(paths: Sequence[Path]) -> list[str]:
    for parts in range(1, max(len(p.parts) for p in paths)):
        names = ["/".join(p.with_suffix("").parts[-parts:]) for p in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError("The same file of weights is given twice.")


Scores = dict[str, dict[str, list[float]]]  # row -> score -> values over seeds or folds


def _voxels(request: ProbeRequest, networks: dict[str, Frozen], progress: Progress) -> Scores:

    assert request.dataset is not None
    first = networks["untrained"]
    dataset = labelled_cases(request.dataset, first.channels)
    step = -(-len(dataset.cases) // MOST_CASES)
    cases = dataset.chosen([found.name for found, _ in dataset.cases[::step]]).read(first)
    scores: Scores = {}
    tick = counting(progress, "Probing", request.seeds * (len(networks) + 2))
    for seed in range(request.seeds):
        for row, each in probe_voxels(cases, networks, list(dataset.labels.values()), request.labelled, seed, tick).items():
            for name, value in each.items():
                scores.setdefault(row, {}).setdefault(f"{name}, Dice", []).append(value)
    return scores


def _images(request: ProbeRequest, networks: dict[str, Frozen], progress: Progress) -> Scores:

    assert request.csv is not None
    paths, labels, subjects = _read(Path(request.csv))
    first = networks["untrained"]
    vectors: dict[str, list[Any]] = {"intensity": [], **{name: [] for name in networks}}
    tick = counting(progress, "Embedding", len(paths) * len(networks))
    for found in [find_image(p, first.channels) for p in paths]:  # all are found before any is read
        image = preprocess(found, first)
        vectors["intensity"].append(np.percentile(image.voxels.flatten(1).numpy(), np.arange(5, 100, 10), axis=1).T.flatten())
        for name, network in networks.items():
            maps = dense_maps(image.voxels.to(network.device), network.encode, network.taps, network.view, 0.25)
            vectors[name].append(mean_vector(maps))
            tick()
    scores: Scores = {}
    for name, each in vectors.items():
        for fold in probe_images(np.stack(each), labels, subjects, request.folds, seed=0):
            for score, value in fold.items():
                scores.setdefault(name, {}).setdefault(score, []).append(value)
    return scores


def _read(path: Path) -> tuple[list[str], list[str], list[str]]:
    """Paths (relative to the table's folder), labels, subjects; an image without a subject is one of its own."""
    if not path.is_file():
        raise ValueError(f"`csv={path}`: no such file.")
    rows = [row for _, row in read_table(path, ("path", "label"))]
    paths = [str((path.parent / r["path"]).resolve()) for r in rows]
    return paths, [r["label"] for r in rows], [r.get("subject") or p for r, p in zip(rows, paths)]


def _table(scores: Scores) -> list[list[str]]:

    columns = list(next(iter(scores.values())))
    rows = [["features", *columns]]
    for name, each in scores.items():
        rows.append([name, *("{:.3f} ± {:.3f}".format(*mean_and_interval(each[c])) for c in columns)])
    return rows


def _write(rows: list[list[str]], path: Path) -> None:

    with written_whole(path) as partial, open(partial, "w", newline="", encoding="utf-8") as f:
        csv.writer(f, lineterminator="\n").writerows(rows)


def _plot(scores: Scores, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = list(next(iter(scores.values())))
    figure = Figure(figsize=(3 + 3 * len(columns), 1 + 0.35 * len(scores)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, column in zip(figure.subplots(1, len(columns), sharey=True, squeeze=False)[0], columns):
        for height, (_, each) in enumerate(scores.items()):
            mean, half = mean_and_interval(each[column])
            axes.plot(each[column], [height] * len(each[column]), ".", color="0.7")
            axes.errorbar(mean, height, xerr=0 if half != half else half, fmt="o", color="C0", capsize=3)
        axes.set(title=column, yticks=range(len(scores)), yticklabels=list(scores))
        axes.grid(alpha=0.3, axis="x")
        axes.set_ylim(len(scores) - 0.5, -0.5)
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
