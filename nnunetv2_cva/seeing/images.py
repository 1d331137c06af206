"""Images as a network wants them, by nnU-Net's own preprocessing, and the way back to the voxels of the file."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunetv2_cva.datasets.findings import otsu
from nnunetv2_cva.datasets.reading import ENDINGS, ending_of, read_images
from nnunetv2_cva.seeing.frozen import Frozen

CHANNEL = re.compile(r"_(\d{4})$")
AIR_TOLERANCE = 0.2  # standard deviations of the image, as for the views of a training (views/resample.py)


@dataclass(frozen=True)
class FoundImage:
    """An image to be read: its files, one per channel."""

    name: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Image:
    """A preprocessed image: ``voxels`` (C, I, J, K) float32, ``labels`` (I, J, K) int16 where there are any, ``spacing`` in mm.

    ``properties``: nnU-Net's, which lead back to the file; empty for cases that were preprocessed before.
    """

    name: str
    voxels: Tensor
    spacing: tuple[float, float, float]
    properties: dict[str, Any]
    order: tuple[int, int, int] = (0, 1, 2)  # of the file's axes (nnU-Net's transpose_forward)
    labels: np.ndarray | None = None

    @property
    def size(self) -> tuple[int, int, int]:
        i, j, k = self.voxels.shape[1:]
        return int(i), int(j), int(k)

    def from_file(self, points: np.ndarray) -> np.ndarray:
        """(P, 3) voxel coordinates of the file, in array order, voxel n spanning [n, n + 1), as coordinates of ``voxels``."""
        begin, scale = self._crop()
        return (np.asarray(points, float)[:, list(self.order)] - begin) * scale

    def to_file(self, points: np.ndarray) -> np.ndarray:
        """The reverse of ``from_file``."""
        begin, scale = self._crop()
        found = np.empty((len(points), 3))
        found[:, list(self.order)] = np.asarray(points, float) / scale + begin
        return found

    def voxel(self, point: np.ndarray) -> str:
        """The voxel of the file's array in which a point (3,) of ``voxels`` lies, as text."""
        return " ".join(str(int(n)) for n in np.floor(self.to_file(np.asarray(point)[None])[0] + 1e-6))

    def _crop(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the crop begins in the file's voxels (axes in network order), and preprocessed voxels per voxel of the file."""
        if not self.properties:
            return np.zeros(3), np.ones(3)
        box = np.array(self.properties["bbox_used_for_cropping"])
        return box[:, 0], np.array(self.size) / (box[:, 1] - box[:, 0])


def find_images(given: Sequence[str], channels: int) -> list[FoundImage]:
    """The images of files and folders, by name. Networks of several channels want nnU-Net's ``<case>_0000``, ``<case>_0001``...

    Raises:
        ValueError: nothing there, another format, channels missing, or two images of one name.
    """
    files = [f for path in given for f in _files(Path(path))]
    groups: dict[str, list[str]] = {}
    for file in files:
        stem = Path(file).name[: -len(ending_of(file) or "")]
        groups.setdefault(CHANNEL.sub("", stem) if channels > 1 else re.sub(r"_0000$", "", stem), []).append(file)
    for name, group in groups.items():
        if len(group) != channels:
            expected = f"{channels} files {name}_0000, ..." if channels > 1 else "one file"
            raise ValueError(f"Image {name}: expected {expected}, as the network has {channels} channel(s), found {group}.")
    return [FoundImage(name, tuple(sorted(group))) for name, group in groups.items()]


def find_image(file: str, channels: int) -> FoundImage:
    """The image of a file; of networks of several channels the file of any of them, the others lie beside it.

    Raises:
        ValueError: as ``find_images``.
    """
    path = Path(file)
    if channels == 1 or not path.is_file():
        return find_images([file], channels)[0]
    ending = ending_of(path.name) or ""
    case = CHANNEL.sub("", path.name.removesuffix(ending))
    beside = sorted(path.parent.glob(f"{glob.escape(case)}_[0-9][0-9][0-9][0-9]{glob.escape(ending)}"))
    return find_images([str(f) for f in beside] or [file], channels)[0]


def _files(path: Path) -> list[str]:
    if path.is_dir():
        found = sorted(os.path.join(path, f) for f in os.listdir(path) if ending_of(f) and not f.startswith("."))
        if not found:
            raise ValueError(f"No images in {path}: expected files that nnU-Net reads as volumes ({', '.join(ENDINGS)}).")
        return found
    if not path.is_file():
        raise ValueError(f"{path}: expected an image or a folder of images, found neither.")
    if ending_of(path.name) is None:
        raise ValueError(f"{path} is no image that nnU-Net reads as a volume ({', '.join(ENDINGS)}).")
    return [str(path)]


def preprocess(found: FoundImage, network: Frozen, labels: str | Path | None = None, dataset_json: dict | None = None) -> Image:
    """Read and preprocess an image as the network's plans say; ``labels``: a file of the same shape, resampled with it.

    Raises:
        ValueError: the image cannot be read, is empty, or the labels do not fit it; names the file.
    """
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = PlansManager(network.plans)
    manager = plans.get_configuration(network.configuration)
    try:
        read = read_images(found.files)
        array, properties = read.images, read.properties
        segmentation = None if labels is None else read_images([str(labels)]).images
    except ValueError as e:
        raise ValueError(f"{found.files[0]}: {e}") from None
    if segmentation is not None and segmentation.shape[1:] != array.shape[1:]:
        raise ValueError(f"{labels}: expected the shape of its image, {array.shape[1:]}, found {segmentation.shape[1:]}.")
    known = dataset_json or {"labels": {"background": 0}, "channel_names": {}}
    preprocessor = manager.preprocessor_class(verbose=False)
    try:
        data, seg, properties = preprocessor.run_case_npy(array, segmentation, properties, plans, manager, known)
    except (KeyError, RuntimeError, AssertionError) as e:  # what the plans lack, an image of one value
        raise ValueError(f"{found.files[0]}: nnU-Net cannot preprocess it as the network's plans say: {e!r}") from None
    if not np.isfinite(data).all():
        raise ValueError(f"{found.files[0]} holds NaN or Inf after preprocessing.")
    i, j, k = plans.transpose_forward
    kept = None if labels is None else np.maximum(seg[0], 0).astype(np.int16)
    voxels = torch.from_numpy(np.ascontiguousarray(data, np.float32))
    si, sj, sk = network.spacing or (float(properties["spacing"][a]) for a in (i, j, k))
    return Image(found.name, voxels, (si, sj, sk), properties, (i, j, k), kept)


def body(voxels: Tensor) -> Tensor:
    """(I, J, K) bool: what is not air. ``voxels``: (C, I, J, K), normalised.

    Air is what lies within its noise of the dark, in every channel, or within 0.02 of the commonest value where only the body was
    normalised and everything else is one value. Where that leaves less than a hundredth, everything counts.
    """
    x = voxels.float()
    flat = x.flatten(1)[:, :: max(1, x[0].numel() // 100_000)]
    median = torch.quantile(flat, 0.5, dim=1)[:, None, None, None]
    constant = ((flat - median.flatten()[:, None]).abs() < 1e-6).float().mean() > 0.2
    air = (x < torch.tensor([_brightest_air(channel.numpy()) for channel in flat])[:, None, None, None]).all(0)
    if constant:
        air |= ((x - median).abs() < 0.1 * AIR_TOLERANCE).all(0)
    return ~air if (~air).float().mean() > 0.01 else torch.ones_like(air)


def _brightest_air(values: np.ndarray) -> float:
    """Air is about the commonest dark value, as far above as the darkest (1 % quantile) are below it and a quarter more, at least
    0.2. Where that is far from the darkest (lungs in a CT), there is next to no air: 0.2 above them."""
    low = float(np.quantile(values, 0.01))
    if low == values.max():
        return low + AIR_TOLERANCE
    threshold = otsu(values)
    counts, edges = np.histogram(values[(values >= low) & (values < max(threshold, low + AIR_TOLERANCE))], bins=64)
    commonest = float(edges[counts.argmax() : counts.argmax() + 2].mean())
    if commonest - low > 0.15 * (threshold - low):
        return low + AIR_TOLERANCE
    return commonest + max(AIR_TOLERANCE, 1.25 * (commonest - low))
