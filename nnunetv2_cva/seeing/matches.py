"""Where the places of one image are found in others, in the same colours, and how far off by the labels' centroids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import distance_transform_edt

from nnunetv2_cva.seeing.describe import Described, nearest, squared_distances
from nnunetv2_cva.seeing.images import Image

REGIONS = 8  # of k-means
SAMPLED = 20_000  # cells that PCA and k-means are fitted to


@dataclass(frozen=True)
class Matches:
    """Points of one image found in another: ``places`` (P, 3) in its voxels; ``heat`` (P, *bins) how similar every cell is, for
    descriptions of length 1 the cosine; ``best`` (P,) that of the place."""

    places: np.ndarray
    heat: np.ndarray
    best: np.ndarray


def choose_points(described: Described, number: int) -> np.ndarray:
    """(number, 3) voxel coordinates spread over the body: the cell deepest in it, then always the cell farthest from all chosen,
    among those that are not at the body's surface.

    Raises:
        ValueError: the image has fewer cells.
    """
    mask = described.body.reshape(described.bins).numpy()
    edge = np.array(described.spacing) * described.size / described.bins  # mm of a cell
    depth = distance_transform_edt(np.pad(mask, 1), sampling=edge)[1:-1, 1:-1, 1:-1].reshape(-1)
    centres = described.centres()
    inner = np.flatnonzero(depth >= depth.max() / 3)
    if len(inner) < number:
        raise ValueError(f"Points: expected at most {len(inner)}, as many cells as lie in the body, found {number}.")
    places = centres[inner] * described.spacing
    chosen = [int(depth[inner].argmax())]
    distance = np.full(len(inner), np.inf)
    while len(chosen) < number:
        distance = np.minimum(distance, ((places - places[chosen[-1]]) ** 2).sum(1))
        chosen.append(int(distance.argmax()))
    return centres[inner[chosen]]


def match(source: Described, points: np.ndarray, target: Described) -> Matches:
    """The most similar cell of the target's body for every point (P, 3) of the source."""
    queries = source.at(points)
    number, _ = nearest(queries, target.rows, target.body)
    heat = 1 - squared_distances(queries, target.rows) / 2
    best = heat.gather(1, number[:, None])[:, 0]
    return Matches(target.centres()[number.numpy()], heat.reshape(-1, *target.bins).numpy(), best.numpy())


def colours(described: Sequence[Described]) -> list[np.ndarray]:
    """(R, 3) in [0, 1] for every image: the first three principal components of all images' bodies together, so that one colour
    means one thing. Each is stretched between its 1 % and 99 % quantiles."""
    rows = _sample(described)
    mean = rows.mean(0)
    basis = torch.linalg.svd(rows - mean, full_matrices=False).Vh[:3].T
    low, high = torch.quantile((rows - mean) @ basis, torch.tensor([0.01, 0.99]), dim=0)
    return [(((d.rows - mean) @ basis - low) / (high - low).clamp_min(1e-6)).clamp(0, 1).numpy() for d in described]


def regions(described: Sequence[Described], number: int = REGIONS, seed: int = 0) -> list[np.ndarray]:
    """(R,) for every image: which of ``number`` clusters of all images' bodies each cell belongs to (k-means), -1 in air."""
    from sklearn.cluster import KMeans

    means = KMeans(number, n_init=3, random_state=seed).fit(_sample(described).numpy())
    return [np.where(d.body.numpy(), means.predict(d.rows.numpy()), -1) for d in described]


def _sample(described: Sequence[Described]) -> torch.Tensor:
    """As many rows of every image's body."""
    each = max(1, SAMPLED // len(described))
    bodies = [d.rows[d.body] for d in described]
    return torch.cat([b[:: max(1, len(b) // each)] for b in bodies])


def centroids(image: Image, labels: Sequence[int]) -> np.ndarray:
    """(L, 3): of every label in voxels; NaN where the image does not show it."""
    assert image.labels is not None
    found = [np.argwhere(image.labels == c) for c in labels]
    return np.array([p.mean(0) + 0.5 if len(p) else np.full(3, np.nan) for p in found])


def errors_mm(
    images: Sequence[Image], described: Mapping[str, Sequence[Described]], labels: Sequence[int]
) -> dict[str, list[float]]:
    """For every kind of description: how far, in mm, the match of a label's centroid in the first image lies from the label's
    centroid in each of the others. The same list of (image, label) for all."""
    points = centroids(images[0], labels)
    found: dict[str, list[float]] = {kind: [] for kind in described}
    for number, image in enumerate(images[1:], 1):
        truth = centroids(image, labels)
        known = ~np.isnan(points).any(1) & ~np.isnan(truth).any(1)
        if known.any():
            for kind, each in described.items():
                places = match(each[0], points[known], each[number]).places
                found[kind] += np.linalg.norm((places - truth[known]) * image.spacing, axis=1).tolist()
    return found
