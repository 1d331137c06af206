"""A Primus that CPUs can bear: 192 channels, 4 blocks, tokens of 4 voxels. A user's own ``backbone_trainer`` looks like this."""

from dynamic_network_architectures.architectures.primus import Primus
from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import AbstractPrimus

TOKEN = (4, 4, 4)  # voxels; of 8 voxels a view of 24x32x24 has 36 tokens, 9 of them visible


class SmallPrimus(AbstractPrimus):
    @staticmethod
    def build_network_architecture(plans_manager, configuration, channels, classes, deep_supervision=True):
        return Primus(
            channels,
            192,
            TOKEN,
            classes,
            4,
            4,
            configuration.patch_size,
            drop_path_rate=0.2,
            scale_attn_inner=True,
            init_values=0.1,
        )
