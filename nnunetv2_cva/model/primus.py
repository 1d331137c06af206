"""nnU-Net's Primus (V1, V2, V3) as the backbone of the student and of its teacher.

Student: tokens of the masked view -> the visible ones -> the network's Eva -> the full grid, a learnable token at
hidden places -> 2 feature blocks = tap; the same full grid -> 2 decoder blocks -> patch decoder = reconstruction.
Teacher: all tokens -> the network's Eva = tap (paper, section "Primus").
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.eva import Eva
from dynamic_network_architectures.building_blocks.patch_encode_decode import PatchDecode
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from timm.layers import AttentionPoolLatent, RotaryEmbeddingCat
from torch import Tensor, nn

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.model.checkpointing import recompute_in_backward
from nnunetv2_cva.model.families import PRIMUS_V1, PRIMUS_V2_V3
from nnunetv2_cva.model.naming import Family
from nnunetv2_cva.model.taps import Tap, check_divisible, check_visible, token_tap
from nnunetv2_cva.sizes import by

FEATURE_HEADS = 16
HEAD_DEPTH = 2


class PrimusBackbone(nn.Module):
    """A Primus: its tokens are the one tap, attention pooling over them is the image vector.

    ``network`` stays nnU-Net's own module; its ``up_projection`` is not read and frozen. What is added belongs to the
    student's heads and exists only where a loss of the recipe reads it. Hidden are whole tokens, whatever
    ``mask_block`` says.

    The feature blocks have 16 heads, or the nearest number that rotary embedding can take (:func:`nearest_heads`):
    11 for Primus-S, 12 for B, 16 for M and L.

    Raises:
        ValueError: no place known for the tokenizer's cells, or another rotary embedding than nnU-Net's.
    """

    fits_any_target = False  # a position for every token, a decoder for every class
    output: str | None = None  # the patch decoder is a head

    def __init__(self, network: Any, config: CVAConfig) -> None:
        super().__init__()
        self.network = network
        eva = network.eva
        self.taps = self.taps_of(network)
        self.family: Family = PRIMUS_V1 if hasattr(network.down_projection, "proj") else PRIMUS_V2_V3
        self.image_channels: int = eva.embed_dim
        self.block = self.taps[0].stride
        self.reconstructs = config.reconstruction_weight > 0
        self.mask_ratio = config.mask_ratio
        self.grid = _grid(eva)
        network.up_projection.requires_grad_(False)
        self._add_heads(config)
        recompute_in_backward(self._recomputed(), config.gradient_checkpointing)

    def _add_heads(self, config: CVAConfig) -> None:
        eva, channels = self.network.eva, self.image_channels
        own_heads = eva.blocks[0].attn.num_heads
        self.mask_token = _MaskToken(channels) if config.mask_ratio > 0 else None
        self.feature_blocks: Eva | None = None
        self.pooling: nn.Module | None = None
        self.decoder_blocks: Eva | None = None
        self.patch_decoder: nn.Module | None = None
        if config.needs_second_view:
            heads = nearest_heads(channels, FEATURE_HEADS, eva.rope is not None)
            self.feature_blocks = _blocks(eva, heads, self.grid)
        if config.contrastive_weight > 0:
            self.pooling = AttentionPoolLatent(channels, num_heads=own_heads)
        if self.reconstructs:
            self.decoder_blocks = _blocks(eva, own_heads, self.grid)
            first = next(m for m in self.network.down_projection.modules() if isinstance(m, nn.Conv3d))
            self.patch_decoder = PatchDecode(self.block, channels, first.in_channels).apply(InitWeights_He(1e-2))

    def _recomputed(self) -> Iterator[nn.Module]:
        """The modules that gradient checkpointing takes one by one."""
        for blocks in (self.network.eva, self.feature_blocks, self.decoder_blocks):
            yield from () if blocks is None else blocks.blocks
        tokenizer = self.network.down_projection
        if hasattr(tokenizer, "stages"):  # at full resolution: they hold more than all blocks together
            yield from (tokenizer.stem, *tokenizer.stages)

    @staticmethod
    def taps_of(network: Any) -> tuple[Tap, ...]:
        """The tokens."""
        return (token_tap(network.down_projection, network.eva.embed_dim),)

    def check_view(self, size: tuple[int, int, int]) -> None:
        """Raise ValueError unless the view is the grid of whole tokens that the network was built for."""
        check_divisible(size, self.block)
        grid = tuple(n // s for n, s in zip(size, self.block, strict=True))
        tokens = grid[0] * grid[1] * grid[2]
        known = self.grid[0] * self.grid[1] * self.grid[2]
        if tokens != known or (self.network.eva.rope is not None and grid != self.grid):
            raise ValueError(
                f"View {by(size)} has {by(grid)} tokens, but the network was built for {by(self.grid)}: its position "
                "embedding fits one size only. Build it for the patch_size of the plans."
            )
        check_visible(size, self.block, self.mask_ratio, "tokens")

    def averaged(self) -> dict[str, nn.Module]:
        """The modules that the teacher has its own copy of."""
        own = {} if self.pooling is None else {"pooling": self.pooling}
        return {**self.family.modules(self.network), **own}

    def own_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """Modules that belong to the heads and not to the network: trained, not exported, only pooling is averaged."""
        for name in ("mask_token", "feature_blocks", "pooling", "decoder_blocks", "patch_decoder"):
            if getattr(self, name) is not None:
                yield name, getattr(self, name)

    @staticmethod
    def encode(modules: dict[str, nn.Module] | nn.ModuleDict, views: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """The teacher's path: ``views`` (N, C, I, J, K) -> the tap's map and, with pooling, the image vector (N, D)."""
        tokens, grid = _tokens(modules["tokenizer"], views)
        registers = next(modules["registers"].parameters()) if "registers" in modules else None
        features = _through_eva(modules["eva"], tokens, registers, None)
        return [_as_map(features, grid)], modules["pooling"](features) if "pooling" in modules else None

    def forward(self, views: Tensor, mask: Tensor | None) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
        """The student's path. ``views``: (N, C, I, J, K), hidden voxels already 0; ``mask``: (N, gi, gj, gk) bool, True
        where hidden, ``round(mask_ratio * tokens)`` of every view. None: nothing is hidden.

        Returns the map, the image vector (N, D) and the reconstruction (N, C, I, J, K); what no loss reads is left out.
        """
        full, grid = self._full_grid(views, mask)
        maps: list[Tensor] = []
        image = reconstruction = None
        if self.feature_blocks is not None:
            features = self.feature_blocks(full)[0]
            maps = [_as_map(features, grid)]
            image = self.pooling(features) if self.pooling is not None else None
        if self.decoder_blocks is not None and self.patch_decoder is not None:
            # Tokens have their channels last. Compiled, a transposed convolution of such a map has a gradient in another memory
            # format than expected, and the step fails (torch 2.11, cuDNN 9.19).
            decoded = _as_map(self.decoder_blocks(full)[0], grid).contiguous()
            reconstruction = self.patch_decoder(decoded)
        return maps, image, reconstruction

    def _full_grid(self, views: Tensor, mask: Tensor | None) -> tuple[Tensor, torch.Size]:
        """(N, T, D): features of the visible tokens, the mask token at hidden places. And the grid of the T tokens."""
        network = self.network
        tokens, grid = _tokens(network.down_projection, views)
        if mask is None:
            return _through_eva(network.eva, tokens, network.register_tokens, None), grid
        assert self.mask_token is not None, "the recipe hides nothing"
        kept = kept_tokens(mask, self.mask_ratio)
        visible = _through_eva(network.eva, tokens, network.register_tokens, kept)
        return self.mask_token(visible, kept, tokens.shape[1]), grid


class _MaskToken(nn.Module):
    """(N, K, D) features of the kept tokens -> (N, T, D) with one learnable token at all other places."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, channels), std=0.02))

    def forward(self, visible: Tensor, kept: Tensor, tokens: int) -> Tensor:
        n, _, channels = visible.shape
        empty = self.token.to(visible.dtype).expand(n, tokens, channels)
        return empty.scatter(1, kept[..., None].expand(-1, -1, channels), visible)


def kept_tokens(mask: Tensor, ratio: float) -> Tensor:
    """(N, K) int64: the visible tokens of ``mask`` (N, gi, gj, gk), ascending; ``round(ratio * T)`` of T are hidden.

    K follows from the ratio and not from the mask, so that nothing waits for the device; the device asserts that both
    agree.
    """
    flat = mask.flatten(1)
    hidden = round(ratio * flat.shape[1])
    if flat.device.type in ("cpu", "cuda"):
        torch._assert_async((flat.sum(dim=1) == hidden).all(), f"expected {hidden} hidden tokens in every view")
    return flat.to(torch.uint8).argsort(dim=1, stable=True)[:, : flat.shape[1] - hidden]


def nearest_heads(embed_dim: int, wanted: int, rotary: bool) -> int:
    """The number of heads nearest to ``wanted`` (the smaller of two) that divides the channels and that rotary embedding
    can take: it turns pairs of them by the position along each of three axes, so every head needs a multiple of 6.

    Raises:
        ValueError: there is none; names the nearest embed_dims that have one.
    """
    possible = [h for h in range(1, embed_dim + 1) if embed_dim % (6 * h if rotary else h) == 0]
    if not possible:
        below = embed_dim // 6 * 6
        nearest = " or ".join(str(n) for n in (below, below + 6) if n > 0)
        raise ValueError(
            f"embed_dim {embed_dim} cannot take rotary embedding in 3D, which needs a multiple of 6 channels per head. "
            f"Nearest valid embed_dim: {nearest}."
        )
    return min(possible, key=lambda h: (abs(h - wanted), h))


def not_built(builder: str, view_size: tuple[int, ...], error: Exception) -> ValueError:
    """What to tell a user whose ``builder`` refused, with a bare assertion as the networks of nnU-Net do or in some other way.

    A Primus does so for views that are no whole tokens and for heads that rotary embedding cannot take; the values that it
    looked at are in the frame where it stopped.
    """
    start = f"{builder} cannot build its network for views of {by(view_size)} (patch_size of the plans)"
    frame, line = list(traceback.walk_tb(error.__traceback__))[-1]
    file, values = os.path.basename(frame.f_code.co_filename), dict(frame.f_locals)  # a proxy in Python 3.13
    if file == "primus.py" and "patch_embed_size" in values:
        try:
            check_divisible(view_size, tuple(values["patch_embed_size"]))
        except ValueError as e:
            return ValueError(f"{start}. {e}")
    if file == "eva.py" and {"embed_dim", "num_heads"} <= values.keys():
        width, heads = values["embed_dim"], values["num_heads"]
        below = width // (6 * heads) * 6 * heads
        nearest = " or ".join(str(n) for n in (below, below + 6 * heads) if n > 0)
        return ValueError(
            f"{start}: rotary embedding in 3D needs a multiple of 6 channels per head, found embed_dim {width} with {heads} "
            f"heads. Nearest valid embed_dim: {nearest}."
        )
    reason = str(error) or f"a condition in {file}, line {line}, does not hold"
    kind = "" if isinstance(error, (AssertionError, ValueError)) else f"{type(error).__name__} "
    return ValueError(f"{start}: {kind}{reason}. Look at its plans and dataset.json.")


def _grid(eva: Any) -> tuple[int, int, int]:
    """The tokens that this Eva was built for; without rotary embedding only their number is known, (T, 1, 1)."""
    if eva.rope is not None:
        if not isinstance(eva.rope, RotaryEmbeddingCat) or eva.rope.feat_shape is None:
            raise ValueError(f"A Primus with {eva.rope} is not supported: expected timm's RotaryEmbeddingCat, or none.")
        i, j, k = eva.rope.feat_shape
        return i, j, k
    if eva.pos_embed is None:
        raise ValueError("A Primus without absolute and without rotary position embedding is not supported.")
    return eva.pos_embed.shape[1] - eva.num_prefix_tokens, 1, 1


def _blocks(eva: Any, heads: int, grid: tuple[int, int, int]) -> Eva:
    """Blocks behind ``eva`` for the full grid, with positions of the same kinds: a hidden token has nothing else.
    Otherwise as nnU-Net's Primus trainers set them, except that no block is ever skipped."""
    return Eva(
        embed_dim=eva.embed_dim,
        depth=HEAD_DEPTH,
        num_heads=heads,
        ref_feat_shape=grid,
        use_rot_pos_emb=eva.rope is not None,
        use_abs_pos_emb=eva.pos_embed is not None,
        init_values=0.1,
        scale_attn_inner=True,
    )


def _tokens(tokenizer: nn.Module, views: Tensor) -> tuple[Tensor, torch.Size]:
    """(N, T, D), the last axis of the grid running fastest, and the grid."""
    tokens = tokenizer(views)
    return tokens.flatten(2).transpose(1, 2), tokens.shape[2:]


def _as_map(tokens: Tensor, grid: torch.Size) -> Tensor:
    """(N, T, D) -> (N, D, gi, gj, gk)."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def _through_eva(eva: Any, tokens: Tensor, registers: Tensor | None, kept: Tensor | None) -> Tensor:
    """Eva's forward for the ``kept`` tokens (N, K) of every view, all for None; (N, T, D) -> (N, K, D).

    Both position embeddings follow the kept tokens. Register tokens (1, P, D) go along and are taken off again.
    PatchDropout is not asked: from timm 1.0.17 on it does not fit Eva.
    """
    prefix = 0 if registers is None else registers.shape[1]
    table = None if eva.rope is None else eva.rope.get_embed()  # (T, 2 * channels of a head)
    if eva.pos_embed is not None:
        tokens = tokens + eva.pos_embed[:, prefix:]
        registers = None if registers is None else registers + eva.pos_embed[:, :prefix]
    if kept is not None:
        tokens = tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))
        table = None if table is None else table[kept][:, None]  # the same for all heads
    if registers is not None:
        tokens = torch.cat((registers.expand(len(tokens), -1, -1), tokens), dim=1)
    tokens = eva.pos_drop(tokens)
    for block in eva.blocks:
        tokens = block(tokens, rope=table)
    return eva.norm(tokens)[:, prefix:]
