"""Labelled cases of a raw dataset of nnU-Net's, preprocessed as the network to be looked at wants them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_cva import nnunet
from nnunetv2_cva.files import read_object
from nnunetv2_cva.seeing.frozen import Frozen
from nnunetv2_cva.seeing.images import FoundImage, Image, find_images, preprocess


@dataclass(frozen=True)
class Labelled:
    """The labelled cases of a dataset, not read yet. ``labels``: names and values, without background and what is ignored."""

    name: str
    cases: tuple[tuple[FoundImage, Path], ...]
    labels: dict[str, int]
    dataset_json: dict[str, Any]

    def chosen(self, names: Sequence[str]) -> Labelled:
        """Those cases, in that order.

        Raises:
            ValueError: there is no such case.
        """
        known = {found.name: (found, labels) for found, labels in self.cases}
        missing = [n for n in names if n not in known]
        if missing:
            raise ValueError(f"{self.name} has no labelled case {missing[0]!r}. The first it has: {', '.join(list(known)[:5])}.")
        return Labelled(self.name, tuple(known[n] for n in names), self.labels, self.dataset_json)

    def read(self, network: Frozen) -> list[Image]:
        """All cases, preprocessed. Raises ValueError, naming the file, where one cannot be."""
        return [preprocess(found, network, labels, self.dataset_json) for found, labels in self.cases]


def labelled_cases(dataset: str, channels: int) -> Labelled:
    """The cases of a dataset, number or name, in nnU-Net's raw folder, that have labels.

    Raises:
        ValueError: no such dataset, no labels, or images of other channels than the network's.
    """
    name = nnunet.find_dataset(dataset)
    folder = nnunet.folder(nnunet.RAW) / name
    content = read_object(folder / "dataset.json")
    ending = content.get("file_ending", ".nii.gz")
    there = content.get("channel_names") or content.get("modality") or {}
    if len(there) != channels:
        raise ValueError(f"{name} has {len(there)} channel(s), the network {channels}. Choose a dataset with as many.")
    values = {k: v for k, v in content.get("labels", {}).items() if isinstance(v, int) and v > 0 and k != "ignore"}
    found = find_images([str(folder / "imagesTr")], channels)
    cases = tuple((f, folder / "labelsTr" / f"{f.name}{ending}") for f in found)
    cases = tuple((f, labels) for f, labels in cases if labels.is_file())
    if not cases or not values:
        raise ValueError(f"{folder} has no labelled cases: expected labelsTr/<case>{ending} and labels in dataset.json.")
    return Labelled(name, cases, values, content)
