"""Recipes for fine-tuning from pretrained weights with nnU-Net's trainers: lower learning rate, warm-up.

As nnU-Net and the SSL3D challenge fine-tune: a tenth (Primus: a third) of the rate from scratch, 50 of 1000 epochs warm-up.
"""

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
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

from nnunetv2_cva.config import FinetuneConfig
from nnunetv2_cva.training.finetune import Finetuning

_UNET = FinetuneConfig()
_PRIMUS = FinetuneConfig(optimizer="adamw", learning_rate=1e-4, betas=(0.9, 0.98), weight_decay=5e-2)


class nnUNetTrainerCVAFinetune(Finetuning, nnUNetTrainer):
    """Fine-tuning of the U-Net that the plans describe: SGD 1e-3 instead of 1e-2, 50 of 1000 epochs warm-up."""

    config = _UNET


class nnUNetTrainerCVAFinetune_PrimusS(Finetuning, nnUNet_Primus_S_Trainer):
    """Fine-tuning of Primus-S: AdamW 1e-4 instead of 3e-4, 50 of 1000 epochs warm-up."""

    config = _PRIMUS


class nnUNetTrainerCVAFinetune_PrimusB(Finetuning, nnUNet_Primus_B_Trainer):
    """Fine-tuning of Primus-B: AdamW 1e-4 instead of 3e-4, 50 of 1000 epochs warm-up."""

    config = _PRIMUS


class nnUNetTrainerCVAFinetune_PrimusM(Finetuning, nnUNet_Primus_M_Trainer):
    """Fine-tuning of Primus-M: AdamW 1e-4 instead of 3e-4, 50 of 1000 epochs warm-up."""

    config = _PRIMUS


class nnUNetTrainerCVAFinetune_PrimusL(Finetuning, nnUNet_Primus_L_Trainer):
    """Fine-tuning of Primus-L: AdamW 1e-4 instead of 3e-4, 50 of 1000 epochs warm-up."""

    config = _PRIMUS


class nnUNetTrainerCVAFinetune_PrimusV2S(Finetuning, nnUNet_PrimusV2S_Trainer):
    """Fine-tuning of Primus V2-S: AdamW 1e-4 instead of 3e-4, 50 of 1000 epochs warm-up."""

    config = _PRIMUS


class nnUNetTrainerCVAFinetune_PrimusV2B(Finetuning, nnUNet_PrimusV2B_Trainer):
    """Fine-tuning of Primus V2-B: AdamW 1e-4 instead of 3e-4, 50 of 1000 epochs warm-up."""

    config = _PRIMUS


class nnUNetTrainerCVAFinetune_PrimusV2M(Finetuning, nnUNet_PrimusV2M_Trainer):
    """Fine-tuning of Primus V2-M: AdamW 1e-4 instead of 3e-4, 50 of 1000 epochs warm-up."""

    config = _PRIMUS


class nnUNetTrainerCVAFinetune_PrimusV2L(Finetuning, nnUNet_PrimusV2L_Trainer):
    """Fine-tuning of Primus V2-L: AdamW 1e-4 instead of 3e-4, 50 of 1000 epochs warm-up."""

    config = _PRIMUS


class nnUNetTrainerCVAFinetune_PrimusV3S(Finetuning, nnUNet_PrimusV3S_Trainer):
    """Fine-tuning of Primus V3-S: AdamW 1e-4 instead of 3e-4, 50 of 1000 epochs warm-up."""

    config = _PRIMUS


class nnUNetTrainerCVAFinetune_PrimusV3B(Finetuning, nnUNet_PrimusV3B_Trainer):
    """Fine-tuning of Primus V3-B: AdamW 1e-4 instead of 3e-4, 50 of 1000 epochs warm-up."""

    config = _PRIMUS


class nnUNetTrainerCVAFinetune_PrimusV3M(Finetuning, nnUNet_PrimusV3M_Trainer):
    """Fine-tuning of Primus V3-M: AdamW 1e-4 instead of 3e-4, 50 of 1000 epochs warm-up."""

    config = _PRIMUS


class nnUNetTrainerCVAFinetune_PrimusV3L(Finetuning, nnUNet_PrimusV3L_Trainer):
    """Fine-tuning of Primus V3-L: AdamW 1e-4 instead of 3e-4, 50 of 1000 epochs warm-up."""

    config = _PRIMUS
