"""Recipes for a Primus of any size, as the plans describe it (nnFoundation's, for example): pretraining and fine-tuning.

nnU-Net finds ``nnUNetTrainerPrimusOfPlans`` here, too: checkpoints of fine-tuning carry its name; predicting needs this package.
"""

from nnunetv2_cva.config import PRIMUS, CVAConfig, FinetuneConfig
from nnunetv2_cva.training.finetune import Finetuning
from nnunetv2_cva.training.primus import nnUNetTrainerPrimusOfPlans
from nnunetv2_cva.training.trainer import CVATrainer


class nnUNetTrainerCVA_PrimusOfPlans(CVATrainer):
    """MAE+CVA+Cont for the Primus that the plans describe, of any width and depth."""

    config = CVAConfig(**PRIMUS)
    backbone_trainer = nnUNetTrainerPrimusOfPlans


class nnUNetTrainerCVAFinetune_PrimusOfPlans(Finetuning, nnUNetTrainerPrimusOfPlans):
    """Fine-tuning of the Primus that the plans describe: AdamW 1e-4 instead of 3e-4, 50 of 1000 epochs warm-up."""

    config = FinetuneConfig(optimizer="adamw", learning_rate=1e-4, betas=(0.9, 0.98), weight_decay=5e-2)
