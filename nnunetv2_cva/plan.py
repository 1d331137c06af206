"""Planning, with the training's own count of what a step takes."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_cva.config import CVAConfig, resolve
from nnunetv2_cva.datasets import planning
from nnunetv2_cva.datasets.parallel import Progress
from nnunetv2_cva.datasets.planning import Planned, PlanRequest
from nnunetv2_cva.training.memory import step_memory
from nnunetv2_cva.transfer.target import settings_of, trainer_class

__all__ = ["Planned", "PlanRequest", "plan"]


def plan(request: PlanRequest, progress: Progress) -> Planned:
    """As ``datasets.planning.plan``."""
    return planning.plan(request, progress, counted, settings_of)


def counted(plans: dict[str, Any], name: str, trainer: str, config: CVAConfig) -> float:
    """GB of tensors that a step of the configuration ``name`` takes in bf16, with the network that ``trainer`` builds and a
    recipe's ``config``."""
    return _counted(json.dumps(plans), name, trainer, config)


@lru_cache(maxsize=256)
def _counted(content: str, name: str, trainer: str, config: CVAConfig) -> float:
    plans = json.loads(content)
    manager = PlansManager(plans)
    configuration = manager.get_configuration(name)
    channels = len(configuration.normalization_schemes)
    return step_memory(trainer_class(trainer), manager, configuration, channels, resolve(config, plans, name, {}))
