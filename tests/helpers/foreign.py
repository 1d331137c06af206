"""A network that nnU-Net does not have, and everything that pretraining it takes: what a researcher would write."""

from dataclasses import replace

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.model.naming import Family, Part
from nnunetv2_cva.model.taps import IMAGE, behind, check_divisible, image_vector
from nnunetv2_cva.training.trainer import CVATrainer


class Tower(nn.Module):
    """Three convolutions down, one up."""

    def __init__(self, channels, classes):
        super().__init__()
        self.body = nn.ModuleList(
            [
                nn.Sequential(nn.Conv3d(channels, 6, 3, padding=1), nn.GELU()),
                nn.Sequential(nn.Conv3d(6, 10, 3, stride=2, padding=1), nn.GELU()),
                nn.Sequential(nn.Conv3d(10, 12, 3, stride=2, padding=1), nn.GELU()),
            ]
        )
        self.rise = nn.Sequential(nn.ConvTranspose3d(12, 8, 4, stride=4), nn.GELU())
        self.last = nn.Conv3d(8, classes, 1)

    def forward(self, x):
        for layer in self.body:
            x = layer(x)
        return self.last(self.rise(x))


class TowerTrainer(nnUNetTrainer):
    @staticmethod
    def build_network_architecture(plans_manager, configuration_manager, num_input_channels, num_output_channels, _=True):
        return Tower(num_input_channels, num_output_channels)


class TowerBackbone(nn.Module):
    """The last two layers are the taps."""

    family = Family(
        name="tower",
        parts=(Part("body.*", "layer {}", "encoder"), Part("rise", "rise", "decoder"), Part("last", "output layer", "output")),
        entrance=("body.0.0",),
        averaged={"body": "body"},
    )
    output: str | None = "last"
    fits_any_target = True

    def __init__(self, network, config):
        super().__init__()
        self.network = network
        first = behind(network.body[0], IMAGE)
        second = behind(network.body[1], first)
        third = behind(network.body[2], second)
        self.taps = (replace(second, channels=10), replace(third, channels=12))
        self.image_channels = 22
        self.block = (config.mask_block,) * 3
        self.reconstructs = config.reconstruction_weight > 0
        if not self.reconstructs:
            network.rise.requires_grad_(False)
            network.last.requires_grad_(False)

    def check_view(self, size):
        check_divisible(size, self.taps[-1].stride)

    def averaged(self):
        return self.family.modules(self.network)

    def own_modules(self):
        return iter(())

    @staticmethod
    def encode(modules, views):
        maps = [views]
        for layer in modules["body"]:
            maps.append(layer(maps[-1]))
        return maps[2:], image_vector(maps[2:])

    def forward(self, views, mask):
        maps, image = self.encode(self.averaged(), views)
        return maps, image, self.network.last(self.network.rise(maps[-1])) if self.reconstructs else None


class nnUNetTrainerCVA_Tower(CVATrainer):
    """MAE+CVA+Cont for a network of our own."""

    config = CVAConfig(epochs=1, iterations_per_epoch=2, head_width=16, predictor_width=8, mask_block=8)
    backbone_trainer = TowerTrainer
    backbone = TowerBackbone
