"""``nnUNetv2_cva peek``: what is in a pretraining dataset, as a table and as pictures."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2_cva.commands.gather import dataset_of, preprocessed_folder, read_plans
from nnunetv2_cva.commands.plan import PLANS, positive

if TYPE_CHECKING:
    from nnunetv2_cva.config import CVAConfig
    from nnunetv2_cva.datasets.pictures import Sheet, ShownPair
    from nnunetv2_cva.datasets.written import Recipe
    from nnunetv2_cva.views.loader import Cases

HELP = "Show what is in a pretraining dataset: a table, a contact sheet, and views as the network gets them."
CONTACT_SHEET, VIEWS = "contact_sheet.png", "views.png"
LISTED = 10  # rejected files per reason


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``nnUNetv2_cva peek``."""
    add = parser.add_argument
    add("-d", dest="dataset", required=True, metavar="D", help="pretraining dataset, planned or preprocessed")
    add("-p", dest="plans", default=PLANS, metavar="NAME", help=f"plans (default {PLANS})")
    add("-c", dest="configuration", default="3d_fullres_cva", metavar="NAME", help="configuration (default 3d_fullres_cva)")
    add("-o", dest="output", metavar="FOLDER", help="where the pictures go (default: the dataset's preprocessed folder)")
    add("--cases", type=positive, default=40, metavar="N", help="cases on the contact sheet (default 40, evenly spread)")
    add("--pairs", type=positive, default=6, metavar="N", help="pairs of views (default 6)")


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
    if sheets:
        contact_sheet(sheets, output / CONTACT_SHEET)
        print(f"Wrote {output / CONTACT_SHEET}: {len(sheets)} {'images as they are' if cases is None else 'preprocessed cases'}.")
    if cases is None:
        print(f"No preprocessed cases in {data} yet, so no {VIEWS}. Run `nnUNetv2_cva preprocess -d {folder.name}` first.")
    else:
        _draw_views(args, folder, plans, cases, configuration, output / VIEWS)
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
    from nnunetv2_cva.datasets.inventory import CASES, read_accepted
    from nnunetv2_cva.views.index import read_index

    form = "{:28} {:>6} {:>8}  {:40} {:38} {}"
    index = read_index(data)
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
            print(form.format(name, len(of), of[0].channels, shapes, spacings, f"{low:g} to {high:g}"))
    if index is not None:
        print(form.format("preprocessed", "cases", "channels", "shape: min, median, max", "", "").rstrip())
        for code, name in enumerate(index.datasets):
            shapes = index.shapes[index.dataset_of == code]
            print(form.format(name, len(shapes), shapes[0][0], _range(shapes[:, 1:], ".0f"), "", "").rstrip())
    _print_rejected(folder)


def _print_rejected(folder: Path) -> None:
    """Every reason, the most frequent first, with the first files that have it."""
    from nnunetv2_cva.datasets.inventory import REJECTED, read_rejected

    reasons: dict[str, list[str]] = {}
    for _, reason, path in read_rejected(folder):
        reasons.setdefault(reason.split(":")[0].split(" of ")[0], []).append(path)
    print(f"rejected: {sum(map(len, reasons.values()))}")
    for reason, paths in sorted(reasons.items(), key=lambda r: -len(r[1])):
        print(f"  {len(paths):6}  {reason}")
        for path in paths[:LISTED]:
            print(f"          {path.encode('utf-8', 'backslashreplace').decode()}")
        if len(paths) > LISTED:
            print(f"          and {len(paths) - LISTED} more, in {folder / REJECTED}")


def _range(rows: Any, form: str) -> str:
    import numpy as np

    values = np.asarray(rows, dtype=float)
    return ", ".join("x".join(format(n, form) for n in f(values, axis=0)) for f in (np.min, np.median, np.max))


def _spread(number: int, most: int) -> list[int]:
    return [round(i * (number - 1) / max(1, most - 1)) for i in range(most)] if number > most else list(range(number))


def _of_cases(cases: Cases, most: int, configuration: dict[str, Any]) -> list[Sheet]:
    from nnunetv2_cva.datasets.pictures import Sheet, three_slices

    def sheet(number: int) -> Sheet:
        key = str(cases.keys[number])
        case = cases.open(key)
        return Sheet(_title(key, case.shape), three_slices(case.array, configuration["spacing"]))

    return _readable(sheet, _spread(len(cases), most))


def _of_images(folder: Path, most: int) -> list[Sheet]:
    from nnunetv2_cva.datasets.inventory import read_accepted
    from nnunetv2_cva.datasets.pictures import Sheet, three_slices
    from nnunetv2_cva.datasets.reading import read_images

    found = read_accepted(folder)

    def sheet(number: int) -> Sheet:
        f = found[number]
        try:
            return Sheet(_title(f.key, f.shape), three_slices(read_images(f.files)[0], f.spacing))
        except ValueError as e:
            raise ValueError(f"{f.files[0]}: {e}") from None

    return _readable(sheet, _spread(len(found), most))


def _readable(make: Callable[[int], Any], numbers: Iterable[int]) -> list[Any]:
    """What ``make`` makes of those numbers whose case can be read; says which cannot."""
    made = []
    for number in numbers:
        try:
            made.append(make(number))
        except (ValueError, RuntimeError) as e:  # blosc2 raises RuntimeError for damaged voxels
            print(f"WARNING: left out: {' '.join(str(e).split())}")
    return made


def _title(key: str, shape: tuple[int, ...]) -> str:
    short = key if len(key) <= 44 else f"{key[:14]}...{key[-27:]}"
    return f"{short}  {'x'.join(map(str, shape))}"


def _draw_views(
    args: argparse.Namespace, folder: Path, plans: dict[str, Any], cases: Cases, configuration: dict[str, Any], path: Path
) -> None:
    """Pairs of views of cases drawn at random, one after the other, until there are enough."""
    import numpy as np

    from nnunetv2_cva.config import resolve
    from nnunetv2_cva.datasets.pictures import view_pairs
    from nnunetv2_cva.datasets.written import recipe_of

    recipe = recipe_of(folder, args.plans)
    config = resolve(_config_of(recipe), plans, args.configuration, os.environ)
    config = config.updated({"consistency_weight": 1.0}, "peek")  # two views, also for a recipe that needs one
    size = configuration["patch_size"]
    order = np.random.default_rng(config.seed).permutation(len(cases))
    pairs: list[ShownPair] = []
    for number in order[: 2 * args.pairs]:  # some may be damaged
        if len(pairs) < args.pairs:
            pairs += _readable(lambda n: _pair(cases, n, size, config, recipe), [int(number)])
    if pairs:
        view_pairs(pairs, path)
        print(f"Wrote {path}: {len(pairs)} pairs of views of {'x'.join(map(str, size))} voxels, what they share framed.")


def _config_of(recipe: Recipe) -> CVAConfig:
    """The settings of a recipe, by nnU-Net's look-up; those of the default one where nnU-Net does not find it."""
    from nnunetv2_cva.config import CVAConfig
    from nnunetv2_cva.datasets.written import Recipe

    if recipe.name == Recipe().name:
        return CVAConfig()
    from nnunetv2_cva.transfer.target import trainer_class

    try:
        config: CVAConfig = trainer_class(recipe.name).config
    except ValueError as e:
        print(f"NOTE: the views are drawn with the default recipe's settings. {e}")
        return CVAConfig()
    return config


def _pair(cases: Cases, number: int, size: list[int], config: CVAConfig, recipe: Recipe) -> ShownPair:
    """Loaded, augmented and masked by the training's own code. Raises ValueError for a case that cannot be read."""
    import torch

    from nnunetv2_cva.datasets.pictures import ShownPair
    from nnunetv2_cva.datasets.proposal import TOKEN
    from nnunetv2_cva.training.objective import prepare
    from nnunetv2_cva.views.loader import PairDataset

    key = str(cases.keys[number])
    batch = PairDataset(cases, [key], size, config, 1, (0, 1), config.seed)[number]
    block = TOKEN if recipe.is_primus else (config.mask_block,) * 3
    ready = prepare(batch, config, block, torch.device("cpu"), config.seed, number)
    title = f"{_title(key, cases.shape(key))}, overlap {float(batch['overlap'][0]):.2f}"
    return ShownPair(title, ready.views[:, 0].numpy(), ready.visible[:, 0].numpy(), ready.rois.numpy())
