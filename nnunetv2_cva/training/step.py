"""One training step: both branches, losses, gradients, optimizer, teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.training.checkpoint import Run
from nnunetv2_cva.training.objective import Objective, Prepared, objective

# Convolutions keep the memory format of what they are given. (Where inductor chooses, it expects of a transposed convolution's
# gradient a format that cuDNN does not return, and Primus's first step fails.)
COMPILE: dict[str, Any] = {"layout_optimization": False}


@dataclass(frozen=True)
class _Branches:
    """The student and, where a loss reads it, the teacher, as they are called."""

    student: Callable[..., dict[str, Tensor]]
    teacher: Callable[..., dict[str, Tensor]] | None

    def compiled(self) -> Iterator[tuple[_Branches, str]]:
        """What to try, in this order, and what is not compiled then."""
        teacher = None if self.teacher is None else torch.compile(self.teacher, options=COMPILE)
        yield _Branches(torch.compile(self.student, options=COMPILE), teacher), ""
        if teacher is not None:  # it has no backward pass that could fail
            yield _Branches(self.student, teacher), " for the student"
        yield self, ""


class TrainingStep:
    """Trains what ``run`` holds on one prepared batch after the other.

    ``student``: the run's student as it is called, wrapped where there are several GPUs. ``cases``: of every rank's part of a
    step. ``compiled``: both branches under ``torch.compile``; ``say`` gets a line with the seconds that the first step took. When
    that step fails, forward or backward, a line says why and it is done again, the student not compiled, and if need be the
    teacher neither; running out of GPU memory is not the compiler's fault and is raised. ``compute``: the recipe's objective.
    ``attention``: what forward and backward run in.
    """

    def __init__(
        self,
        run: Run,
        student: nn.Module,
        config: CVAConfig,
        cases: Sequence[int] | None = None,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        compiled: bool = False,
        say: Callable[[str], None] = lambda line: None,
        compute: Objective = objective,
        attention: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.compute = compute
        self.run, self.config, self.cases, self.autocast, self.say = run, config, cases, autocast, say
        self.attention = attention
        self._plain = _Branches(student, run.teacher)
        self._branches = self._plain
        self._unproven = compiled
        self._scale = 0.0 if run.scaler is None else run.scaler.get_scale()  # asking again waits for the device

    def __call__(self, batch: Prepared) -> dict[str, Tensor]:
        """Every loss of the recipe and their ``total``, detached; the student and, unless the loss scaler skipped the step, the
        teacher have moved on."""
        with self.attention():
            losses = self._first_gradients(batch) if self._unproven else self._gradients(batch)
        moved, skipped = self._update(losses["total"].detach())
        if moved and self.run.teacher is not None:
            self.run.teacher.follow(self.run.student, self.config.teacher_momentum)
        return {**{name: loss.detach() for name, loss in losses.items()}, "skipped": skipped}

    def _gradients(self, batch: Prepared) -> dict[str, Tensor]:
        self.run.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            # The teacher first: it keeps nothing for a backward pass, so its peak does not add to the student's.
            teacher = {} if self._branches.teacher is None else self._branches.teacher(batch.views, batch.rois)
            student = self._branches.student(batch.visible, batch.mask, batch.rois)
        losses = self.compute(student, teacher, batch, self.config, self.cases)
        scaler = self.run.scaler
        (losses["total"] if scaler is None else scaler.scale(losses["total"])).backward()
        return losses

    def _first_gradients(self, batch: Prepared) -> dict[str, Tensor]:
        self._unproven = False
        reason = ""
        for branches, where in self._plain.compiled():
            self._branches = branches
            began = perf_counter()
            try:
                losses = self._gradients(batch)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as e:
                if branches is self._plain:
                    raise  # compiling was not to blame
                inner = getattr(e, "inner_exception", e)  # torch wraps what a backend raises
                reason = (str(inner).strip().splitlines() or [type(inner).__name__])[0]
            else:
                if reason:
                    self.say(f"Going on without torch.compile{where}, which failed: {reason} (nnUNet_compile=0 switches it off)")
                if branches is not self._plain:
                    self.say(f"The first step took {perf_counter() - began:.1f} s, torch.compile included.")
                return losses
        raise AssertionError("the last way returns or raises")

    def _update(self, total: Tensor) -> tuple[bool, Tensor]:
        """Clip and step. Returns whether the weights may have moved, and 1.0 where the batch's loss or gradient was not finite,
        in which case they have not: known to the device only, without waiting for it. The teacher goes on following."""
        optimizer, scaler = self.run.optimizer, self.run.scaler
        parameters = optimizer.param_groups[0]["params"]
        if scaler is None:
            norm = nn.utils.clip_grad_norm_(parameters, self.config.gradient_clip)
            bad = (~(total.isfinite() & norm.isfinite())).float()
            if optimizer.defaults.get("fused"):
                optimizer.found_inf = bad  # type: ignore[attr-defined]  # as torch's loss scaler tells a fused optimizer
                optimizer.step()
            elif not bad:
                optimizer.step()
            return True, bad
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, self.config.gradient_clip)
        scaler.step(optimizer)
        scaler.update()
        before, self._scale = self._scale, scaler.get_scale()
        return self._scale >= before, (~total.isfinite()).float()  # a gradient alone may overflow until the scale has settled


@torch.no_grad()
def all_finite(module: nn.Module) -> bool:
    """Whether every parameter is a finite number. Waits for the device once."""
    norms = torch._foreach_norm(list(module.parameters()))
    return bool(torch.stack([n.float() for n in norms]).isfinite().all())
