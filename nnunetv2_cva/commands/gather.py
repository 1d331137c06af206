"""What ``plan`` pretrains on: images looked at one by one, or preprocessed data where it lies."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2_cva.commands.holdout import REASON, comparing_voxels, warn_or_leave_out
from nnunetv2_cva.commands.progress import Bar

if TYPE_CHECKING:
    from nnunetv2_cva.datasets.inspect import Finding
    from nnunetv2_cva.datasets.inventory import Inventory
    from nnunetv2_cva.datasets.nnssl_tree import Adopted
    from nnunetv2_cva.datasets.sources import Sources
    from nnunetv2_cva.datasets.targets import FineTuned
    from nnunetv2_cva.views.index import Entry

NEW_DATASET = r"Dataset\d{3}_\S+"


@dataclass(frozen=True)
class Images:
    """What is pretrained on. ``channels``: a name for each; ``named``: whether the user gave these names.

    Either images as they are, ``found``; or preprocessed data: ``entries`` below ``root``, with (case, subject), its spacing and,
    if nnU-Net made it, its plans.
    """

    channels: tuple[str, ...]
    named: bool
    found: tuple[Finding, ...] = ()
    entries: tuple[Entry, ...] = ()
    root: str = ""
    subjects: tuple[tuple[str, str], ...] = ()
    spacing: tuple[float, ...] | None = None
    plans: dict[str, Any] | None = None


def dataset_of(given: str) -> str:
    """The name of a dataset that may be new.

    Raises:
        ValueError: an id that no dataset has, a name that nnU-Net does not accept, or a new name with an id that is in use.
    """
    from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

    from nnunetv2_cva.datasets.targets import dataset_name

    if re.fullmatch(NEW_DATASET, given):
        known = [str(name) for name in find_candidate_datasets(int(given[7:10]))]
        if known and given not in known:  # nnU-Net would find neither of them by its id any more
            raise ValueError(f"-d {given}: the id {given[7:10]} is that of {', '.join(known)}. Choose another one.")
        return given
    try:
        return dataset_name(given)
    except ValueError as e:
        raise ValueError(f"-d {given}: {e} A new dataset needs its full name, for example -d Dataset500_HeadMR.") from None


def check_own(folder: Path) -> None:
    """Raise ValueError for a dataset with labels: nnU-Net's files in its folder must not be replaced by ours."""
    from nnunetv2_cva.datasets.describe import IMAGES_ONLY

    path = folder / "dataset.json"
    raw = Path(os.environ.get("nnUNet_raw", "nnUNet_raw")) / folder.name / "labelsTr"
    if raw.is_dir() or (path.is_file() and json.loads(path.read_text()).get("description") != IMAGES_ONLY):
        raise ValueError(
            f"{folder.name} is a dataset with labels. Give the pretraining a dataset of its own, which may use the same images: "
            f"-d DatasetXXX_Name --images {folder.name}."
        )


def preprocessed_folder() -> Path:
    """``nnUNet_preprocessed``. Raises ValueError when it is not set."""
    value = os.environ.get("nnUNet_preprocessed")
    if not value:
        raise ValueError(
            "The environment variable nnUNet_preprocessed is not set. Point it to a folder with room for preprocessed images."
        )
    return Path(value)


def read_plans(folder: Path, name: str) -> dict[str, Any]:
    """The plans of a dataset. Raises ValueError when there are none of this name."""
    path = folder / f"{name}.json"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in folder.glob("*Plans*.json"))) or "none"
        raise ValueError(
            f"{path} not found (plans there: {there}). Run `nnUNetv2_cva plan -d {folder.name}` first, or name the plans with -p."
        )
    plans: dict[str, Any] = json.loads(path.read_text())
    return plans


def gather(args: argparse.Namespace, folder: Path, targets: list[FineTuned]) -> Images:
    """What the sources hold, without what cannot or shall not be used; the lists of it are written into ``folder``."""
    sources = _sources(args, folder)
    return _adopt(args, folder, targets, sources) if sources.adopt else _look_at_images(args, folder, targets, sources)


def _look_at_images(args: argparse.Namespace, folder: Path, targets: list[FineTuned], sources: Sources) -> Images:
    """Look at every image of the sources."""
    from nnunetv2_cva.datasets.describe import channel_names
    from nnunetv2_cva.datasets.inventory import take_inventory
    from nnunetv2_cva.datasets.preprocessed import without_left_out

    with Bar("Looking at images") as bar:
        inventory = take_inventory(folder, sources, folder.name, args.processes, bar.start, bar.tick)

    def left_out(of: Inventory) -> frozenset[str]:
        return warn_or_leave_out(targets, args.hold_out, comparing_voxels(of.accepted, folder, args.processes))

    inventory = _without_held_out(folder, sources, inventory, left_out)
    found = inventory.accepted
    print(f"{folder.name}: {len(found)} cases to pretrain on, {_rejected(folder, inventory)}.")
    for index in without_left_out(folder, {f.key for f in found}):
        print(f"Cases that are no longer used were taken out of {index}. To preprocess new ones, run preprocess again.")
    channels = channel_names(sources.modality, {f.modality for f in found}, inventory.channels)
    return Images(tuple(channels), bool(sources.modality), found)


def _without_held_out(
    folder: Path, sources: Sources, inventory: Inventory, left_out: Callable[[Inventory], frozenset[str]]
) -> Inventory:
    """The inventory without what earlier and this ``--hold-out`` leave out; writes the lists once all of that is known."""
    from nnunetv2_cva.datasets.inventory import save_lists

    if inventory.accepted:
        earlier = {f.identity for f in inventory.accepted} & set(sources.held_out)
        if earlier:
            print(f"{len(earlier)} cases stay left out, by an earlier --hold-out. Give --images or --adopt again to start over.")
        inventory = inventory.without(earlier, REASON)
        now = left_out(inventory) if inventory.accepted else frozenset()
        inventory = inventory.without(now, REASON)
        if not inventory.accepted:
            raise ValueError("--hold-out leaves no case to pretrain on.")
        sources = replace(sources, held_out=tuple(sorted({*sources.held_out, *now})))
    save_lists(folder, sources, inventory, cases=not sources.adopt)
    return inventory


def _rejected(folder: Path, inventory: Inventory) -> str:
    from nnunetv2_cva.datasets.inventory import REJECTED

    reasons = f" ({folder / REJECTED} has the reasons)" if inventory.rejected else ""
    return f"{len(inventory.rejected)} rejected{reasons}"


def _sources(args: argparse.Namespace, folder: Path) -> Sources:
    """As given now, else as given before, else the dataset's own raw folder. Options given now hold in any case.

    Raises:
        ValueError: no such sources, or preprocessed data for a dataset of images and the other way round.
    """
    from nnunetv2_cva.datasets.inventory import read_sources
    from nnunetv2_cva.datasets.sources import Sources

    options = {"exclude": tuple(args.exclude), "modality": tuple(args.modality), "channels": args.channels}
    options = {k: v for k, v in options.items() if v}
    before = read_sources(folder)
    now = _given(args)
    if now is not None and before is not None and bool(now.adopt) != bool(before.adopt):
        what = "preprocessed data where it lies" if before.adopt else "images"
        raise ValueError(f"{folder.name} uses {what}. Give this another dataset (-d), or delete {folder} to start over.")
    chosen = now or before
    if chosen is not None:
        return replace(chosen, **options)
    raw = os.path.join(os.environ.get("nnUNet_raw", "nnUNet_raw"), folder.name)
    if not os.path.isdir(raw):
        raise ValueError(f"No images for {folder.name}: give --images FOLDER, or put them into {raw}.")
    return replace(Sources((os.path.abspath(raw),)), **options)


def _given(args: argparse.Namespace) -> Sources | None:
    from nnunetv2_cva.datasets.sources import Sources

    if args.adopt:
        return Sources(adopt=tuple(os.path.abspath(given) if os.path.isdir(given) else given for given in args.adopt))
    if args.images or args.table:
        table = os.path.abspath(args.table) if args.table else None
        return Sources(tuple(map(_image_folder, args.images)), table)
    return None


def _image_folder(given: str) -> str:
    from nnunetv2_cva.datasets.targets import dataset_name

    if os.path.isdir(given):
        return os.path.abspath(given)
    if not re.fullmatch(rf"\d+|{NEW_DATASET}", given):
        raise ValueError(f"--images {given}: no such folder.")
    folder = os.path.join(os.environ.get("nnUNet_raw", "nnUNet_raw"), dataset_name(given))
    if not os.path.isdir(folder):
        raise ValueError(f"--images {given}: {folder} does not exist.")
    return os.path.abspath(folder)


def _adopt(args: argparse.Namespace, folder: Path, targets: list[FineTuned], sources: Sources) -> Images:
    """Preprocessed data where it lies."""
    from nnunetv2_cva.datasets.describe import channel_names
    from nnunetv2_cva.datasets.heldout import by_name
    from nnunetv2_cva.datasets.nnssl_tree import combined, look_at_cases
    from nnunetv2_cva.views.index import Entry

    parts = [_opened(given, args, folder) for given in sources.adopt]
    root, cases = combined(parts)
    with Bar("Looking at cases") as bar:
        inventory = look_at_cases(cases, folder, args.headers_only, args.processes, bar.start, bar.tick)

    def left_out(of: Inventory) -> frozenset[str]:
        return warn_or_leave_out(targets, args.hold_out, lambda target: by_name(target, of))

    inventory = _without_held_out(folder, sources, inventory, left_out)
    found = inventory.accepted
    print(f"{folder.name}: {len(found)} cases to pretrain on where they lie ({root}), {_rejected(folder, inventory)}.")
    spacings = {p.spacing for p in parts}
    if len(spacings) > 1:
        print(f"WARNING: the network will see them at different scales: their spacings are {', '.join(map(str, spacings))}.")
    channels = channel_names(sources.modality, (), inventory.channels)
    entries = tuple(Entry(f.key, f.shape, f.dataset) for f in found)
    subjects = tuple((f.key, f.subject) for f in found)
    named = bool(sources.modality)
    return Images(tuple(channels), named, (), entries, root, subjects, parts[0].spacing, parts[0].plans)


def _opened(given: str, args: argparse.Namespace, folder: Path) -> Adopted:
    from nnunetv2_cva.datasets.nnssl_tree import open_nnssl, open_nnunet
    from nnunetv2_cva.datasets.targets import dataset_name

    if os.path.isdir(given):
        part = open_nnssl(Path(given).absolute())
    else:
        part = open_nnunet(preprocessed_folder().absolute() / dataset_name(given), args.target_plans, args.configuration)
    if folder.absolute() in part.folder.parents:
        raise ValueError(f"--adopt {given}: this data belongs to {folder}. Give the pretraining a dataset of its own with -d.")
    return part
