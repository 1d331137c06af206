"""Pretraining of nnU-Net's networks without labels by Consistent View Alignment (arXiv 2509.13846).

What stands in ``__all__`` is stable, and described in docs/api.md; all else may change. It is imported when it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nnunetv2_cva.config import CVAConfig
    from nnunetv2_cva.losses import consistency_cosine, nt_xent
    from nnunetv2_cva.model.roi_align import roi_align_3d
    from nnunetv2_cva.seeing.embedding import embed_image
    from nnunetv2_cva.transfer.network import load_network
    from nnunetv2_cva.views.geometry import draw_pair
    from nnunetv2_cva.views.resample import read_pair

__version__ = "0.2.0"
__all__ = ["CVAConfig", "consistency_cosine", "draw_pair", "embed_image", "load_network", "nt_xent", "read_pair", "roi_align_3d"]
_HOMES = {
    "CVAConfig": "config",
    "consistency_cosine": "losses",
    "draw_pair": "views.geometry",
    "embed_image": "seeing.embedding",
    "load_network": "transfer.network",
    "nt_xent": "losses",
    "read_pair": "views.resample",
    "roi_align_3d": "model.roi_align",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
