"""``nnUNetv2_cva look``: places of one image found in others, by the trained network and by the same one untrained."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2_cva.commands.embed import add_weights, device_of
from nnunetv2_cva.commands.plan import positive
from nnunetv2_cva.commands.progress import Bar

if TYPE_CHECKING:
    import numpy as np

    from nnunetv2_cva.seeing.frozen import Frozen
    from nnunetv2_cva.seeing.images import Image
    from nnunetv2_cva.seeing.look import Look

HELP = "Show what a network has learned: points of one image found in others, features as colours, labels carried over."
PICTURE, PAGE = "look.png", "look.html"
CASES = 4  # of a target that nobody chose from
Table = tuple[str, list[str], list[list[Any]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``nnUNetv2_cva look``."""
    add = parser.add_argument
    add_weights(parser)
    add("-i", dest="images", nargs="+", default=[], metavar="IMAGE", help="two or more images; with --target: names of its cases")
    add("-o", dest="output", required=True, metavar="FOLDER", help="where look.png and look.html go")
    add("--points", metavar="FILE", help="CSV of points i,j,k in voxels of the first image's array (default: chosen, spread out)")
    add("--count", type=positive, default=4, metavar="N", help="how many points are chosen (default 4)")
    add(
        "--target", metavar="D", help="a labelled dataset in nnUNet_raw: errors in mm, and labels carried from one case to others"
    )
    add("--against", metavar="WEIGHTS", help="a second file of weights, a row of its own")
    add("--pairs", type=positive, default=20, metavar="N", help="random windows that labels are carried to (default 20)")


def run(args: argparse.Namespace) -> int:
    """Write picture and page; with labels print the tables, too."""
    from nnunetv2_cva.seeing.images import find_images, preprocess
    from nnunetv2_cva.seeing.labelled import labelled_cases
    from nnunetv2_cva.seeing.look import look, picture
    from nnunetv2_cva.seeing.look_page import write_look

    networks = _networks(args)
    first = next(iter(networks.values()))
    labels: dict[str, int] = {}
    pool: list[Image] = []
    if args.target:
        dataset = labelled_cases(args.target, first.channels)
        labels = dataset.labels
        names = args.images or [found.name for found, _ in dataset.cases[:CASES]]
        images = dataset.chosen(names).read(first)
        others = [found.name for found, _ in dataset.cases if found.name not in names]
        pool = images + dataset.chosen(others[: max(0, 12 - len(images))]).read(first)
    else:
        images = [preprocess(found, first) for found in find_images(args.images, first.channels)]
    points = _points(args.points, images[0]) if args.points and images else args.count
    with Bar() as bar:
        found = look(images, networks, points, bar.counting("Features of images", len(images) * len(networks)))
    tables = [_errors(found, labels), _carried(pool, networks, labels, args.pairs)] if labels else []
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    picture(found, output / PICTURE)
    write_look(found, output / PAGE, tables)
    for title, header, rows in tables:
        _print(title, header, rows)
    print(f"Wrote {output / PICTURE} and {PAGE}, which needs nothing but a browser.")
    return 0


def _networks(args: argparse.Namespace) -> dict[str, Frozen]:
    """By the names of their rows. All see images as the first one's plans say.

    Raises:
        ValueError: ``--against`` wants other images than the first.
    """
    from nnunetv2_cva.seeing.frozen import load_frozen, untrained

    device = device_of(args)
    networks = {"trained": load_frozen(args.weights, args.branch, args.trust, device, "trained")}
    networks["untrained"] = untrained(args.weights, args.trust, device)
    if args.against:
        networks["against"] = load_frozen(args.against, args.branch, args.trust, device, "against")
        a, b = networks["trained"], networks["against"]
        if (a.spacing, a.channels) != (b.spacing, b.channels):
            raise ValueError(
                f"--against {args.against}: expected spacing {a.spacing} and {a.channels} channel(s), as {args.weights} has, "
                f"found {b.spacing} and {b.channels}."
            )
    return networks


def _points(path: str, image: Image) -> np.ndarray:
    """(P, 3) in voxels of the preprocessed image."""
    import numpy as np

    try:
        rows = [line.replace(",", " ").split() for line in Path(path).read_text().splitlines() if line.strip()]
        rows = rows[1:] if rows and not rows[0][0].lstrip("-")[:1].isdigit() else rows  # a header
        values = np.array([[float(v) for v in row] for row in rows]).reshape(-1, 3)
    except (OSError, ValueError) as e:
        raise ValueError(f"--points {path}: expected three numbers i,j,k a line, found something else ({e}).") from None
    if not len(values):
        raise ValueError(f"--points {path}: expected three numbers i,j,k a line, found none.")
    return image.from_file(values + 0.5)


def _errors(found: Look, labels: dict[str, int]) -> Table:
    from nnunetv2_cva.seeing.describe import by_intensity, by_position
    from nnunetv2_cva.seeing.matches import errors_mm
    from nnunetv2_cva.seeing.propagation import mean_and_interval

    bins = [d.bins for d in next(iter(found.described.values()))]
    rows: dict[str, Any] = {
        "same relative position": [by_position(i, b) for i, b in zip(found.images, bins)],
        "intensity": [by_intensity(i, b) for i, b in zip(found.images, bins)],
        **found.described,
    }
    listed = []
    for kind, each in errors_mm(found.images, rows, list(labels.values())).items():
        mean, half = mean_and_interval(each)
        listed.append([kind, f"{mean:.1f} ± {half:.1f}", len(each)])
    return (
        f"Centroids of labels of {found.images[0].name} found in the others: distance to the label's centroid there, mm",
        ["by", "mean, 95 % interval", "centroids"],
        listed,
    )


def _carried(pool: list[Image], networks: dict[str, Frozen], labels: dict[str, int], pairs: int) -> Table:
    import numpy as np

    from nnunetv2_cva.seeing.propagation import means, one_shot

    with Bar() as bar:
        found = one_shot(pool, networks, list(labels.values()), pairs, tick=bar.counting("Carrying labels", pairs))
    rows = []
    for row, (mean, half) in means(found).items():
        each = np.array([c.dice for c in found if c.row == row])
        rows.append([row, f"{mean:.3f} ± {half:.3f}", *(_mean(d) for d in each.T)])
    return (
        f"Labels of a random window carried to a random window of another case by nearest features, {pairs} pairs: Dice",
        ["by", "mean, 95 % interval", *labels],
        rows,
    )


def _mean(values: np.ndarray) -> str:
    """Of what is known; nothing where no window shows the label."""
    known = values[values == values]
    return f"{known.mean():.3f}" if len(known) else "-"


def _print(title: str, header: list[str], rows: list[list[Any]]) -> None:
    print(title)
    widths = [max(len(str(r[c])) for r in [header, *rows]) for c in range(len(header))]
    for row in [header, *rows]:
        print("  " + "  ".join(str(v).ljust(w) for v, w in zip(row, widths)).rstrip())
