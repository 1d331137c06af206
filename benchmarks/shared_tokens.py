"""What if Primus's teacher saw only the tokens that the bins of the shared region read? It does not; this is what was looked at.

    python benchmarks/shared_tokens.py                                         # FLOPs that it would take at the paper's sizes
    python benchmarks/shared_tokens.py --raw FOLDER_WITH_Dataset004_Hippocampus --folder WORK [--seeds 0 1 2]   # what it learns

The second trains the small Primus of ``objectives.py`` with MAE+CVA+Cont, as that script does, with such a teacher: every view
keeps as many tokens as the view of the step whose bins read most; the image vector pools what is kept.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import objectives
import torch
from torch import Tensor

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.model import primus
from nnunetv2_cva.model.branches import Teacher, _per_row, align
from nnunetv2_cva.model.roi_align import interpolation_matrices
from nnunetv2_cva.model.taps import Tap
from nnunetv2_cva.seeding import stream
from nnunetv2_cva.views.geometry import draw_pair

# Primus-M at 160^3: tokens per axis, channels, hidden channels of the MLP, blocks
CELLS, WIDTH, HIDDEN, BLOCKS, STRIDE = 20, 864, 2304, 16, 8
CASES = ((192, 224, 192), (240, 240, 240))


def read(rois: Tensor, bins: tuple[int, int, int], cells: tuple[int, ...], view: tuple[int, ...], tap: Tap) -> Tensor:
    """(N, T) bool: the tokens that RoIAlign reads."""
    i, j, k = (
        interpolation_matrices(
            rois[:, :, axis], bins[axis], cells[axis], view_size=view[axis], stride=tap.stride[axis], offset=tap.offset[axis]
        )
        .ne(0)
        .any(dim=1)
        for axis in range(3)
    )
    return (i[:, :, None, None] & j[:, None, :, None] & k[:, None, None, :]).flatten(1)


def flops(tokens: float) -> float:
    """Of the blocks for one view: four projections, the three matrices of the MLP, attention."""
    return BLOCKS * 2 * (4 * tokens * WIDTH**2 + 3 * tokens * WIDTH * HIDDEN + 2 * tokens**2 * WIDTH)


def estimate(steps: int) -> None:
    """The teacher's FLOPs relative to those for all tokens, with the default overlap and 4 cases per step."""
    tap, config = Tap(WIDTH, (STRIDE,) * 3, (0.0,) * 3), CVAConfig()
    own, padded = [], []
    for shape in CASES:
        for step in range(steps):
            pairs = [draw_pair(shape, (CELLS * STRIDE,) * 3, config, stream("shared", step, case)) for case in range(4)]
            rois = torch.from_numpy(np.concatenate([pair.rois for pair in pairs]))
            counts = read(rois, config.roi_size, (CELLS,) * 3, (CELLS * STRIDE,) * 3, tap).sum(dim=1).tolist()
            own.append(np.mean([flops(n) for n in counts]) / flops(CELLS**3))
            padded.append(flops(max(counts)) / flops(CELLS**3))
    print(f"every view its own number of tokens: {np.mean(own):.2f}; all as many as the largest of a step: {np.mean(padded):.2f}")


kept_share: list[float] = []


@torch.no_grad()
def forward(self: Teacher, views: Tensor, rois: Tensor) -> dict[str, Tensor]:
    """Instead of the teacher's own."""
    tokens, grid = primus._tokens(self.encoder["tokenizer"], views)
    wanted = read(rois.float(), self.bins, tuple(grid), tuple(views.shape[2:]), self.taps[0])
    count = int(wanted.sum(dim=1).max())
    kept_share.append(count / wanted.shape[1])
    kept = (~wanted).to(torch.uint8).argsort(dim=1, stable=True)[:, :count].sort(dim=1).values
    registers = next(self.encoder["registers"].parameters()) if "registers" in self.encoder else None
    features = primus._through_eva(self.encoder["eva"], tokens, registers, kept)
    full = features.new_zeros(len(features), tokens.shape[1], features.shape[2])
    full = full.scatter(1, kept[..., None].expand_as(features), features)
    rows = align([primus._as_map(full, grid)], self.taps, rois, self.bins, views.shape[2:])
    return {"bins": _per_row(self.projector, rows), "image": self.projector(self.encoder["pooling"](features))}


def main() -> None:
    """Estimate, or hand over to ``objectives.py``."""
    if len(sys.argv) > 1 and "-h" not in sys.argv and "--help" not in sys.argv:
        Teacher.forward = forward
        objectives.ROWS = {"untrained": None, "MAE+CVA+Cont": ""}
        objectives.FAMILIES = ("Primus",)
        objectives.main()
        print(f"\nTokens that the teacher saw: {100 * np.mean(kept_share):.0f} %")
        return
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    estimate(200)


if __name__ == "__main__":
    main()
