"""What a training step takes is counted without a device as it is measured with one."""

import warnings

import pytest
import torch
from helpers.projects import plans as tiny_plans
from helpers.targets import TRAINERS
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_cva.config import DEFAULT
from nnunetv2_cva.training.memory import GB, Peak, prepared, step_memory, step_of, trained

SMALL = {"head_width": 16, "predictor_width": 8, "roi_size": (2, 3, 2)}


def described(family, cases=2, view=(32, 48, 16)):
    plans = tiny_plans(view=view, batch_size=cases, kind="plain" if family == "plain" else "residual")
    manager = PlansManager(plans)
    return manager, manager.get_configuration("3d_fullres")


def measured(trainer, manager, configuration, channels, config):
    """The same step with real tensors on the CPU: bytes that were alive at once."""
    size = tuple(configuration.patch_size)
    config = config.for_view(size)
    run = trained(trainer.build_network_architecture(manager, configuration, channels, channels, False), config)
    inputs = prepared(size, configuration.batch_size, channels, config, run.student.backbone.block)
    step = step_of(run, config)
    with Peak() as tracker:
        for module in (run.student, run.teacher):
            for tensor in (*module.parameters(), *module.buffers()):
                tracker.note(tensor)
        for tensor in (inputs.views, inputs.visible, inputs.inside, inputs.hidden):
            tracker.note(tensor)
        for _ in range(2):
            step(inputs)
    return tracker.peak / GB


@pytest.mark.parametrize("family", ["residual", "plain", "primus"])
def test_counted_is_measured(family):
    torch.manual_seed(0)
    config = DEFAULT.updated({**SMALL, "gradient_checkpointing": False}, "test")
    counted, real = (f(TRAINERS[family], *described(family), 2, config) for f in (step_memory, measured))
    assert abs(counted / real - 1) < 0.03


def test_more_cases_take_more_and_recomputing_takes_less():
    config = DEFAULT.updated({**SMALL, "gradient_checkpointing": False}, "test")
    all_again = DEFAULT.updated({**SMALL, "gradient_checkpointing": True}, "test")
    two, four = (step_memory(TRAINERS["residual"], *described("residual", n), 1, config) for n in (2, 4))
    assert 1.3 < four / two < 2.1
    assert step_memory(TRAINERS["residual"], *described("residual", 4), 1, all_again) < four


def test_nothing_is_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step_memory(TRAINERS["residual"], *described("residual"), 1, DEFAULT.updated(SMALL, "test"))
