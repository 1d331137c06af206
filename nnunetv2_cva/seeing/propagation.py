"""One-shot label propagation: the labels of one image carried to others by nearest descriptions, whole or on random windows.

On whole images that are centred alike, position alone carries most labels. Where a window was cut out at random, it says little.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nnunetv2_cva.seeing.dense import DenseMap
from nnunetv2_cva.seeing.describe import Described, by_intensity, by_position, cells, from_maps, nearest
from nnunetv2_cva.seeing.frozen import Frozen
from nnunetv2_cva.seeing.images import Image

POSITION, INTENSITY = "position", "intensity"
DRAWS = 20  # of the window that labels come from; the one that shows most of every label is taken
LEAST_VOXELS = 30  # labelled ones that a window shows


@dataclass(frozen=True)
class Carried:
    """Labels of ``source``, or of a window of it, carried to ``target`` by ``row``: ``dice`` of every label, NaN where
    neither the result nor the truth has it."""

    source: str
    target: str
    row: str
    dice: tuple[float, ...]


def carry(source: Described, labels: Tensor, target: Described) -> Tensor:
    """(R,) labels of the target's cells: each that of the nearest description in the source. ``labels``: (R,) of the source."""
    return labels[nearest(target.rows, source.rows)[0]]


def dice(found: np.ndarray, truth: np.ndarray, labels: Sequence[int]) -> tuple[float, ...]:
    """Of every label; NaN where neither has it."""
    sizes = [(int((found == c).sum()), int((truth == c).sum()), int(((found == c) & (truth == c)).sum())) for c in labels]
    return tuple(2 * both / (a + b) if a + b else float("nan") for a, b, both in sizes)


def labels_on(labels: np.ndarray, bins: Sequence[int]) -> Tensor:
    """(R,): the label of the voxel in which each cell's centre lies."""
    index = np.ix_(*[((np.arange(b) + 0.5) * n / b).astype(int) for b, n in zip(bins, labels.shape)])
    return torch.from_numpy(labels[index].reshape(-1).astype(np.int64))


def from_first(images: Sequence[Image], described: Mapping[str, Sequence[Described]], labels: Sequence[int]) -> list[Carried]:
    """The labels of the first image carried to each of the others, all of them whole, by every kind of description. Labels are
    read, and compared, at the centres of the descriptions' cells."""
    found = []
    for number, image in enumerate(images[1:], 1):
        for row, each in described.items():
            assert images[0].labels is not None and image.labels is not None
            result = carry(each[0], labels_on(images[0].labels, each[0].bins), each[number])
            truth = labels_on(image.labels, each[number].bins)
            found.append(Carried(images[0].name, image.name, row, dice(result.numpy(), truth.numpy(), labels)))
    return found


def one_shot(
    cases: Sequence[Image],
    networks: Mapping[str, Frozen],
    labels: Sequence[int],
    pairs: int = 20,
    seed: int = 0,
    most_cells: int = 3_000,
    tick: Callable[[], object] = lambda: None,
) -> list[Carried]:
    """``pairs`` times: the labels of a random window of one case carried to a random window of another, by position in the
    window, by intensity and by every network. All rows see the same windows, of the networks' view.

    Raises:
        ValueError: fewer than two cases with labels, or no networks.
    """
    labelled = [c for c in cases if c.labels is not None and np.isin(c.labels, labels).sum() >= LEAST_VOXELS]
    if len(labelled) < 2:
        raise ValueError(f"Label propagation needs at least two cases with labels {list(labels)}, found {len(labelled)}.")
    if not networks:
        raise ValueError("Label propagation needs at least one network.")
    view = next(iter(networks.values())).view
    rng, found = np.random.default_rng(seed), []
    for _ in range(pairs):
        a, b = rng.choice(len(labelled), 2, replace=False)
        windows = [random_window(labelled[a], view, labels, DRAWS, rng), random_window(labelled[b], view, labels, 1, rng)]
        bins = cells(view, most_cells)
        carried, truth = (labels_on(w.labels, bins) for w in windows)  # type: ignore[arg-type]
        for row in (POSITION, INTENSITY, *networks):
            described = [describe_window(w, row, networks.get(row), bins) for w in windows]
            result = carry(described[0], carried, described[1])
            found.append(Carried(windows[0].name, windows[1].name, row, dice(result.numpy(), truth.numpy(), labels)))
        tick()
    return found


def means(found: Sequence[Carried]) -> dict[str, tuple[float, float]]:
    """For every row the mean Dice over pairs (each the mean over its labels) and half of its 95 % interval."""
    per_row: dict[str, list[float]] = {}
    for c in found:
        per_row.setdefault(c.row, []).append(float(np.nanmean(c.dice)) if not np.isnan(c.dice).all() else float("nan"))
    return {row: mean_and_interval([v for v in values if not np.isnan(v)]) for row, values in per_row.items()}


def mean_and_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of the 95 % interval by Student's t; NaN where there are too few values to say."""
    from scipy.stats import t

    n = len(values)
    if n == 0:
        return float("nan"), float("nan")
    half = float(t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
    return float(np.mean(values)), half


def random_window(case: Image, view: Sequence[int], labels: Sequence[int], draws: int, rng: np.random.Generator) -> Image:
    """A random window of a case that shows enough labelled voxels; of several draws the one that shows most of its least visible
    label. Cases smaller than the view are padded with zeros, at a random place."""
    assert case.labels is not None
    present = [c for c in labels if (case.labels == c).any()]
    totals = [(case.labels == c).sum() for c in present]
    labelled = np.argwhere(np.isin(case.labels, present))
    best, chosen, left = -1.0, [0, 0, 0], draws
    for attempt in range(100 * draws):
        start = [int(rng.integers(min(0, n - v), max(0, n - v) + 1)) for n, v in zip(case.size, view)]
        if attempt >= 50 * draws:  # small structures in large images: around one of their voxels
            start = [int(p - rng.integers(v)) for p, v in zip(labelled[rng.integers(len(labelled))], view)]
        cut = _cut(case.labels[None], start, view)[0]
        if np.isin(cut, present).sum() < LEAST_VOXELS:
            continue
        shown = float(min((cut == c).sum() / total for c, total in zip(present, totals)))
        if shown > best:
            best, chosen = shown, start
        left -= 1
        if left == 0:
            break
    voxels = torch.from_numpy(_cut(case.voxels.numpy(), chosen, view))
    return Image(case.name, voxels, case.spacing, {}, case.order, _cut(case.labels[None], chosen, view)[0])


def _cut(volume: np.ndarray, start: Sequence[int], view: Sequence[int]) -> np.ndarray:
    from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd

    return np.ascontiguousarray(crop_and_pad_nd(volume, [[s, s + v] for s, v in zip(start, view)]))


@torch.inference_mode()
def describe_window(window: Image, row: str, network: Frozen | None, bins: tuple[int, int, int]) -> Described:
    """A window of the network's view, by the network or, without one, by position in the window or intensity, as ``row`` says."""
    if network is None:
        described = (by_position if row == POSITION else by_intensity)(window, bins)
        return described if row == INTENSITY else _in_window(described)
    maps = network.encode(window.voxels[None].to(network.device))
    return from_maps(window, [DenseMap(m[0].float(), t.stride, t.offset, window.size) for m, t in zip(maps, network.taps)], bins)


def _in_window(described: Described) -> Described:
    """By position in the window itself, and not in the body that it shows."""
    rows = torch.from_numpy(described.centres() / described.size).float()
    return Described(rows, described.bins, described.size, described.spacing, described.body)
