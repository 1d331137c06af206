"""Small networks of nnU-Net's architectures."""

import torch
from dynamic_network_architectures.architectures.primus import Primus, PrimusV2, PrimusV3
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from dynamic_network_architectures.building_blocks.patch_encode_decode import PatchEmbed_deeper, PatchEmbedDeeperControlled
from dynamic_network_architectures.initialization.weight_init import InitWeights_He
from torch import nn


def unet(
    kind="residual",
    channels=1,
    classes=1,
    strides=((1, 1, 1), (2, 2, 2), (2, 2, 2)),
    kernels=None,
    seed=0,
    features=6,
    norm=nn.InstanceNorm3d,
):
    """A U-Net as nnU-Net builds it, every norm with weight 1 so that all paths count."""
    torch.manual_seed(seed)
    n = len(strides)
    common = dict(
        input_channels=channels,
        n_stages=n,
        features_per_stage=[features * (i + 1) for i in range(n)],
        conv_op=nn.Conv3d,
        kernel_sizes=[list(k) for k in kernels or [(3, 3, 3)] * n],
        strides=[list(s) for s in strides],
        num_classes=classes,
        n_conv_per_stage_decoder=[1] * (n - 1),
        conv_bias=True,
        norm_op=norm,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )
    if kind == "residual":
        network = ResidualEncoderUNet(n_blocks_per_stage=[1, 2, 2, 2, 2][:n], **common)
    else:
        network = PlainConvUNet(n_conv_per_stage=[2] * n, **common)
    network.apply(network.initialize)
    for module in network.modules():
        if isinstance(module, nn.InstanceNorm3d):
            nn.init.ones_(module.weight)
    return network


PRIMUS_SIZE = (32, 48, 16)


def primus(version=1, channels=1, classes=1, size=PRIMUS_SIZE, seed=0, width=48, heads=2, depth=2, **others):
    """A Primus, V1 to V3, as nnU-Net's trainers build it, with narrow tokenizers."""
    torch.manual_seed(seed)
    common = dict(
        input_channels=channels,
        embed_dim=width,
        patch_embed_size=(8, 8, 8),
        num_classes=classes,
        eva_depth=depth,
        eva_numheads=heads,
        input_shape=size,
        drop_path_rate=0.2,
        init_values=0.1,
        scale_attn_inner=True,
    )
    common.update(others)
    network = {1: Primus, 2: PrimusV2, 3: PrimusV3}[version](**common)
    if version == 2:
        network.down_projection = PatchEmbed_deeper(channels, width, base_features=6).apply(InitWeights_He(1e-2))
    if version == 3:
        small = PatchEmbedDeeperControlled(channels, width, ch_per_level=(6, 8, 12, 16))
        network.down_projection = small.apply(InitWeights_He(1e-2))
    return network
