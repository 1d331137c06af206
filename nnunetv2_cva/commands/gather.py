"""What ``plan`` pretrains on: images looked at one by one, or preprocessed data where it lies."""

from __future__ import annotations

import argparse
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2_cva.commands.progress import Bar

if TYPE_CHECKING:
    from nnunetv2_cva.datasets.inspect import Finding
    from nnunetv2_cva.datasets.nnssl_tree import Adopted
    from nnunetv2_cva.datasets.sources import Sources
    from nnunetv2_cva.datasets.targets import FineTuned
    from nnunetv2_cva.views.index import Entry

NEW_DATASET = r"Dataset\d{3}_\S+"


@dataclass(frozen=True)
class Images:
    """What is pretrained on. ``channels``: a name for each.

    Either images as they are, ``found``; or preprocessed data: ``entries`` below ``root``, with (case, subject), its spacing and,
    if nnU-Net made it, its plans.
    """

    channels: tuple[str, ...]
    found: tuple[Finding, ...] = ()
    entries: tuple[Entry, ...] = ()
    root: str = ""
    subjects: tuple[tuple[str, str], ...] = ()
    spacing: tuple[float, ...] | None = None
    plans: dict[str, Any] | None = None


def dataset_of(given: str) -> str:
    """The name of a dataset that may be new.

    Raises:
        ValueError: an id that no dataset has, or a name that nnU-Net does not accept.
    """
    from nnunetv2_cva.datasets.targets import dataset_name

    if re.fullmatch(NEW_DATASET, given):
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


def look_at_images(args: argparse.Namespace, folder: Path, targets: list[FineTuned]) -> Images:
    """Look at every image of the sources, and leave out what cannot or shall not be used."""
    from nnunetv2_cva.datasets.describe import channel_names, looks_like_ct
    from nnunetv2_cva.datasets.inventory import REJECTED, hold_out, take_inventory

    sources = _sources(args, folder)
    with Bar("Looking at images") as bar:
        inventory = take_inventory(folder, sources, folder.name, args.processes, bar.start, bar.tick)
    earlier = {f.key for f in inventory.accepted if f.content in sources.held_out}
    if earlier:
        print(f"{len(earlier)} cases stay left out, by an earlier --hold-out. Give --images again to start over.")
    left_out = earlier | _held_out(args, folder, targets, tuple(f for f in inventory.accepted if f.key not in earlier))
    if left_out:
        inventory = hold_out(folder, sources, inventory, left_out)
    found = inventory.accepted
    reasons = f" ({folder / REJECTED} has the reasons)" if inventory.rejected else ""
    print(f"{folder.name}: {len(found)} cases to pretrain on, {len(inventory.rejected)} rejected{reasons}.")
    channels = channel_names(sources.modality, found)
    ct = looks_like_ct(found)
    if ct and "CT" not in channels:
        print(
            f"NOTE: {ct} of {len(found)} cases look like CT (air at -1000) and will be normalised by z-score, as MR is. "
            "For CT's normalisation make them a dataset of their own with --modality CT."
        )
    return Images(tuple(channels), found)


def _sources(args: argparse.Namespace, folder: Path) -> Sources:
    """As given now, else as given before, else the dataset's own raw folder. Options given now hold in any case."""
    from nnunetv2_cva.datasets.inventory import read_sources
    from nnunetv2_cva.datasets.sources import Sources

    options = {"exclude": tuple(args.exclude), "modality": tuple(args.modality), "channels": args.channels}
    options = {k: v for k, v in options.items() if v}
    if args.images or args.table:
        table = os.path.abspath(args.table) if args.table else None
        return replace(Sources(tuple(map(_image_folder, args.images)), table), **options)
    before = read_sources(folder)
    if before is not None:
        return replace(before, **options)
    raw = os.path.join(os.environ.get("nnUNet_raw", "nnUNet_raw"), folder.name)
    if not os.path.isdir(raw):
        raise ValueError(f"No images for {folder.name}: give --images FOLDER, or put them into {raw}.")
    return replace(Sources((os.path.abspath(raw),)), **options)


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


def _held_out(args: argparse.Namespace, folder: Path, targets: list[FineTuned], found: tuple[Finding, ...]) -> set[str]:
    """Names of cases to leave out; warns of the others that targets validate on."""
    from nnunetv2_cva.datasets.targets import held_out

    left_out: set[str] = set()
    for target in targets:
        with Bar(f"Looking for validation images of {target.name}") as bar:
            hits = held_out(target, found, folder, args.processes, bar.start, bar.tick)
        for hit in hits:
            if hit.fold == args.hold_out:
                left_out |= hit.keys
            elif args.hold_out is None:
                print(hit)
    return left_out


def adopt(args: argparse.Namespace, folder: Path) -> Images:
    """Preprocessed data where it lies; only headers are read."""
    from nnunetv2_cva.datasets import nnssl_tree
    from nnunetv2_cva.datasets.inventory import REJECTED, write_rejected

    parts = [_opened(given, args, folder) for given in args.adopt]
    root, names = nnssl_tree.combined(parts)
    with Bar("Reading headers") as bar:
        bar.start(len(names))
        entries, rejected = nnssl_tree.read_entries(root, names, args.processes, bar.tick)
    folder.mkdir(parents=True, exist_ok=True)
    write_rejected(folder, rejected)
    if not entries:
        raise ValueError(f"None of {len(names)} cases can be used; {folder / REJECTED} has the reasons.")
    print(f"{folder.name}: {len(entries)} cases to pretrain on where they lie ({root}), {len(rejected)} rejected.")
    spacings = {p.spacing for p in parts}
    if len(spacings) > 1:
        print(f"WARNING: the network will see them at different scales: their spacings are {', '.join(map(str, spacings))}.")
    channels = args.modality or [f"image{c}" for c in range(entries[0].shape[0])]
    subjects = tuple((e.key, names[e.key][1]) for e in entries)
    return Images(tuple(channels), (), tuple(entries), root, subjects, parts[0].spacing, parts[0].plans)


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
