"""What a training step takes on a device, counted without one.

The very step of the training (student, teacher, losses, backward, optimizer) runs on fake tensors: torch knows their shapes and
lifetimes and computes nothing. Counted are the bytes of all tensors alive at the peak. A GPU needs more than that: cuDNN's
workspaces, the allocator's fragments, the CUDA context.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.model.branches import Student, Teacher, make_backbone
from nnunetv2_cva.nnunet import build_network
from nnunetv2_cva.training.checkpoint import Run
from nnunetv2_cva.training.objective import Prepared
from nnunetv2_cva.training.schedule import make_optimizer
from nnunetv2_cva.training.step import TrainingStep
from nnunetv2_cva.views.masking import expand_mask, hide

GB = 2**30
Precision = Literal["bf16", "fp32"]
Triple = tuple[int, int, int]


class Fake(FakeTensorMode):
    """The teacher is a deep copy of the student; its tensors belong to the same mode."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Fake:
        return self


class Peak(TorchDispatchMode):
    """Bytes of all storages that operations have made and nobody has dropped: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.known, self.now, self.peak = WeakIdKeyDictionary(), 0, 0

    def note(self, tensor: torch.Tensor) -> None:
        """Count the tensor's storage, once."""
        storage = tensor.untyped_storage()
        if storage not in self.known:
            size = self.known[storage] = storage.nbytes()
            weakref.finalize(storage, self._dropped, size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _dropped(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.note, out)
        return out


def prepared(size: Sequence[int], cases: int, channels: int, config: CVAConfig, block: Triple) -> Prepared:
    """What student and teacher get in a step on so many cases."""
    n = cases * (2 if config.needs_second_view else 1)
    views, inside = torch.randn(n, channels, *size), torch.ones(n, 1, *size, dtype=torch.bool)
    rois = torch.tensor([[0.2, 0.2, 0.2], [0.9, 0.9, 0.9]]).expand(n, 2, 3).contiguous()
    grid = [-(-s // b) for s, b in zip(size, block)]
    cells = grid[0] * grid[1] * grid[2]
    mask = (torch.arange(cells) < round(config.mask_ratio * cells)).reshape(1, *grid).expand(n, *grid).contiguous()
    i, j, k = size
    hidden = expand_mask(mask, block, (i, j, k))
    return Prepared(views, rois, inside, hide(views, hidden), mask, hidden)


def trained(network: nn.Module, config: CVAConfig) -> Run:
    """Everything that is trained with this network."""
    student = Student(make_backbone(network, config), config).train()
    teacher = Teacher(student).eval() if config.needs_heads else None
    return Run(student, teacher, make_optimizer(student.parameters(), config, torch.device("cpu")), None)


def step_of(run: Run, config: CVAConfig, precision: Precision = "bf16") -> TrainingStep:
    """The trainer's step."""

    def autocast() -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()

    return TrainingStep(run, run.student, config, autocast=autocast)


def step_memory(
    backbone: Any, manager: Any, configuration: Any, channels: int, config: CVAConfig, precision: Precision = "bf16"
) -> float:
    """GB of tensors at the peak of the second step, when the optimizer's state exists.

    ``backbone``: the trainer of nnU-Net's that builds the network; ``manager``, ``configuration``: nnU-Net's, of which view and
    cases per step are taken.
    """
    size = tuple(configuration.patch_size)
    config = config.for_view(size)
    with warnings.catch_warnings(), Fake():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        # Looks at values, which fakes have not.
        with patch("torch.nn.init.trunc_normal_", lambda tensor, *_, **__: tensor):
            network = build_network(backbone, manager, configuration, channels, channels, deep_supervision=False)
            run = trained(network, config)
        inputs = prepared(size, configuration.batch_size, channels, config, run.student.backbone.block)
        step = step_of(run, config, precision)
        with Peak() as tracker:
            modules = [m for m in (run.student, run.teacher) if m is not None]
            for tensor in (t for m in modules for t in (*m.parameters(), *m.buffers())):
                tracker.note(tensor)
            for given in (inputs.views, inputs.visible, inputs.inside, inputs.hidden):
                if given is not None:
                    tracker.note(given)
            for _ in range(2):
                step(inputs)
        return tracker.peak / GB
