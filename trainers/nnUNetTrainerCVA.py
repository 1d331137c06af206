"""The default recipe, and the paper's for the same networks."""

from nnunetv2_cva.config import DEFAULT, CVAConfig
from nnunetv2_cva.training.trainer import CVATrainer


class nnUNetTrainerCVA(CVATrainer):
    """MAE+CVA+Cont for the U-Net that the plans describe, the default: AdamW 1e-3, views mirrored and scaled independently."""

    config = DEFAULT


class nnUNetTrainerCVA_Paper(CVATrainer):
    """MAE+CVA+Cont exactly as in the paper: SGD 1e-2, both views in one orientation, mask blocks of 16; for long runs."""

    config = CVAConfig(mask_block=16)
