"""A look into a pretraining dataset: a table, a contact sheet, and views as the network gets them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunetv2_cva.config import DEFAULT, CVAConfig, resolve
from nnunetv2_cva.datasets import pictures
from nnunetv2_cva.datasets.inventory import read_accepted
from nnunetv2_cva.datasets.next_steps import CONFIGURATION, PLANS
from nnunetv2_cva.datasets.nnunet_plans import volume_configuration
from nnunetv2_cva.datasets.overview import overview
from nnunetv2_cva.datasets.pictures import Sheet, ShownPair
from nnunetv2_cva.datasets.planning import planned
from nnunetv2_cva.datasets.reading import read_images
from nnunetv2_cva.datasets.user_changes import Recipe, recipe_of
from nnunetv2_cva.nnunet import PRETRAINING, TOKEN
from nnunetv2_cva.sizes import by
from nnunetv2_cva.training.data import open_cases
from nnunetv2_cva.training.objective import prepare
from nnunetv2_cva.transfer.target import settings_of
from nnunetv2_cva.views.index import read_index
from nnunetv2_cva.views.loader import Cases, PairDataset

CONTACT_SHEET, VIEWS = "contact_sheet.png", "views.png"


@dataclass(frozen=True)
class PeekRequest:
    """What to look at. ``output``: folder of the pictures (default: the dataset's); ``cases``, ``pairs``: how many of each."""

    dataset: str
    plans: str = PLANS
    configuration: str = CONFIGURATION + PRETRAINING
    output: str | None = None
    cases: int = 40
    pairs: int = 6


def peek(request: PeekRequest) -> list[str]:
    """Write the contact sheet, and the views once there is preprocessed data. Returns the table and what was written, as lines.

    Raises:
        ValueError: nothing planned.
    """
    folder, plans = planned(request.dataset, request.plans)
    configuration = volume_configuration(plans, request.configuration)
    data, output = folder / configuration["data_identifier"], Path(request.output or folder)
    output.mkdir(parents=True, exist_ok=True)
    said = overview(folder, data)
    cases = _preprocessed(data)
    if cases is None:
        sheets = _of_images(folder, request.cases, said)
    else:
        sheets = _of_cases(cases, request.cases, configuration, said)
    if sheets:
        pictures.contact_sheet(sheets, output / CONTACT_SHEET)
        what = "images as they are" if cases is None else "preprocessed cases"
        said.append(f"Wrote {output / CONTACT_SHEET}: {len(sheets)} {what}.")
    if cases is None:
        said.append(
            f"No preprocessed cases in {data} yet, so no {VIEWS}. Preprocess {folder.name} first (nnUNetv2_cva preprocess)."
        )
        return said
    recipe = recipe_of(folder, request.plans)
    config = resolve(_config_of(recipe, said), plans, request.configuration, os.environ)
    config = config.updated({"consistency_weight": 1.0}, "peek")  # two views, also for a recipe that needs one
    pairs = _pairs(cases, request.pairs, configuration["patch_size"], config, recipe, said)
    if pairs:
        pictures.view_pairs(pairs, output / VIEWS)
        size = by(configuration["patch_size"])
        said.append(f"Wrote {output / VIEWS}: {len(pairs)} pairs of views of {size} voxels, what they share framed.")
    return said


def _preprocessed(data: Path) -> Cases | None:
    index = read_index(data)
    if index is not None:
        return Cases(index.root, [str(key) for key in index.keys])
    try:
        return open_cases(data)
    except ValueError:
        return None


def _spread(number: int, most: int) -> list[int]:
    return [round(i * (number - 1) / max(1, most - 1)) for i in range(most)] if number > most else list(range(number))


def _of_cases(cases: Cases, most: int, configuration: dict[str, Any], said: list[str]) -> list[Sheet]:
    def sheet(number: int) -> Sheet:
        key = str(cases.keys[number])
        case = cases.open(key)
        return Sheet(_title(key, case.shape), pictures.three_slices(case.array, configuration["spacing"]))

    return _readable(sheet, _spread(len(cases), most), said)


def _of_images(folder: Path, most: int, said: list[str]) -> list[Sheet]:
    found = read_accepted(folder)

    def sheet(number: int) -> Sheet:
        f = found[number]
        try:
            return Sheet(_title(f.key, f.shape), pictures.three_slices(read_images(f.files).images, f.spacing))
        except ValueError as e:
            raise ValueError(f"{f.files[0]}: {e}") from None

    return _readable(sheet, _spread(len(found), most), said)


def _readable(make: Callable[[int], Any], numbers: Iterable[int], said: list[str]) -> list[Any]:
    """What ``make`` makes of those numbers whose case can be read; says which cannot."""
    made = []
    for number in numbers:
        try:
            made.append(make(number))
        except (ValueError, RuntimeError) as e:  # blosc2 raises RuntimeError for damaged voxels
            said.append(f"WARNING: left out: {' '.join(str(e).split())}")
    return made


def _title(key: str, shape: tuple[int, ...]) -> str:
    short = key if len(key) <= 44 else f"{key[:14]}...{key[-27:]}"
    return f"{short}  {by(shape)}"


def _pairs(cases: Cases, most: int, size: list[int], config: CVAConfig, recipe: Recipe, said: list[str]) -> list[ShownPair]:
    """Pairs of views of cases drawn at random, one after the other, until there are enough."""
    order = np.random.default_rng(config.seed).permutation(len(cases))
    pairs: list[ShownPair] = []
    for number in order[: 2 * most]:  # some may be damaged
        if len(pairs) < most:
            pairs += _readable(lambda n: _pair(cases, n, size, config, recipe), [int(number)], said)
    return pairs


def _config_of(recipe: Recipe, said: list[str]) -> CVAConfig:
    """The settings of a recipe; those of the default one where nnU-Net does not find it."""
    try:
        return settings_of(recipe.name)
    except ValueError as e:
        said.append(f"NOTE: the views are drawn with the default recipe's settings. {e}")
        return DEFAULT


def _pair(cases: Cases, number: int, size: list[int], config: CVAConfig, recipe: Recipe) -> ShownPair:
    """Loaded, augmented and masked by the training's own code. Raises ValueError for a case that cannot be read."""
    key = str(cases.keys[number])
    batch = PairDataset(cases, [key], size, config, 1, (0, 1), config.seed)[number]
    block = TOKEN if recipe.is_primus else (config.block_edge(size),) * 3
    ready = prepare(batch, config, block, torch.device("cpu"), config.seed, number)
    title = f"{_title(key, cases.shape(key))}, overlap {float(batch['overlap'][0]):.2f}"
    hidden = None if ready.hidden is None else ready.hidden[:, 0].numpy()
    return ShownPair(title, ready.views[:, 0].numpy(), ready.inside[:, 0].numpy(), hidden, ready.rois.numpy())
