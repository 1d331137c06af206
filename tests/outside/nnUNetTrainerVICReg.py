"""VICReg (Bardes et al., 2022) of corresponding bins: a loss from outside, with settings of its own and without a teacher."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.settings import NOT_NEGATIVE, setting
from nnunetv2_cva.training.objective import by_view, objective
from nnunetv2_cva.training.trainer import CVATrainer


@dataclass(frozen=True)
class VICRegConfig(CVAConfig):
    variance_weight: float = setting(1.0, "weight of the hinge on standard deviations", NOT_NEGATIVE)
    covariance_weight: float = setting(0.04, "weight of the covariances", NOT_NEGATIVE)
    needs_teacher = False


def vicreg(student, teacher, batch, config, cases=None):
    first, second = (view.flatten(0, 1).float() for view in by_view(student["bins"]))
    found = {"consistency": F.mse_loss(first, second)}
    found["variance"] = sum(F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() for z in (first, second))
    found["covariance"] = sum(torch.cov(z.T).fill_diagonal_(0).square().sum() / z.shape[1] for z in (first, second))
    total = sum(getattr(config, f"{name}_weight") * loss for name, loss in found.items())
    rest = objective(student, {}, batch, config.updated({"consistency_weight": 0.0}, "VICReg"), cases)
    return {**found, **rest, "total": total + rest["total"]}


class nnUNetTrainerVICReg(CVATrainer):
    """MAE+VICReg."""

    config = VICRegConfig(contrastive_weight=0.0)
    objective = staticmethod(vicreg)
