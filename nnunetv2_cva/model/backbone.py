"""What the method asks of a network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from nnunetv2_cva.model.naming import Family
from nnunetv2_cva.model.taps import Tap


class Backbone(Protocol):
    """A network as student and teacher see it: an ``nn.Module`` with these members, made from ``(network, config)``.

    Shapes: N views, C channels, (I, J, K) voxels; a tap's map is (N, channels, cells).

    Laws, which hold for every backbone here and which one of your own has to keep:

    1. ``encode(averaged(), views)`` is the student's way with nothing hidden and without its heads: the teacher's.
    2. Cell n of tap t lies at ``stride * (n + 0.5) + offset``, in voxels of the view (:class:`Tap`).
    3. Every parameter of ``network`` that requires a gradient is read by a loss of the recipe; all others are frozen.
    4. ``network``'s state dict is what fine-tuning loads: what is added stands in ``own_modules``, beside the network.
    5. ``family`` names every parameter that fine-tuning shall get; those of ``family.averaged`` are the encoder.
    """

    network: Any  # as nnU-Net built it
    taps: tuple[Tap, ...]
    image_channels: int  # of the image vector, and the sum of the taps' channels: both go through one projector
    block: tuple[int, int, int]  # voxels that are hidden together
    family: Family  # how the parameters are named: parts, entrance, what the teacher copies
    output: str | None  # the module of ``network`` that reconstructs; None: one of ``own_modules`` does, or none
    fits_any_target: bool  # no parameter but the output's depends on view size or number of classes

    def check_view(self, size: tuple[int, int, int]) -> None:
        """Raise ValueError, with the nearest sizes that do, unless views of this size can be encoded and masked."""

    def averaged(self) -> dict[str, nn.Module]:
        """The modules that the teacher has its own copy of: ``family.modules(network)``, and own ones that it shares."""

    def own_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Modules that are trained and not exported, by name."""

    @staticmethod
    def encode(modules: Any, views: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """The teacher's way: ``views`` (N, C, I, J, K) -> a map for every tap, and the image vector (N, D).

        ``modules``: what ``averaged`` returns, or a copy of it, by the same names. Nothing else may be read.
        """

    def __call__(self, views: Tensor, mask: Tensor | None) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """The student's way: maps, image vector (N, D) and reconstruction (N, C, I, J, K) of ``views``, hidden voxels already 0.

        ``mask`` (N, gi, gj, gk) bool, True where a block is hidden; None: nothing is. What no loss of the recipe reads may be
        left out: an empty list, None.
        """
