"""``nnUNetv2_cva probe``: what a simple classifier finds in the features of files of weights, beside the untrained network."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2_cva.commands.embed import add_device, device_of
from nnunetv2_cva.commands.plan import positive
from nnunetv2_cva.commands.progress import Bar

if TYPE_CHECKING:
    from nnunetv2_cva.seeing.frozen import Frozen

HELP = "Score frozen features: of voxels of a labelled dataset, or of whole images. The untrained network is always among them."
MOST_CASES = 40  # of a dataset that are read
TABLE, PLOT = "probe.csv", "probe.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``nnUNetv2_cva probe``."""
    add = parser.add_argument
    add("weights", nargs="+", metavar="WEIGHTS", help="files of weights; images are preprocessed as the first one's plans say")
    add("-o", dest="output", required=True, metavar="FOLDER", help="where probe.csv and probe.png go")
    add("-d", dest="dataset", metavar="D", help="voxels: a labelled dataset in nnUNet_raw")
    add("--labelled", type=positive, default=4, metavar="N", help="voxels: cases that the classifiers are fitted to (default 4)")
    add("--csv", metavar="FILE", help="images: a table with the columns path, label and optionally subject")
    add("--seeds", type=positive, default=5, metavar="N", help="voxels: repetitions with other cases and windows (default 5)")
    add("--folds", type=positive, default=5, metavar="N", help="images: folds of the cross-validation (default 5)")
    add("--branch", choices=("student", "teacher"), default="student", help="default: student")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Print the table; write it and the plot."""
    if (args.dataset is None) == (args.csv is None):
        raise ValueError("Give either -d, a labelled dataset whose voxels are probed, or --csv, a table of labelled images.")
    networks = _networks(args)
    scores = _voxels(args, networks) if args.dataset else _images(args, networks)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    rows = _table(scores)
    _write(rows, output / TABLE)
    _plot(scores, output / PLOT)
    widths = [max(len(r[c]) for r in rows) for c in range(len(rows[0]))]
    for row in rows:
        print("  ".join(v.ljust(w) for v, w in zip(row, widths)).rstrip())
    print(f"Wrote {output / TABLE} and {PLOT}. Mean and 95 % interval over {'seeds' if args.dataset else 'folds'}.")
    return 0


def _networks(args: argparse.Namespace) -> dict[str, Frozen]:
    """By the names of their files, made longer until they differ; the untrained one first.

    Raises:
        ValueError: a file's network wants other images or windows than the first one's.
    """
    from nnunetv2_cva.seeing.frozen import load_frozen, untrained

    device, names = device_of(args), _names([Path(w).resolve() for w in args.weights])
    found = {"untrained": untrained(args.weights[0], args.trust, device)}
    first = found["untrained"]
    for name, path in zip(names, args.weights):
        network = load_frozen(path, args.branch, args.trust, device, name)
        if (network.spacing, network.channels, network.view) != (first.spacing, first.channels, first.view):
            raise ValueError(
                f"{path}: expected spacing {first.spacing}, {first.channels} channel(s) and views of {first.view}, as "
                f"{args.weights[0]} has, found {network.spacing}, {network.channels} and {network.view}."
            )
        found[name] = network
    return found


def _names(paths: Sequence[Path]) -> list[str]:
    for parts in range(1, max(len(p.parts) for p in paths)):
        names = ["/".join(p.with_suffix("").parts[-parts:]) for p in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError("The same file of weights is given twice.")


Scores = dict[str, dict[str, list[float]]]  # row -> score -> values over seeds or folds


def _voxels(args: argparse.Namespace, networks: dict[str, Frozen]) -> Scores:
    from nnunetv2_cva.seeing.labelled import labelled_cases
    from nnunetv2_cva.seeing.probing import probe_voxels

    first = networks["untrained"]
    dataset = labelled_cases(args.dataset, first.channels)
    step = -(-len(dataset.cases) // MOST_CASES)
    cases = dataset.chosen([found.name for found, _ in dataset.cases[::step]]).read(first)
    scores: Scores = {}
    with Bar() as bar:
        tick = bar.counting("Probing", args.seeds * (len(networks) + 2))
        for seed in range(args.seeds):
            for row, each in probe_voxels(cases, networks, list(dataset.labels.values()), args.labelled, seed, tick).items():
                for name, value in each.items():
                    scores.setdefault(row, {}).setdefault(f"{name}, Dice", []).append(value)
    return scores


def _images(args: argparse.Namespace, networks: dict[str, Frozen]) -> Scores:
    import numpy as np
    import torch

    from nnunetv2_cva.seeing.dense import dense_maps
    from nnunetv2_cva.seeing.images import Found, preprocess
    from nnunetv2_cva.seeing.probing import probe_images

    paths, labels, subjects = _read(Path(args.csv))
    first = networks["untrained"]
    if first.channels != 1:
        raise ValueError(f"--csv names one file an image, but the network has {first.channels} channels.")
    vectors: dict[str, list[Any]] = {"intensity": [], **{name: [] for name in networks}}
    with Bar() as bar:
        tick = bar.counting("Embedding", len(paths) * len(networks))
        for path in paths:
            image = preprocess(Found(Path(path).name, (path,)), first)
            values = image.voxels[0].flatten()
            vectors["intensity"].append(np.percentile(values.numpy(), np.arange(5, 100, 10)))
            for name, network in networks.items():
                maps = dense_maps(image.voxels.to(network.device), network.encode, network.taps, network.view, 0.25)
                vectors[name].append(torch.cat([m.values.mean(dim=(1, 2, 3)) for m in maps]).cpu().numpy())
                tick()
    scores: Scores = {}
    for name, each in vectors.items():
        for fold in probe_images(np.stack(each), labels, subjects, args.folds, seed=0):
            for score, value in fold.items():
                scores.setdefault(name, {}).setdefault(score, []).append(value)
    return scores


def _read(path: Path) -> tuple[list[str], list[str], list[str]]:
    """Paths (relative to the table's folder), labels, subjects; an image without a subject is one of its own."""
    if not path.is_file():
        raise ValueError(f"--csv {path}: no such file.")
    with open(path, newline="", encoding="utf-8-sig") as f:
        table = csv.DictReader(f)
        if not {"path", "label"} <= set(table.fieldnames or ()):
            raise ValueError(f"--csv {path}: expected columns path,label[,subject], found {table.fieldnames}.")
        rows = list(table)
    paths = [str((path.parent / r["path"]).resolve()) for r in rows]
    return paths, [r["label"] for r in rows], [r.get("subject") or p for r, p in zip(rows, paths)]


def _table(scores: Scores) -> list[list[str]]:
    from nnunetv2_cva.seeing.propagation import mean_and_interval

    columns = list(next(iter(scores.values())))
    rows = [["features", *columns]]
    for name, each in scores.items():
        rows.append([name, *("{:.3f} ± {:.3f}".format(*mean_and_interval(each[c])) for c in columns)])
    return rows


def _write(rows: list[list[str]], path: Path) -> None:
    from nnunetv2_cva.files import written_whole

    with written_whole(path) as partial, open(partial, "w", newline="", encoding="utf-8") as f:
        csv.writer(f, lineterminator="\n").writerows(rows)


def _plot(scores: Scores, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from nnunetv2_cva.files import written_whole
    from nnunetv2_cva.seeing.propagation import mean_and_interval

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
