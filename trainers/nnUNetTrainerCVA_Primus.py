"""Recipes for nnU-Net's Primus, Primus V2 and Primus V3, each in four sizes: the default objective, MAE+CVA+Cont.

The network is built by nnU-Net's trainer of the same name, so it is the one that is fine-tuned. View size and batch
size are the plans' (paper, Primus-M: 160 x 160 x 160 and 4 cases); the optimisation is the paper's for Primus-M.
"""

from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import (
    nnUNet_Primus_B_Trainer,
    nnUNet_Primus_L_Trainer,
    nnUNet_Primus_M_Trainer,
    nnUNet_Primus_S_Trainer,
    nnUNet_PrimusV2B_Trainer,
    nnUNet_PrimusV2L_Trainer,
    nnUNet_PrimusV2M_Trainer,
    nnUNet_PrimusV2S_Trainer,
    nnUNet_PrimusV3B_Trainer,
    nnUNet_PrimusV3L_Trainer,
    nnUNet_PrimusV3M_Trainer,
    nnUNet_PrimusV3S_Trainer,
)

from nnunetv2_cva.config import PRIMUS, CVAConfig
from nnunetv2_cva.training.trainer import CVATrainer

_PRIMUS = CVAConfig(**PRIMUS)


class nnUNetTrainerCVA_PrimusS(CVATrainer):
    """MAE+CVA+Cont for Primus-S: 396 channels, 12 blocks."""

    config = _PRIMUS
    backbone_trainer = nnUNet_Primus_S_Trainer


class nnUNetTrainerCVA_PrimusB(CVATrainer):
    """MAE+CVA+Cont for Primus-B: 792 channels, 12 blocks."""

    config = _PRIMUS
    backbone_trainer = nnUNet_Primus_B_Trainer


class nnUNetTrainerCVA_PrimusM(CVATrainer):
    """MAE+CVA+Cont for Primus-M (the paper's Primus): 864 channels, 16 blocks."""

    config = _PRIMUS
    backbone_trainer = nnUNet_Primus_M_Trainer


class nnUNetTrainerCVA_PrimusL(CVATrainer):
    """MAE+CVA+Cont for Primus-L: 1056 channels, 24 blocks."""

    config = _PRIMUS
    backbone_trainer = nnUNet_Primus_L_Trainer


class nnUNetTrainerCVA_PrimusV2S(CVATrainer):
    """MAE+CVA+Cont for Primus V2-S: 396 channels, 12 blocks, convolutional tokenizer."""

    config = _PRIMUS
    backbone_trainer = nnUNet_PrimusV2S_Trainer


class nnUNetTrainerCVA_PrimusV2B(CVATrainer):
    """MAE+CVA+Cont for Primus V2-B: 792 channels, 12 blocks, convolutional tokenizer."""

    config = _PRIMUS
    backbone_trainer = nnUNet_PrimusV2B_Trainer


class nnUNetTrainerCVA_PrimusV2M(CVATrainer):
    """MAE+CVA+Cont for Primus V2-M: 864 channels, 16 blocks, convolutional tokenizer."""

    config = _PRIMUS
    backbone_trainer = nnUNet_PrimusV2M_Trainer


class nnUNetTrainerCVA_PrimusV2L(CVATrainer):
    """MAE+CVA+Cont for Primus V2-L: 1056 channels, 24 blocks, convolutional tokenizer."""

    config = _PRIMUS
    backbone_trainer = nnUNet_PrimusV2L_Trainer


class nnUNetTrainerCVA_PrimusV3S(CVATrainer):
    """MAE+CVA+Cont for Primus V3-S (nnU-Net recommends it): 396 channels, 12 blocks, wider convolutional tokenizer."""

    config = _PRIMUS
    backbone_trainer = nnUNet_PrimusV3S_Trainer


class nnUNetTrainerCVA_PrimusV3B(CVATrainer):
    """MAE+CVA+Cont for Primus V3-B: 792 channels, 12 blocks, wider convolutional tokenizer."""

    config = _PRIMUS
    backbone_trainer = nnUNet_PrimusV3B_Trainer


class nnUNetTrainerCVA_PrimusV3M(CVATrainer):
    """MAE+CVA+Cont for Primus V3-M: 864 channels, 16 blocks, wider convolutional tokenizer."""

    config = _PRIMUS
    backbone_trainer = nnUNet_PrimusV3M_Trainer


class nnUNetTrainerCVA_PrimusV3L(CVATrainer):
    """MAE+CVA+Cont for Primus V3-L: 1056 channels, 24 blocks, wider convolutional tokenizer."""

    config = _PRIMUS
    backbone_trainer = nnUNet_PrimusV3L_Trainer
