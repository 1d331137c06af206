"""Synthetic anatomy that looks like abdominal MRI, in nnU-Net's raw layout.

One template torso, given by a few implicit shapes in its own coordinates. A case deforms these coordinates smoothly and
adds what makes images differ between patients and scanners: tissue contrast, texture, a bias field, noise, the field of
view. Liver, spleen, spine and bowel are about equally bright, so brightness alone does not tell them apart.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter, zoom

from nnunetv2_cva.files import write_json
from nnunetv2_cva.seeding import stream

LABELS = {"background": 0, "body": 1, "liver": 2, "kidneys": 3, "vessel": 4, "lesion": 5}
SPACING = (2.5, 2.0, 2.0)  # mm along (i, j, k)
HALF_WIDTH = 28.0  # voxels from the middle of the torso to 1 in template coordinates


def make_case(seed: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """One case: image (I, J, K) int16 and labels (I, J, K) uint8. Always the same for the same seed and number.

    Axes are array axes: i from feet to head, j from front to back, k from one side to the other. 48 to 64 voxels each.
    """
    for attempt in range(100):
        rng = stream("demo case", seed, number, attempt)
        shape = tuple(int(n) for n in rng.integers(48, 65, 3))
        tissue, labels = _shapes(_coordinates(shape, rng), rng)
        if all((labels == label).sum() >= 30 for label in LABELS.values()):
            return _scan(tissue, rng), labels
    raise AssertionError("a case that shows every structure is found within a few draws")


def write_dataset(folder: Path, seed: int, count: int, tick: Callable[[], object] = lambda: None) -> list[str]:
    """Write ``count`` cases in nnU-Net's raw layout: imagesTr, labelsTr, dataset.json.

    Returns their names. ``tick`` is called after every case.
    """
    names = [f"case_{n:03d}" for n in range(count)]
    for number, name in enumerate(names):
        image, labels = make_case(seed, number)
        _write(image, folder / "imagesTr" / f"{name}_0000.nii.gz")
        _write(labels, folder / "labelsTr" / f"{name}.nii.gz")
        tick()
    description = {
        "name": "CVADemo",
        "description": "Synthetic anatomy of nnUNetv2_cva demo. No patient was scanned.",
        "channel_names": {"0": "MRI"},
        "labels": LABELS,
        "numTraining": count,
        "file_ending": ".nii.gz",
    }
    write_json(folder / "dataset.json", description)
    return names


def _write(volume: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(volume)
    image.SetSpacing(SPACING[::-1])
    sitk.WriteImage(image, str(path), useCompression=True)


def _coordinates(shape: tuple[int, ...], rng: np.random.Generator) -> list[np.ndarray]:
    """Template coordinates of every voxel: field of view, size and place of the patient, and a smooth deformation."""
    size = HALF_WIDTH * rng.uniform(0.9, 1.08, 3)
    middle = np.divide(shape, 2) + rng.uniform(-3, 3, 3)
    grid = np.meshgrid(*[(np.arange(n) + 0.5 - m) / s for n, m, s in zip(shape, middle, size)], indexing="ij")
    tilt = rng.normal(0, 0.06, (3, 3))
    return [
        grid[d] + sum(tilt[d, e] * grid[e] for e in range(3) if e != d) + 0.075 * _smooth_field(shape, (4, 4, 4), rng)
        for d in range(3)
    ]


def _smooth_field(shape: tuple[int, ...], nodes: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """Random (I, J, K) field of standard deviation about 1: cubic splines between ``nodes`` grid points."""
    return zoom(rng.normal(size=nodes), np.divide(shape, nodes), order=3, mode="nearest", grid_mode=True)


def _texture(shape: tuple[int, ...], sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Random (I, J, K) field of mean 0 and standard deviation 1 with grains of about ``sigma`` voxels."""
    field = gaussian_filter(rng.normal(size=shape), sigma, mode="wrap")
    return field / field.std()


def _blob(at: list[np.ndarray], centre: tuple[float, ...], radii: tuple[float, ...]) -> np.ndarray:
    """Squared distance from ``centre`` in units of ``radii``: below 1 inside the ellipsoid."""
    return sum(((x - c) / r) ** 2 for x, c, r in zip(at, centre, radii))  # type: ignore[return-value]


def _shapes(at: list[np.ndarray], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Brightness of the tissues (0 to 1, textured) and labels, both (I, J, K). Later structures cover earlier ones."""
    i, j, k = at
    shape = i.shape
    tissue, labels = np.full(shape, 0.01), np.zeros(shape, np.uint8)
    fine, coarse = _texture(shape, 0.8, rng), _texture(shape, 2.0, rng)

    def fill(where: np.ndarray, brightness: float, grain: np.ndarray | float = 0.0, label: str = "body") -> None:
        tissue[where] = (brightness + rng.uniform(-0.05, 0.05) + grain * np.ones(shape))[where]
        labels[where] = LABELS[label]

    outline = (j / (0.7 - 0.06 * i)) ** 2 + (k / (0.88 - 0.08 * i**2)) ** 2
    fill(outline < 1, 0.85, 0.03 * fine)  # fat under the skin
    fill(outline < 0.8, 0.4, 0.04 * coarse)  # muscle
    fill(_blob([i * 0, j, k], (0, -0.1, 0), (1, 0.42, 0.66)) < 1, 0.2, 0.05 * coarse)  # between the organs
    discs = np.sin(9 * i + rng.uniform(0, 6)) > 0.75
    spine = _blob([i * 0, j, k], (0, 0.36, 0), (1, 0.15, 0.16))
    fill(spine < 1, 0.55, 0.04 * fine)
    fill((spine < 1) & discs, 0.25)
    for _ in range(7):  # bowel: unlabelled, of any brightness, in front
        centre = (rng.uniform(-0.9, 0.1), rng.uniform(-0.38, 0.0), rng.uniform(-0.35, 0.5))
        fill(_blob(at, centre, tuple(rng.uniform(0.1, 0.2, 3))) < 1, rng.uniform(0.3, 0.7), 0.05 * fine)
    fill(_blob(at, (0.4, 0.12, 0.5), (0.28, 0.26, 0.15)) < 1, 0.58, 0.03 * fine)  # spleen: unlabelled
    fill(_tube(at, rng) < 1, 0.95, 0.03 * fine, "vessel")
    liver = _blob(at, (0.42, -0.06, -0.3), (0.5, 0.38, 0.42)) + 0.9 * np.clip(k + 0.1, 0, None)
    fill(liver < 1, 0.58, 0.03 * fine + 0.03 * coarse, "liver")
    for side in (-1, 1):
        kidney = _blob(at, (-0.28 + 0.05 * side, 0.24, 0.4 * side), (0.32, 0.17, 0.17))
        fill(kidney < 1, 0.75, 0.02 * fine, "kidneys")
        fill(kidney < 0.25, 0.6, 0.03 * fine, "kidneys")
    centre = (0.42 + rng.uniform(-0.25, 0.25), -0.06 + rng.uniform(-0.17, 0.17), -0.36 + rng.uniform(-0.17, 0.17))
    lesion = _blob(at, centre, (rng.uniform(0.13, 0.2),) * 3) + 0.2 * coarse
    fill((lesion < 1) & (liver < 0.95), 0.33, 0.03 * fine, "lesion")
    return tissue, labels


def _tube(at: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Squared distance from a winding vessel in front of the spine and from its branch, in units of their radii."""
    i, j, k = at
    bend, phase = rng.uniform(0.03, 0.07), rng.uniform(0, 2 * np.pi)
    trunk = ((j - 0.12 - bend * np.sin(3 * i)) / 0.09) ** 2 + ((k - 0.06 - bend * np.sin(4 * i + phase)) / 0.09) ** 2
    along = np.clip(k - 0.06, 0, 0.42)  # the branch runs sideways
    branch = ((i - 0.1 - 0.25 * along) / 0.07) ** 2 + ((j - 0.12 + 0.2 * along) / 0.07) ** 2 + ((k - 0.06 - along) / 0.07) ** 2
    return np.minimum(trunk, branch)


def _scan(tissue: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a scanner makes of it: contrast, partial volume, bias field, Rician noise, arbitrary units."""
    image = gaussian_filter(np.clip(tissue, 0, None) ** rng.uniform(0.85, 1.2), 0.55)
    image *= np.exp(0.15 * _smooth_field(tissue.shape, (2, 3, 3), rng))
    sigma = rng.uniform(0.02, 0.05)
    noisy = np.hypot(image + rng.normal(0, sigma, image.shape), rng.normal(0, sigma, image.shape))
    return np.clip(noisy * rng.uniform(600, 1400), 0, 32767).astype(np.int16)
