"""nnU-Net's U-Nets as the backbone of the student and of its teacher."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from nnunetv2_cva.config import MASK_BLOCKS, CVAConfig
from nnunetv2_cva.model.checkpointing import recompute_in_backward
from nnunetv2_cva.model.families import PLAIN, RESIDUAL
from nnunetv2_cva.model.naming import Family
from nnunetv2_cva.model.taps import Tap, check_divisible, check_visible, image_vector, unet_taps


class UNetBackbone(nn.Module):
    """A plain-conv or residual U-Net: every encoder stage is a tap, the last segmentation layer reconstructs.

    ``network`` stays nnU-Net's own module, so its state dict is what fine-tuning loads. Parameters that no loss reads are frozen.
    """

    fits_any_target = True
    output: str | None = "decoder.seg_layers"

    def __init__(self, network: Any, config: CVAConfig) -> None:
        super().__init__()
        self.network = network
        self.taps = self.taps_of(network)
        self.family: Family = PLAIN if getattr(network.encoder, "stem", None) is None else RESIDUAL
        self.image_channels = sum(tap.channels for tap in self.taps)
        self.block = (config.mask_block or MASK_BLOCKS[0],) * 3
        self.mask_ratio = config.mask_ratio
        self.reconstructs = config.reconstruction_weight > 0
        self._freeze_unread()
        recompute_in_backward([*network.encoder.stages, *network.decoder.stages], config.gradient_checkpointing)

    @staticmethod
    def taps_of(network: Any) -> tuple[Tap, ...]:
        """Every stage of the encoder."""
        return unet_taps(network.encoder)

    def check_view(self, size: tuple[int, int, int]) -> None:
        """Raise ValueError unless every stage halves the view without remainder and masking leaves something to see."""
        check_divisible(size, self.taps[-1].stride)
        check_visible(size, self.block, self.mask_ratio, "blocks (mask_block)")

    def averaged(self) -> dict[str, nn.Module]:
        """The modules that the teacher has its own copy of."""
        return self.family.modules(self.network)

    def own_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Modules that belong to the heads and not to the network: none."""
        return iter(())

    @staticmethod
    def encode(modules: dict[str, nn.Module] | nn.ModuleDict, views: Tensor) -> tuple[list[Tensor], Tensor]:
        """The teacher's path: ``views`` (N, C, I, J, K) -> maps of all taps and the image vector (N, sum of C)."""
        maps = list(modules["encoder"](views))
        return maps, image_vector(maps)

    def forward(self, views: Tensor, mask: Tensor | None) -> tuple[list[Tensor], Tensor, Tensor | None]:
        """The student's path. ``views``: (N, C, I, J, K), hidden voxels already 0; ``mask`` is not needed.

        Returns the maps, the image vector and the reconstruction (N, C, I, J, K), None without such a loss.
        """
        maps, image = self.encode({"encoder": self.network.encoder}, views)  # nothing for torch.compile to look up
        return maps, image, self.network.decoder(maps) if self.reconstructs else None

    def _freeze_unread(self) -> None:
        decoder = self.network.decoder
        decoder.deep_supervision = False
        whole = [module for name, module in decoder.named_children() if name != "encoder"]  # which the decoder holds, too
        unread = list(decoder.seg_layers[:-1]) if self.reconstructs else whole
        for module in unread:
            module.requires_grad_(False)
