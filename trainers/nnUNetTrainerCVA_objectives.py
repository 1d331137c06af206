"""Recipes for the rows of the paper's table, for the U-Net that the plans describe and for Primus-M.

MAE+CVA+Cont, the default, is ``nnUNetTrainerCVA`` and ``nnUNetTrainerCVA_PrimusM``; what is not named here is as there.
"""

from dataclasses import replace

from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import nnUNet_Primus_M_Trainer

from nnunetv2_cva.config import PRIMUS, CVAConfig
from nnunetv2_cva.training.trainer import CVATrainer


class nnUNetTrainerCVA_AE(CVATrainer):
    """AE: every voxel of unmasked views, and half the consistency with a teacher of the same weights."""

    config = CVAConfig(mask_ratio=0.0, consistency_weight=0.5, contrastive_weight=0.0, teacher_momentum=0.0)


class nnUNetTrainerCVA_MAE(CVATrainer):
    """MAE: masked reconstruction alone, the first of the paper's two stages (1000 epochs)."""

    config = CVAConfig(consistency_weight=0.0, contrastive_weight=0.0, epochs=1000)


class nnUNetTrainerCVA_MAE_CVA(CVATrainer):
    """MAE+CVA: masked reconstruction and consistency of the aligned bins."""

    config = CVAConfig(contrastive_weight=0.0)


class nnUNetTrainerCVA_MAE_CCVA(CVATrainer):
    """MAE+C-CVA: masked reconstruction and contrast (NT-Xent) of the aligned bins."""

    config = CVAConfig(consistency="nt_xent", consistency_weight=0.2, contrastive_weight=0.0)


class nnUNetTrainerCVA_MAE_Cont(CVATrainer):
    """MAE+Cont: masked reconstruction and contrast of the images."""

    config = CVAConfig(consistency_weight=0.0)


class nnUNetTrainerCVA_MAE_CCVA_Cont(CVATrainer):
    """MAE+C-CVA+Cont: masked reconstruction, contrast of the aligned bins and of the images."""

    config = CVAConfig(consistency="nt_xent", consistency_weight=0.2)


class nnUNetTrainerCVA_Gram(CVATrainer):
    """MAE+Gram+Cont: the default with Gram matrices of the aligned bins instead of their cosine."""

    config = CVAConfig(consistency="gram", consistency_weight=2.0)


class nnUNetTrainerCVA_Cont(CVATrainer):
    """Cont: contrast of the images alone, on masked views (the paper: best for classification)."""

    # Alone its weight is 1: the 0.1 of the other rows is relative to theirs, and SGD would take steps a tenth as long.
    config = CVAConfig(reconstruction_weight=0.0, consistency_weight=0.0, contrastive_weight=1.0)


class nnUNetTrainerCVA_AE_PrimusM(CVATrainer):
    """AE: every voxel of unmasked views, and half the consistency with a teacher of the same weights; Primus-M."""

    config = replace(nnUNetTrainerCVA_AE.config, **PRIMUS)
    backbone_trainer = nnUNet_Primus_M_Trainer


class nnUNetTrainerCVA_MAE_PrimusM(CVATrainer):
    """MAE: masked reconstruction alone, the first of the paper's two stages (1000 epochs); Primus-M."""

    config = replace(nnUNetTrainerCVA_MAE.config, **{**PRIMUS, "epochs": 1000})
    backbone_trainer = nnUNet_Primus_M_Trainer


class nnUNetTrainerCVA_MAE_CVA_PrimusM(CVATrainer):
    """MAE+CVA: masked reconstruction and consistency of the aligned bins; Primus-M."""

    config = replace(nnUNetTrainerCVA_MAE_CVA.config, **PRIMUS)
    backbone_trainer = nnUNet_Primus_M_Trainer


class nnUNetTrainerCVA_MAE_CCVA_PrimusM(CVATrainer):
    """MAE+C-CVA: masked reconstruction and contrast (NT-Xent) of the aligned bins; Primus-M."""

    config = replace(nnUNetTrainerCVA_MAE_CCVA.config, **PRIMUS)
    backbone_trainer = nnUNet_Primus_M_Trainer


class nnUNetTrainerCVA_MAE_Cont_PrimusM(CVATrainer):
    """MAE+Cont: masked reconstruction and contrast of the images; Primus-M."""

    config = replace(nnUNetTrainerCVA_MAE_Cont.config, **PRIMUS)
    backbone_trainer = nnUNet_Primus_M_Trainer


class nnUNetTrainerCVA_MAE_CCVA_Cont_PrimusM(CVATrainer):
    """MAE+C-CVA+Cont: masked reconstruction, contrast of the aligned bins and of the images; Primus-M."""

    config = replace(nnUNetTrainerCVA_MAE_CCVA_Cont.config, **PRIMUS)
    backbone_trainer = nnUNet_Primus_M_Trainer


class nnUNetTrainerCVA_Gram_PrimusM(CVATrainer):
    """MAE+Gram+Cont: the default with Gram matrices of the aligned bins instead of their cosine; Primus-M."""

    config = replace(nnUNetTrainerCVA_Gram.config, **PRIMUS)
    backbone_trainer = nnUNet_Primus_M_Trainer


class nnUNetTrainerCVA_Cont_PrimusM(CVATrainer):
    """Cont: contrast of the images alone, on masked views (the paper: best for classification); Primus-M."""

    config = replace(nnUNetTrainerCVA_Cont.config, **PRIMUS)
    backbone_trainer = nnUNet_Primus_M_Trainer
