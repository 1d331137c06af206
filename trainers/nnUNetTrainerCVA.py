"""The default recipe."""

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.training.trainer import CVATrainer


class nnUNetTrainerCVA(CVATrainer):
    """MAE+CVA+Cont, the default: for the U-Net that the plans describe."""

    config = CVAConfig()
