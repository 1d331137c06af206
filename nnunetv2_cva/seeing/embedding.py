"""Features of images as files: one per image, written whole, so that a run can be killed, repeated and split over machines."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nnunetv2_cva.files import write_text, written_whole
from nnunetv2_cva.seeing.dense import DenseMap, check_taps, dense_maps, mean_vector, on_grid, window_vectors
from nnunetv2_cva.seeing.frozen import Frozen, frozen
from nnunetv2_cva.seeing.images import FoundImage, Image, find_image, preprocess
from nnunetv2_cva.transfer.network import Loaded

Level = Literal["image", "windows", "dense"]
Format = Literal["npz", "b2nd", "nifti"]
TABLE, VECTORS = "embeddings.csv", "embeddings.npz"


@dataclass(frozen=True)
class Wanted:
    """What is computed and how it is stored. ``taps``: their numbers, None for all. ``format``: of dense maps."""

    level: Level
    folder: Path
    taps: tuple[int, ...] | None = None
    format: Format = "npz"
    overlap: float = 0.5

    def files(self, name: str, network: Frozen) -> list[Path]:
        """What there is of an image when it is done; the last is written last."""
        if self.level != "dense" or self.format == "npz":
            return [self.folder / f"{name}.npz"]
        ending = "b2nd" if self.format == "b2nd" else "nii.gz"
        return [self.folder / f"{name}_tap{t}.{ending}" for t in check_taps(self.taps, network.taps)]


@dataclass(frozen=True)
class Embedded:
    """An image's features: ``maps``, one per tap, and where their cells are. ``image``: as the network saw it, preprocessed."""

    maps: tuple[DenseMap, ...]
    image: Image

    @property
    def vector(self) -> np.ndarray:
        """(D,) the mean of every tap over the image."""
        return mean_vector(self.maps)

    def centres(self, number: int) -> np.ndarray:
        """(gi, gj, gk, 3): where the cells of map ``number`` have their centres, in voxels of the file's array, voxel n spanning
        [n, n + 1)."""
        m = self.maps[number]
        axes = [s * (np.arange(n) + 0.5) + o for s, o, n in zip(m.stride, m.offset, m.values.shape[1:])]
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
        return self.image.to_file(grid.reshape(-1, 3)).reshape(grid.shape)

    def on_image(self, number: int) -> np.ndarray:
        """(*shape of the file's array, C) float32: map ``number`` interpolated at every voxel, 0 where nnU-Net cropped."""
        return in_file_space(self.maps[number], self.image)


def embed_image(network: Loaded, file: str | Path, taps: Sequence[int] | None = None, overlap: float = 0.5) -> Embedded:
    """The features of an image file of any size, as ``nnUNetv2_cva embed`` computes them: preprocessed as the weights' plans say,
    seen through windows of the network's own view that overlap by ``overlap``, on the device of ``network.network``.

    ``taps``: which, 0 the finest, -1 the coarsest; all by default. Where a network has several channels, ``file`` is that of any
    of them (``<case>_0000``...).

    Raises:
        ValueError: the image cannot be read or preprocessed; no such tap; the weights do not say how images are preprocessed.
    """
    of = frozen(network)
    return embedded(find_image(str(file), of.channels), of, taps, overlap)


def embedded(
    found: FoundImage, network: Frozen, taps: Sequence[int] | None, overlap: float, tick: Callable[[], object] = lambda: None
) -> Embedded:
    """Preprocess an image and compute its maps. ``tick`` is called after every window.

    Raises:
        ValueError: the image cannot be read or preprocessed; there is no such tap.
    """
    wanted = check_taps(taps, network.taps)
    image = preprocess(found, network)
    maps = dense_maps(image.voxels.to(network.device), network.encode, network.taps, network.view, overlap, wanted, tick)
    return Embedded(tuple(maps), image)


def missing(images: Sequence[FoundImage], wanted: Wanted, network: Frozen) -> list[FoundImage]:
    """The images of which nothing, or not all, is there yet."""
    return [i for i in images if not all(f.is_file() for f in wanted.files(i.name, network))]


def embed(found: FoundImage, network: Frozen, wanted: Wanted, tick: Callable[[], object] = lambda: None) -> None:
    """Preprocess an image, compute its features and write them.

    image: ``vector`` (D,): the mean of every tap over the image. windows: ``vectors`` (W, D), the means over windows of the
    network's view, and ``starts`` (W, 3), where these begin in voxels of the preprocessed image. dense: a map per tap, with
    stride and offset: the centre of cell n is at ``stride * (n + 0.5) + offset`` of the preprocessed image.

    Raises:
        ValueError: the image cannot be read or preprocessed; there is no such tap.
        OSError: it cannot be written.
    """
    numbers = check_taps(wanted.taps, network.taps)
    (target, *_) = wanted.files(found.name, network)
    if wanted.level == "windows":
        image = preprocess(found, network)
        voxels = image.voxels.to(network.device)
        starts, vectors = window_vectors(voxels, network.encode, network.taps, network.view, wanted.overlap, numbers)
        about = _about(image, numbers)
        _write_npz(target, vectors=vectors.numpy(), starts=starts.numpy(), view=np.array(network.view), **about)
        return
    features = embedded(found, network, numbers, wanted.overlap, tick)
    if wanted.level == "image":
        _write_npz(target, vector=features.vector, **_about(features.image, numbers))
    else:
        _write_dense(features, numbers, network, wanted)


def _about(image: Image, numbers: Sequence[int]) -> dict[str, np.ndarray]:
    return {"size": np.array(image.size), "spacing": np.array(image.spacing), "taps": np.array(numbers)}


def gather(images: Sequence[FoundImage], wanted: Wanted) -> None:
    """``embeddings.csv`` and ``embeddings.npz`` (``names``, ``vectors``) from the files of all images, in their order."""
    vectors = []
    for image in images:
        with np.load(wanted.folder / f"{image.name}.npz") as content:
            vectors.append(content["vector"])
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["image", *(f"f{i}" for i in range(len(vectors[0])))])
    for image, vector in zip(images, vectors, strict=True):
        table.writerow([image.name, *(f"{v:.6g}" for v in vector)])
    write_text(wanted.folder / TABLE, text.getvalue())
    _write_npz(wanted.folder / VECTORS, names=np.array([i.name for i in images]), vectors=np.stack(vectors))


def in_file_space(m: DenseMap, image: Image) -> np.ndarray:
    """(*shape of the file's array, C) float32: the map interpolated at every voxel of the file, 0 where nnU-Net cropped."""
    box = image.properties["bbox_used_for_cropping"]
    inner = on_grid([m], [b - a for a, b in box], exactly=True).cpu().numpy()
    whole = np.zeros((len(inner), *image.properties["shape_before_cropping"]), np.float32)
    whole[(slice(None), *(slice(a, b) for a, b in box))] = inner
    back = np.argsort(image.order)
    return np.ascontiguousarray(np.moveaxis(whole.transpose(0, *(1 + back)), 0, -1))


def _write_dense(features: Embedded, numbers: Sequence[int], network: Frozen, wanted: Wanted) -> None:
    maps, image = features.maps, features.image
    if wanted.format == "npz":
        arrays = {f"tap{t}": m.values.cpu().numpy() for t, m in zip(numbers, maps)}
        places = {f"tap{t}_{what}": np.array(getattr(m, what)) for t, m in zip(numbers, maps) for what in ("stride", "offset")}
        _write_npz(wanted.files(image.name, network)[0], **arrays, **places, **_about(image, numbers))
        return
    for m, path in zip(maps, wanted.files(image.name, network), strict=True):
        if wanted.format == "b2nd":
            _write_b2nd(path, m, image)
        else:
            _write_nifti(path, in_file_space(m, image), image)


def _write_npz(path: Path, **arrays: Any) -> None:
    with written_whole(path) as partial, open(partial, "wb") as f:
        np.savez_compressed(f, **arrays)


def _write_b2nd(path: Path, m: DenseMap, image: Image) -> None:
    import blosc2

    place: dict[str, Any] = {"stride": list(m.stride), "offset": list(m.offset), "size": list(m.size)}
    with written_whole(path) as partial:
        values = np.ascontiguousarray(m.values.cpu().numpy())
        array = blosc2.asarray(values, urlpath=str(partial), mode="w")
        array.schunk.vlmeta["cva"] = {**place, "spacing": list(image.spacing)}


def _write_nifti(path: Path, values: np.ndarray, image: Image) -> None:
    """As a vector image in the file's own space."""
    with written_whole(path) as partial:
        renamed = partial.with_name(partial.name + ".nii.gz")  # both libraries choose the format by the ending
        try:
            if "nibabel_stuff" in image.properties:  # of files that SimpleITK refuses: axes that are not orthogonal
                _by_nibabel(renamed, values, image.properties["nibabel_stuff"]["original_affine"])
            else:
                _by_simpleitk(renamed, values, image.properties)
            renamed.replace(partial)
        finally:
            renamed.unlink(missing_ok=True)


def _by_simpleitk(path: Path, values: np.ndarray, properties: dict[str, Any]) -> None:
    import SimpleITK as sitk

    content = sitk.GetImageFromArray(values, isVector=True)
    geometry = properties.get("sitk_stuff")
    if geometry:
        content.SetSpacing(geometry["spacing"])
        content.SetOrigin(geometry["origin"])
        content.SetDirection(geometry["direction"])
    else:
        content.SetSpacing([float(s) for s in reversed(properties["spacing"])])
    sitk.WriteImage(content, str(path), useCompression=True)


def _by_nibabel(path: Path, values: np.ndarray, affine: np.ndarray) -> None:
    import nibabel

    content = nibabel.Nifti1Image(values.transpose(2, 1, 0, 3)[:, :, :, None], affine)  # NIfTI's fourth axis is time
    content.header.set_intent("vector")
    nibabel.save(content, str(path))
