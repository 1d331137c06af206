"""Recipes for the rows of the paper's table, for the U-Net that the plans describe and for Primus-M.

MAE+CVA+Cont, the default, is ``nnUNetTrainerCVA`` and ``nnUNetTrainerCVA_PrimusM``; what is not named here is as there. The
paper's optimisation of U-Nets is that of ``nnUNetTrainerCVA_Paper``.
"""

from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import nnUNet_Primus_M_Trainer

from nnunetv2_cva.config import PRIMUS, UNET, CVAConfig
from nnunetv2_cva.training.trainer import CVATrainer

_AE = {"mask_ratio": 0.0, "consistency_weight": 0.5, "contrastive_weight": 0.0, "teacher_momentum": 0.0}
_MAE = {"consistency_weight": 0.0, "contrastive_weight": 0.0, "epochs": 1000}
_MAE_CVA = {"contrastive_weight": 0.0}
_MAE_CCVA = {"consistency": "nt_xent", "consistency_weight": 0.2, "contrastive_weight": 0.0}
_MAE_Cont = {"consistency_weight": 0.0}
_MAE_CCVA_Cont = {"consistency": "nt_xent", "consistency_weight": 0.2}
_Gram = {"consistency": "gram", "consistency_weight": 2.0}
# Alone its weight is 1: the 0.1 of the other rows is relative to theirs, and clipping would see another gradient.
_Cont = {"reconstruction_weight": 0.0, "consistency_weight": 0.0, "contrastive_weight": 1.0}


class nnUNetTrainerCVA_AE(CVATrainer):
    """AE: every voxel of unmasked views, and half the consistency with a teacher of the same weights."""

    config = CVAConfig(**{**UNET, **_AE})


class nnUNetTrainerCVA_MAE(CVATrainer):
    """MAE: masked reconstruction alone, the first of the paper's two stages (1000 epochs)."""

    config = CVAConfig(**{**UNET, **_MAE})


class nnUNetTrainerCVA_MAE_CVA(CVATrainer):
    """MAE+CVA: masked reconstruction and consistency of the aligned bins."""

    config = CVAConfig(**{**UNET, **_MAE_CVA})


class nnUNetTrainerCVA_MAE_CCVA(CVATrainer):
    """MAE+C-CVA: masked reconstruction and contrast (NT-Xent) of the aligned bins."""

    config = CVAConfig(**{**UNET, **_MAE_CCVA})


class nnUNetTrainerCVA_MAE_Cont(CVATrainer):
    """MAE+Cont: masked reconstruction and contrast of the images."""

    config = CVAConfig(**{**UNET, **_MAE_Cont})


class nnUNetTrainerCVA_MAE_CCVA_Cont(CVATrainer):
    """MAE+C-CVA+Cont: masked reconstruction, contrast of the aligned bins and of the images."""

    config = CVAConfig(**{**UNET, **_MAE_CCVA_Cont})


class nnUNetTrainerCVA_Gram(CVATrainer):
    """MAE+Gram+Cont: the default with Gram matrices of the aligned bins instead of their cosine."""

    config = CVAConfig(**{**UNET, **_Gram})


class nnUNetTrainerCVA_Cont(CVATrainer):
    """Cont: contrast of the images alone, on masked views (the paper: best for classification)."""

    config = CVAConfig(**{**UNET, **_Cont})


class nnUNetTrainerCVA_AE_PrimusM(CVATrainer):
    """AE: every voxel of unmasked views, and half the consistency with a teacher of the same weights; Primus-M."""

    config = CVAConfig(**{**PRIMUS, **_AE})
    backbone_trainer = nnUNet_Primus_M_Trainer


class nnUNetTrainerCVA_MAE_PrimusM(CVATrainer):
    """MAE: masked reconstruction alone, the first of the paper's two stages (1000 epochs); Primus-M."""

    config = CVAConfig(**{**PRIMUS, **_MAE})
    backbone_trainer = nnUNet_Primus_M_Trainer


class nnUNetTrainerCVA_MAE_CVA_PrimusM(CVATrainer):
    """MAE+CVA: masked reconstruction and consistency of the aligned bins; Primus-M."""

    config = CVAConfig(**{**PRIMUS, **_MAE_CVA})
    backbone_trainer = nnUNet_Primus_M_Trainer


class nnUNetTrainerCVA_MAE_CCVA_PrimusM(CVATrainer):
    """MAE+C-CVA: masked reconstruction and contrast (NT-Xent) of the aligned bins; Primus-M."""

    config = CVAConfig(**{**PRIMUS, **_MAE_CCVA})
    backbone_trainer = nnUNet_Primus_M_Trainer


class nnUNetTrainerCVA_MAE_Cont_PrimusM(CVATrainer):
    """MAE+Cont: masked reconstruction and contrast of the images; Primus-M."""

    config = CVAConfig(**{**PRIMUS, **_MAE_Cont})
    backbone_trainer = nnUNet_Primus_M_Trainer


class nnUNetTrainerCVA_MAE_CCVA_Cont_PrimusM(CVATrainer):
    """MAE+C-CVA+Cont: masked reconstruction, contrast of the aligned bins and of the images; Primus-M."""

    config = CVAConfig(**{**PRIMUS, **_MAE_CCVA_Cont})
    backbone_trainer = nnUNet_Primus_M_Trainer


class nnUNetTrainerCVA_Gram_PrimusM(CVATrainer):
    """MAE+Gram+Cont: the default with Gram matrices of the aligned bins instead of their cosine; Primus-M."""

    config = CVAConfig(**{**PRIMUS, **_Gram})
    backbone_trainer = nnUNet_Primus_M_Trainer


class nnUNetTrainerCVA_Cont_PrimusM(CVATrainer):
    """Cont: contrast of the images alone, on masked views (the paper: best for classification); Primus-M."""

    config = CVAConfig(**{**PRIMUS, **_Cont})
    backbone_trainer = nnUNet_Primus_M_Trainer
