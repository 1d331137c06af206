"""What an image is described by, cell by cell: a network's features, or what a reviewer would ask for beside them.

Nearest are descriptions of the smallest Euclidean distance, whatever they describe by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.nn.functional import grid_sample, normalize

from nnunetv2_cva.seeing.dense import DenseMap, dense_maps, on_grid
from nnunetv2_cva.seeing.frozen import Frozen
from nnunetv2_cva.seeing.images import Image, body

MOST_CELLS = 100_000
OVERLAP = 0.25  # of the windows; half of it or none changes features less than an untrained network differs from a trained one


@dataclass(frozen=True)
class Described:
    """An image on a grid of ``bins`` equal boxes (cells). ``rows`` (R, D) float32, the last axis of the grid running fastest;
    ``body`` (R,) bool: what is not air; ``size``: voxels of the image; ``spacing``: mm."""

    rows: Tensor
    bins: tuple[int, int, int]
    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    body: Tensor

    def centres(self) -> np.ndarray:
        """(R, 3): where the cells' centres are, in voxels of the image."""
        axes = [(np.arange(b) + 0.5) * n / b for b, n in zip(self.bins, self.size)]
        return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)

    def at(self, points: np.ndarray) -> Tensor:
        """(P, D): the description at points (P, 3) in voxels of the image, interpolated; as long as the rows where these have
        one length."""
        volume = self.rows.T.reshape(1, -1, *self.bins)
        place = torch.as_tensor(np.asarray(points, float) / self.size * 2 - 1, dtype=torch.float32)
        where = place.flip(1)[None, None, None]  # torch wants the last axis first
        found = grid_sample(volume, where, align_corners=False, padding_mode="border")[0, :, 0, 0].T
        lengths = self.rows.norm(dim=1)
        return normalize(found, dim=1) if torch.allclose(lengths, torch.ones_like(lengths), atol=1e-3) else found


def cells(size: Sequence[int], most: int = MOST_CELLS) -> tuple[int, int, int]:
    """A grid of cells of 1, 2, 3... voxels with at most ``most`` of them."""
    edge = 1
    while np.prod([-(-n // edge) for n in size]) > most:
        edge += 1
    i, j, k = (-(-n // edge) for n in size)
    return i, j, k


def by_network(
    image: Image, network: Frozen, bins: tuple[int, int, int], taps: Sequence[int] | None = None, tick: Callable = lambda: None
) -> Described:
    """All taps, each averaged over the cells on its own grid, standardised per channel over the body, and of length 1: so the
    squared distance of two is 2 - 2 cos."""
    voxels = image.voxels.to(network.device)
    maps = dense_maps(voxels, network.encode, network.taps, network.view, OVERLAP, taps, tick)
    return from_maps(image, maps, bins)


def from_maps(image: Image, maps: Sequence[DenseMap], bins: tuple[int, int, int]) -> Described:
    """The same from maps that are there already."""
    rows = on_grid(maps, bins).cpu().flatten(1).T
    inside = _body_on(image, bins)
    std, mean = torch.std_mean(rows[inside], dim=0)
    return _described(image, bins, normalize((rows - mean) / std.clamp_min(1e-6), dim=1))


def by_intensity(image: Image, bins: tuple[int, int, int]) -> Described:
    """The voxel's value and two blurred ones (sigma 1 and 2 voxels), of every channel."""
    volumes = [v for c in image.voxels.numpy() for v in (c, gaussian_filter(c, 1), gaussian_filter(c, 2))]
    maps = [DenseMap(torch.from_numpy(np.stack(volumes)), (1, 1, 1), (0.0, 0.0, 0.0), image.size)]
    return _described(image, bins, on_grid(maps, bins).flatten(1).T)


def by_position(image: Image, bins: tuple[int, int, int]) -> Described:
    """The relative position in the body's bounding box: where a point lies says where it is found, and nothing else."""
    empty = _described(image, bins, torch.zeros(int(np.prod(bins)), 1))
    centres = torch.from_numpy(empty.centres()).float()
    inside = centres[empty.body]
    low, high = inside.amin(0), inside.amax(0)
    return _described(image, bins, (centres - low) / (high - low).clamp_min(1e-6))


def coarser(described: Described, most: int) -> Described:
    """A network's description on a grid of at most ``most`` cells, by the means of its rows, of length 1 again."""
    bins = cells(described.size, most)

    def means(values: Tensor) -> Tensor:
        volume = values.reshape(len(values), *described.bins)
        return on_grid([DenseMap(volume, (1, 1, 1), (0.0, 0.0, 0.0), described.bins)], bins).flatten(1)

    rows, inside = means(described.rows.T).T, means(described.body.float()[None])[0] > 0.5
    return Described(normalize(rows, dim=1), bins, described.size, described.spacing, inside)


def nearest(queries: Tensor, rows: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """For queries (Q, D) the number of the nearest of ``rows`` (R, D) and the squared distance to it, both (Q,); only rows with
    ``allowed`` (R,) True count."""
    numbers, distances = [], []
    for part in queries.split(max(1, 20_000_000 // max(1, len(rows)))):
        d = squared_distances(part, rows)
        if allowed is not None:
            d = d.masked_fill(~allowed, torch.inf)
        least, number = d.min(dim=1)
        numbers.append(number)
        distances.append(least)
    return torch.cat(numbers), torch.cat(distances)


def squared_distances(queries: Tensor, rows: Tensor) -> Tensor:
    """(Q, R)."""
    return (queries.square().sum(1)[:, None] + rows.square().sum(1) - 2 * queries @ rows.T).clamp_min(0)


def _described(image: Image, bins: tuple[int, int, int], rows: Tensor) -> Described:
    return Described(rows.contiguous(), bins, image.size, image.spacing, _body_on(image, bins))


def _body_on(image: Image, bins: tuple[int, int, int]) -> Tensor:
    mask = DenseMap(body(image.voxels).float()[None], (1, 1, 1), (0.0, 0.0, 0.0), image.size)
    return on_grid([mask], bins).flatten() > 0.5
