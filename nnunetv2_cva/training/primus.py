"""A Primus of any size, told by the plans: nnU-Net's own trainers know four."""

from __future__ import annotations

from typing import Any

from dynamic_network_architectures.architectures.primus import Primus
from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import AbstractPrimus
from torch import nn

NETWORK = f"{Primus.__module__}.{Primus.__name__}"  # how plans name it


class nnUNetTrainerPrimusOfPlans(AbstractPrimus):
    """nnU-Net's Primus trainer for the width, depth and heads that ``architecture`` of the plans states.

    It is no part of nnU-Net: whoever predicts with its checkpoints needs this package and its hook.
    """

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Raises ValueError where the plans describe another network."""
        name = configuration_manager.network_arch_class_name
        if name != NETWORK:
            raise ValueError(
                f"The plans {plans_manager.plans_name} describe {name}, this trainer builds {NETWORK}. Write plans with the "
                "network of a file by `nnUNetv2_cva export` (format plans), or take the trainer of this network."
            )
        arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in configuration_manager.network_arch_init_kwargs.items()}
        view = tuple(configuration_manager.patch_size)
        return Primus(num_input_channels, num_classes=num_output_channels, input_shape=view, **arguments)
