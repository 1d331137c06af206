"""``nnUNetv2_cva peek``: what is in a pretraining dataset, as a table and as pictures."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2_cva.commands.gather import dataset_of, preprocessed_folder, read_plans
from nnunetv2_cva.commands.plan import PLANS

if TYPE_CHECKING:
    from nnunetv2_cva.datasets.pictures import Sheet
    from nnunetv2_cva.views.loader import Cases

HELP = "Show what is in a pretraining dataset: a table, a contact sheet, and views as the network gets them."
CONTACT_SHEET, VIEWS = "contact_sheet.png", "views.png"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``nnUNetv2_cva peek``."""
    add = parser.add_argument
    add("-d", dest="dataset", required=True, metavar="D", help="pretraining dataset, planned or preprocessed")
    add("-p", dest="plans", default=PLANS, metavar="NAME", help=f"plans (default {PLANS})")
    add("-c", dest="configuration", default="3d_fullres_cva", metavar="NAME", help="configuration (default 3d_fullres_cva)")
    add("-o", dest="output", metavar="FOLDER", help="where the pictures go (default: the dataset's preprocessed folder)")
    add("--cases", type=int, default=40, metavar="N", help="cases on the contact sheet (default 40, evenly spread)")
    add("--pairs", type=int, default=6, metavar="N", help="pairs of views (default 6)")


def run(args: argparse.Namespace) -> int:
    """Print the table; write the contact sheet, and the views once there is preprocessed data."""
    from nnunetv2_cva.datasets.pictures import contact_sheet
    from nnunetv2_cva.datasets.plan import resolved

    folder = preprocessed_folder() / dataset_of(args.dataset)
    plans = read_plans(folder, args.plans)
    configuration = resolved(plans, args.configuration)
    data = folder / configuration["data_identifier"]
    output = Path(args.output or folder)
    output.mkdir(parents=True, exist_ok=True)
    _print_table(folder, data)
    cases = _preprocessed(data)
    sheets = _of_images(folder, args.cases) if cases is None else _of_cases(cases, args.cases, configuration)
    contact_sheet(sheets, output / CONTACT_SHEET)
    print(f"Wrote {output / CONTACT_SHEET}: {len(sheets)} {'images as they are' if cases is None else 'preprocessed cases'}.")
    if cases is None:
        print(f"No preprocessed cases in {data} yet, so no {VIEWS}. Run `nnUNetv2_cva preprocess -d {folder.name}` first.")
    else:
        _draw_views(args, plans, cases, configuration, output / VIEWS)
    return 0


def _preprocessed(data: Path) -> Cases | None:
    from nnunetv2_cva.training.data import open_cases
    from nnunetv2_cva.views.index import read_index
    from nnunetv2_cva.views.loader import Cases

    index = read_index(data)
    if index is not None:
        return Cases(index.root, [str(key) for key in index.keys])
    try:
        return open_cases(data)
    except ValueError:
        return None


def _print_table(folder: Path, data: Path) -> None:
    from nnunetv2_cva.datasets.inventory import CASES, read_accepted, read_rejected
    from nnunetv2_cva.views.index import read_index

    form = "{:28} {:>6} {:>8}  {:40} {:38} {}"
    index, rejected = read_index(data), read_rejected(folder)
    if (folder / CASES).is_file():
        found = read_accepted(folder)
        print(
            form.format(
                "images", "cases", "channels", "shape: min, median, max", "spacing in mm: min, median, max", "intensities"
            )
        )
        for name in sorted({f.dataset for f in found}):
            of = [f for f in found if f.dataset == name]
            low, high = (end(c[which] for f in of for c in f.intensities) for end, which in ((min, "min"), (max, "max")))
            shapes, spacings = _range([f.shape for f in of], ".0f"), _range([f.spacing for f in of], ".3g")
            print(form.format(name, len(of), len(of[0].files), shapes, spacings, f"{low:g} to {high:g}"))
    if index is not None:
        print(form.format("preprocessed", "cases", "channels", "shape: min, median, max", "", "").rstrip())
        for code, name in enumerate(index.datasets):
            shapes = index.shapes[index.dataset_of == code]
            print(form.format(name, len(shapes), shapes[0][0], _range(shapes[:, 1:], ".0f"), "", "").rstrip())
    print(f"rejected: {len(rejected)}")
    for reason, count in Counter(reason.split(":")[0].split(" of ")[0] for _, reason, _ in rejected).most_common():
        print(f"  {count:6}  {reason}")


def _range(rows: Any, form: str) -> str:
    import numpy as np

    values = np.asarray(rows, dtype=float)
    return ", ".join("x".join(format(n, form) for n in f(values, axis=0)) for f in (np.min, np.median, np.max))


def _spread(number: int, most: int) -> list[int]:
    return [round(i * (number - 1) / max(1, most - 1)) for i in range(most)] if number > most else list(range(number))


def _of_cases(cases: Cases, most: int, configuration: dict[str, Any]) -> list[Sheet]:
    import numpy as np

    from nnunetv2_cva.datasets.pictures import Sheet

    opened = [(str(cases.keys[n]), cases.open(str(cases.keys[n]))) for n in _spread(len(cases), most)]
    spacing = tuple(configuration["spacing"])
    return [Sheet(_title(key, case.shape), case.array[0].astype(np.float32), spacing) for key, case in opened]


def _of_images(folder: Path, most: int) -> list[Sheet]:
    from nnunetv2_cva.datasets.inventory import read_accepted
    from nnunetv2_cva.datasets.pictures import Sheet
    from nnunetv2_cva.datasets.reading import read_images

    found = read_accepted(folder)
    chosen = [found[n] for n in _spread(len(found), most)]
    return [Sheet(_title(f.key, f.shape), read_images(f.files)[0][0], f.spacing) for f in chosen]


def _title(key: str, shape: tuple[int, ...]) -> str:
    short = key if len(key) <= 44 else f"{key[:14]}...{key[-27:]}"
    return f"{short}  {'x'.join(map(str, shape))}"


def _draw_views(args: argparse.Namespace, plans: dict[str, Any], cases: Cases, configuration: dict[str, Any], path: Path) -> None:
    """The pairs of a training's first step with these settings: loaded, augmented and masked by the training's own code."""
    import torch

    from nnunetv2_cva.config import CVAConfig, resolve
    from nnunetv2_cva.datasets.pictures import ShownPair, view_pairs
    from nnunetv2_cva.training.objective import prepare
    from nnunetv2_cva.views.loader import PairDataset

    config = resolve(CVAConfig(), plans, args.configuration, os.environ)
    config = config.updated({"consistency_weight": 1.0}, "peek")  # two views, also for a recipe that needs one
    size, count = configuration["patch_size"], min(args.pairs, len(cases))
    batch = PairDataset(cases, [str(k) for k in cases.keys], size, config, count, (0, count), config.seed)[0]
    ready = prepare(batch, config, (config.mask_block,) * 3, torch.device("cpu"), config.seed, 0)
    pairs = []
    for b, key in enumerate(batch["keys"]):
        title = f"{_title(key, cases.shape(key))}, overlap {float(batch['overlap'][b]):.2f}"
        views, visible = ready.views[b::count, 0].numpy(), ready.visible[b::count, 0].numpy()
        pairs.append(ShownPair(title, views, visible, ready.rois[b::count].numpy()))
    view_pairs(pairs, path)
    print(f"Wrote {path}: {count} pairs of views of {'x'.join(map(str, size))} voxels, what they share framed.")
