"""The pictures of the demo."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib import rc_context, rcdefaults
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nnunetv2_cva.config import DEFAULT, CVAConfig, resolve
from nnunetv2_cva.demo.workspace import CONFIGURATION, Workspace
from nnunetv2_cva.files import written_whole
from nnunetv2_cva.seeding import stream
from nnunetv2_cva.views.cases import Case
from nnunetv2_cva.views.geometry import Pair, Triple, draw_pair
from nnunetv2_cva.views.resample import show, window

VIEW_COLOURS = ("#38a8ff", "#ff9a1f")
SHARED_COLOUR = "#ffffff"
BIN_COLOURS = ("#ff4fa3", "#54e346", "#ffe14d", "#b98cff")


def draw_pair_figure(image: np.ndarray, pair: Pair, views: np.ndarray, bins: Triple) -> Figure:
    """Two views of a case, the region they share and its bins, in the (j, k) plane through the middle layer of bins.

    ``image``: (I, J, K), the case. ``views``: (2, I, J, K). ``bins``: along each axis. Four bins are numbered to show
    that bin n of one view is bin n of the other. Of a rotated pair, outlines are projected onto the slice of the case.
    """
    figure = _figure(13.2, 5.6)
    axes = figure.subplots(1, 3, width_ratios=[1.25 * pair.shape[2] / pair.shape[1], *[pair.size[2] / pair.size[1]] * 2])
    layer = (bins[0] // 2 + 0.5) / bins[0]
    rois = pair.rois.astype(float) * np.array(pair.size)  # (2 views, 2, 3), voxels of the view
    depths = [float(r[0, 0] + (r[1, 0] - r[0, 0]) * layer) for r in rois]
    matrix, shift = pair.to_case(0)
    middle = matrix @ np.array([depths[0], *rois[0, :, 1:].mean(0)]) + shift

    _slice(axes[0], image, middle[0])
    for v, colour in enumerate(VIEW_COLOURS):
        whole = np.stack([np.zeros(3), np.array(pair.size, float)])
        x, y = _rectangle(pair, v, depths[v], whole[0, 1:], whole[1, 1:], in_view=False)
        axes[0].plot(x, y, color=colour, linewidth=3, label=f"view {v}")
    _bins(axes[0], pair, 0, depths[0], rois[0], bins, in_view=False)
    axes[0].set_title("one case, and where its two views lie")
    axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=3, frameon=False, labelcolor="linecolor")
    for v, colour in enumerate(VIEW_COLOURS):
        _slice(axes[1 + v], views[v], depths[v])
        _bins(axes[1 + v], pair, v, depths[v], rois[v], bins, in_view=True)
        mirrored = [name for name, m in zip("ijk", pair.views[v].mirrored, strict=True) if m]
        note = f"mirrored along {', '.join(mirrored)}" if mirrored else "not mirrored"
        axes[1 + v].set_title(f"view {v} ({note})", color=colour, fontweight="bold")
        for side in axes[1 + v].spines.values():
            side.set(color=colour, linewidth=3)
    figure.suptitle(
        f"Two views of one case share {pair.overlap:.0%} of their volume.\nThe shared region (white) has "
        f"{' x '.join(map(str, bins))} bins, of which one layer is drawn: bin n of both views is the same anatomy.",
        fontsize=11,
    )
    return figure


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _slice(axes: Axes, volume: np.ndarray, depth: float) -> None:
    """The (j, k) slice of a volume that contains ``depth``; voxel n is drawn from n to n + 1."""
    n = int(np.clip(np.floor(depth), 0, volume.shape[0] - 1))
    low, high = np.quantile(volume, (0.01, 0.995))
    axes.imshow(volume[n], cmap="gray", vmin=low, vmax=high, extent=(0, volume.shape[2], volume.shape[1], 0))
    axes.set(xticks=[], yticks=[], facecolor="black")


def _rectangle(
    pair: Pair, view: int, depth: float, first: np.ndarray, last: np.ndarray, *, in_view: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Horizontal and vertical places (5 each) of a rectangle's outline, in coordinates of the view or of the case.

    ``first``, ``last``: (2,) opposite corners (j, k), in coordinates of the view; ``depth``: of the plane.
    """
    (j0, k0), (j1, k1) = first, last
    points = np.array([(depth, j0, k0), (depth, j0, k1), (depth, j1, k1), (depth, j1, k0), (depth, j0, k0)])
    if not in_view:
        matrix, shift = pair.to_case(view)
        points = points @ matrix.T + shift
    return points[:, 2], points[:, 1]


def _bins(axes: Axes, pair: Pair, view: int, depth: float, roi: np.ndarray, bins: Triple, in_view: bool) -> None:
    """The shared region, its bins, and the numbers of those in its corners. ``roi``: (2, 3), voxels of the view."""
    (_, *begin), (_, *end) = roi
    begin, step = np.array(begin), np.subtract(end, begin) / bins[1:]
    corners = [(r, c) for r in sorted({0, bins[1] - 1}) for c in sorted({0, bins[2] - 1})]
    for r, c in np.ndindex(bins[1:]):
        x, y = _rectangle(pair, view, depth, begin + step * (r, c), begin + step * (r + 1, c + 1), in_view=in_view)
        axes.plot(x, y, color=SHARED_COLOUR, linewidth=0.5)
        if (r, c) in corners:
            axes.fill(x, y, color=BIN_COLOURS[corners.index((r, c))], alpha=0.7, linewidth=0)
            number = str((bins[0] // 2 * bins[1] + r) * bins[2] + c)
            size = 9 if in_view else 6
            axes.text(x[:4].mean(), y[:4].mean(), number, ha="center", va="center", fontsize=size, fontweight="bold")
    x, y = _rectangle(pair, view, depth, begin, begin + step * bins[1:], in_view=in_view)
    axes.plot(x, y, color=SHARED_COLOUR, linewidth=2)


def draw_pair_of(case: Case, size: Triple, config: CVAConfig, seed: int) -> Figure:
    """The figure of a pair drawn and read as in training, but without rotation, which a slice cannot show."""
    rng = stream("demo figure", seed)
    while True:
        pair = draw_pair(case.shape, size, config, rng)
        if pair.rotation is None and 0.35 < pair.overlap < 0.6:
            break
    views, inside = torch.zeros(2, case.channels, *size), torch.zeros(2, *size, dtype=torch.bool)
    for v in (0, 1):
        box = window(pair, v)
        show(case.read(box), box, pair, v, views[v], inside[v])
    whole = case.read(np.stack([np.zeros(3, int), np.array(case.shape)], axis=1))
    return draw_pair_figure(whole[0], pair, views[:, 0].numpy(), config.roi_size)


def write_views(workspace: Workspace, seed: int) -> None:
    """Write ``views.png``."""
    plans = workspace.plans()
    config = resolve(DEFAULT, plans, CONFIGURATION, {})
    i, j, k = plans["configurations"][CONFIGURATION]["patch_size"]
    case = Case(str(min(workspace.cases.glob("*[0-9].b2nd"))))
    with rc_context():
        rcdefaults()  # nnU-Net's plots leave seaborn's fonts behind
        figure = draw_pair_of(case, (i, j, k), config, seed)
        with written_whole(workspace.folder / "views.png") as partial:
            figure.savefig(partial, dpi=110, format="png")
