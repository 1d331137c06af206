"""What is pretrained on: images looked at one by one, or preprocessed data where it lies."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nnunetv2_cva.datasets.adopt import Adopted, combined, open_nnssl, open_nnunet, usable_cases
from nnunetv2_cva.datasets.anonymous import KEY
from nnunetv2_cva.datasets.destination import without_left_out
from nnunetv2_cva.datasets.findings import Finding
from nnunetv2_cva.datasets.fingerprint import channel_names
from nnunetv2_cva.datasets.inventory import CASES, INSPECTION, REJECTED, Inventory, read_sources, save_lists, take_inventory
from nnunetv2_cva.datasets.leakage import REASON, Compare, by_name, comparing_voxels, left_out
from nnunetv2_cva.datasets.parallel import Progress
from nnunetv2_cva.datasets.sources import Sources
from nnunetv2_cva.datasets.targets import FineTuned
from nnunetv2_cva.nnunet import PREPROCESSED, RAW, find_dataset, is_dataset_name
from nnunetv2_cva.nnunet import folder as nnunet_folder
from nnunetv2_cva.views.index import Entry


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


@dataclass(frozen=True)
class Gathering:
    """How to gather: into the lists of ``folder``, compared with the ``targets``; ``say`` is told what was found.

    ``target_plans``, ``configuration``: of nnU-Net's data that is used where it lies.
    """

    folder: Path
    targets: tuple[FineTuned, ...]
    hold_out: int | None
    headers_only: bool
    target_plans: str
    configuration: str
    processes: int
    progress: Progress
    say: Callable[[str], object]

    def gather(self, sources: Sources) -> Images:
        """What the sources hold, without what cannot or shall not be used; the lists of it are written.

        Raises:
            ValueError: nothing to pretrain on; no such folders or data.
        """
        return self._adopted(sources) if sources.adopt else self._images(sources)

    def _images(self, sources: Sources) -> Images:
        inventory = take_inventory(self.folder, sources, self.folder.name, self.processes, self.progress)

        def compare(of: Inventory) -> Compare:
            return comparing_voxels(of.accepted, self.folder, self.processes, self.progress)

        inventory = self._without_held_out(sources, inventory, compare)
        found = inventory.accepted
        self.say(f"{self.folder.name}: {len(found)} cases to pretrain on, {self._rejected(inventory)}.")
        self._describe(inventory, sources)
        for index in without_left_out(self.folder, {f.key for f in found}):
            self.say(f"Cases that are no longer used were taken out of {index}. To preprocess new ones, run preprocess again.")
        channels = channel_names(sources.modality, {f.modality for f in found}, inventory.channels)
        return Images(tuple(channels), bool(sources.modality), found)

    def _adopted(self, sources: Sources) -> Images:
        parts = [self._opened(given) for given in sources.adopt]
        root, cases = combined(parts)
        inventory = usable_cases(cases, self.folder, self.headers_only, self.processes, self.progress)
        inventory = self._without_held_out(sources, inventory, lambda of: lambda target: by_name(target, of))
        found = inventory.accepted
        self.say(f"{self.folder.name}: {len(found)} cases to pretrain on where they lie ({root}), {self._rejected(inventory)}.")
        spacings = {p.spacing for p in parts}
        if len(spacings) > 1:
            listed = ", ".join(map(str, spacings))
            self.say(f"WARNING: the network will see them at different scales: their spacings are {listed}.")
        return Images(
            tuple(channel_names(sources.modality, (), inventory.channels)),
            bool(sources.modality),
            entries=tuple(Entry(f.key, f.shape, f.dataset) for f in found),
            root=root,
            subjects=tuple((f.key, f.subject) for f in found),
            spacing=parts[0].spacing,
            plans=parts[0].plans,
        )

    def _opened(self, given: str) -> Adopted:
        if os.path.isdir(given):
            part = open_nnssl(Path(given).absolute())
        else:
            data = nnunet_folder(PREPROCESSED).absolute() / find_dataset(given)
            part = open_nnunet(data, self.target_plans, self.configuration)
        if self.folder.absolute() in part.folder.parents:
            raise ValueError(f"`adopt={given}`: this data belongs to {self.folder}. Give the pretraining a dataset of its own.")
        return part

    def _without_held_out(self, sources: Sources, inventory: Inventory, compare: Callable[[Inventory], Compare]) -> Inventory:
        """The inventory without what was and is held out; writes the lists once all of that is known."""
        if inventory.accepted:
            earlier = {f.identity for f in inventory.accepted} & set(sources.held_out)
            if earlier:
                self.say(
                    f"{len(earlier)} cases stay left out, by an earlier `hold_out`. Give `images` or `adopt` again to start over."
                )
            inventory = inventory.without(earlier, REASON)
            now = left_out(self.targets, self.hold_out, compare(inventory), self.say) if inventory.accepted else frozenset()
            inventory = inventory.without(now, REASON)
            if not inventory.accepted:
                raise ValueError("`hold_out` leaves no case to pretrain on.")
            sources = replace(sources, held_out=tuple(sorted({*sources.held_out, *now})))
        save_lists(self.folder, sources, inventory, cases=not sources.adopt)
        return inventory

    def _describe(self, inventory: Inventory, sources: Sources) -> None:
        """How names were read, what was not read, and what is odd."""
        found, example = inventory.accepted, inventory.accepted[0]
        subjects, datasets = len({f.subject for f in found}), len({f.dataset for f in found})
        numbers = (len(found), "cases"), (subjects, "subjects"), (datasets, "datasets"), (inventory.channels, "channels")
        counted = ", ".join(f"{n} {what if n != 1 else what[:-1]}" for n, what in numbers)
        name = os.path.basename(example.files[0])
        if sources.anonymous:
            self.say(
                f"Names of cases and subjects say nothing of them; {self.folder / KEY} holds what they stand for, and "
                f"{CASES}, {REJECTED} and {INSPECTION} the paths. Pass none of these on."
            )
        self.say(f"Found {counted}. For example {name} is case {example.key} of subject {example.subject}.")
        if inventory.unread:
            self.say(f"Not read: {', '.join(f'{n} {kind}' for kind, n in sorted(inventory.unread.items()))}.")
        for remark in (*inventory.remarks, *remarks(found)):
            self.say(remark)
        if len(found) == 1:
            self.say("WARNING: a single case is too few to learn from: a step sees different cases, and there is one.")

    def _rejected(self, inventory: Inventory) -> str:
        reasons = f" ({self.folder / REJECTED} has the reasons)" if inventory.rejected else ""
        return f"{len(inventory.rejected)} rejected{reasons}"


def remarks(found: Sequence[Finding]) -> list[str]:
    """What is odd about cases that are used all the same: every remark once, with the first files that it is about."""
    of: dict[str, list[str]] = {}
    for f in found:
        if f.remark:
            of.setdefault(f.remark, []).append(f.files[0])
    return [
        f"WARNING: {len(files)} of {len(found)} cases, {remark}: {', '.join(files[:3])}{', ...' if len(files) > 3 else ''}. "
        "Leave out by name (`exclude`) what is no image to pretrain on."
        for remark, files in of.items()
    ]


def sources_for(folder: Path, images: Sequence[str], table: str | None, adopt: Sequence[str], options: dict[str, Any]) -> Sources:
    """As given now, else as given before, else the dataset's own raw folder. ``options`` given now hold in any case.

    Raises:
        ValueError: no such sources, or preprocessed data for a dataset of images and the other way round.
    """
    options = {k: v for k, v in options.items() if v}
    before = read_sources(folder)
    if not (adopt or images or table):
        return replace(before or Sources((_raw_folder(folder.name),)), **options)
    if before is not None and bool(adopt) != bool(before.adopt):
        what = "preprocessed data where it lies" if before.adopt else "images"
        raise ValueError(f"{folder.name} uses {what}. Give this another dataset (`dataset`), or delete {folder} to start over.")
    there = tuple(os.path.abspath(given) if os.path.isdir(given) else given for given in adopt)
    return Sources(tuple(map(_image_folder, images)), os.path.abspath(table) if table else None, adopt=there, **options)


def _raw_folder(name: str) -> str:
    raw = os.path.join(os.environ.get(RAW, RAW), name)
    if not os.path.isdir(raw):
        raise ValueError(f"No images for {name}: give `images=FOLDER`, or put them into {raw}.")
    return os.path.abspath(raw)


def _image_folder(given: str) -> str:
    if os.path.isdir(given):
        return os.path.abspath(given)
    if not (given.isdecimal() or is_dataset_name(given)):
        raise ValueError(f"`images={given}`: no such folder.")
    folder = os.path.join(os.environ.get(RAW, RAW), find_dataset(given))
    if not os.path.isdir(folder):
        raise ValueError(f"`images={given}`: {folder} does not exist.")
    return os.path.abspath(folder)
