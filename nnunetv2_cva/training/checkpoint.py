"""Checkpoints: nnU-Net's layout with everything of ours under ``cva``, plain types and CPU tensors, written atomically."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunetv2_cva.files import HOST, PARTIAL
from nnunetv2_cva.model.branches import Student, Teacher
from nnunetv2_cva.transfer.weights import NeedsOption, opened, save_whole

# Of a configuration: with another value of these it is another run.
DECISIVE = ("patch_size", "batch_size", "spacing", "normalization_schemes", "architecture")
FINAL, LATEST, BEST = "checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth"
PREVIOUS = "checkpoint_previous.pth"  # what latest was before
WHOLE = (FINAL, LATEST, PREVIOUS)  # a run can be continued from


@dataclass(frozen=True)
class Run:
    """Everything of a run that has a state."""

    student: Student
    teacher: Teacher | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None

    @property
    def network(self) -> nn.Module:
        """nnU-Net's own, which the student's backbone holds."""
        return self.student.backbone.network

    def put_into(self, content: dict[str, Any], whole: bool) -> dict[str, Any]:
        """Add the states to a checkpoint: nnU-Net's entries, ours under ``cva``. Not ``whole``: the network's weights only."""
        content["network_weights"] = self.network.state_dict()
        content["cva"]["family"] = self.student.backbone.family.stated()
        if whole:
            content["optimizer_state"] = self.optimizer.state_dict()
            content["grad_scaler_state"] = self.scaler.state_dict() if self.scaler else None
            content["cva"]["heads"] = {name: module.state_dict() for name, module in self.student.heads().items()}
            content["cva"]["teacher"] = self.teacher.state_dict() if self.teacher is not None else None
        return content

    def restore(self, content: dict[str, Any]) -> None:
        """The states of a whole checkpoint."""
        self.network.load_state_dict(content["network_weights"])
        for name, module in self.student.heads().items():
            module.load_state_dict(content["cva"]["heads"][name])
        if self.teacher is not None:
            self.teacher.load_state_dict(content["cva"]["teacher"])
        self.optimizer.load_state_dict(content["optimizer_state"])
        if self.scaler is not None and content["grad_scaler_state"] is not None:
            self.scaler.load_state_dict(content["grad_scaler_state"])


def save(checkpoint: dict[str, Any], path: str | Path) -> None:
    """Write ``checkpoint`` so that ``path`` holds either the old file or the new one, whole, whatever happens.

    What was the latest one is kept as the previous one.

    Raises:
        OSError: it could not be written (disk full, say); the old file is untouched.
    """
    path = Path(path)
    content = _on_cpu(checkpoint, {})
    try:
        save_whole(content, path, _keep_as_previous if path.name == LATEST else lambda partial: None)
    except OSError as e:
        earlier = [name for name in WHOLE if (path.parent / name).is_file()]
        advice = f"{earlier[0]} is untouched: make room, then continue with --c" if earlier else "Make room, then start again"
        raise OSError(f"{e} {advice}.") from e


def _keep_as_previous(partial: Path) -> None:
    """Before ``partial`` becomes the latest one. There is no moment without one, but where files cannot have two names."""
    latest, previous = partial.with_name(LATEST), partial.with_name(PREVIOUS)
    if not latest.is_file():
        return
    second = partial.with_name(f"{PREVIOUS}.{HOST}.{os.getpid()}{PARTIAL}")
    try:
        second.unlink(missing_ok=True)
        os.link(latest, second)
        os.replace(second, previous)
    except OSError:
        os.replace(latest, previous)


def load(path: str | Path) -> dict[str, Any]:
    """The checkpoint, on the CPU. Opened with ``weights_only=True``: nothing in the file is executed.

    Raises:
        ValueError: damaged, or no checkpoint of a trainer of this package.
    """
    try:
        checkpoint = opened(path, mapped=False)
    except NeedsOption as e:  # nnUNetv2_train has no such option
        raise ValueError(f"{e.reason} It was not written by this package: continue from a checkpoint that was.") from None
    if not isinstance(checkpoint.get("cva"), dict):
        raise ValueError(
            f"{path} is not a checkpoint of a pretraining trainer (no entry 'cva'). Weights of other trainers are a start, not "
            "something to resume: pass the file with -pretrained_weights."
        )
    return checkpoint


def load_whole(path: str | Path) -> dict[str, Any]:
    """The same, of a checkpoint that a run can be continued from.

    Raises:
        ValueError: it holds weights only.
    """
    content = load(path)
    missing = [k for k in ("network_weights", "optimizer_state", "current_epoch", "init_args") if k not in content]
    if "heads" in content["cva"] and missing:
        raise ValueError(f"{path} is no whole checkpoint: it lacks {', '.join(missing)}.")
    if "heads" not in content["cva"]:
        raise ValueError(
            f"{path} holds weights only and cannot be continued. Start a new training from it with -pretrained_weights."
        )
    return content


def carry_heads(path: str | Path, student: Student) -> str | None:
    """Fill the student's heads, and the network's output layer where it reconstructs, from the pretraining checkpoint ``path`` as
    far as it has them in the same shapes. Returns what was carried and what is new, in words; None where it holds no heads.
    """
    content = opened(path)
    saved = (content.get("cva") or {}).get("heads")
    if saved is None:
        return None
    network, output = student.backbone.network, student.backbone.output
    ours = {**student.heads(), "output layer": nn.ModuleList() if output is None else network.get_submodule(output)}
    theirs = {**saved, "output layer": _below(content["network_weights"], f"{output}.")}
    fits = {name: _shapes(module.state_dict()) == _shapes(theirs.get(name, {})) for name, module in ours.items()}
    for name in (n for n, fit in fits.items() if fit):
        ours[name].load_state_dict(theirs[name])
    named = [n for n, m in ours.items() if m.state_dict()]
    carried = ", ".join(n for n in named if fits[n]) or "none"
    return f"Heads from the file: {carried}; new: {', '.join(n for n in named if not fits[n]) or 'none'}."


def _below(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}


def check_plans(saved: dict[str, Any], now: dict[str, Any], configuration: str) -> None:
    """That a run goes on with the plans it began with, as far as they decide about it.

    Raises:
        ValueError: something differs; names it with both values.
    """
    before, after = (PlansManager(plans).get_configuration(configuration).configuration for plans in (saved, now))
    changed = [k for k in DECISIVE if before.get(k) != after.get(k)]
    if changed:
        listing = "; ".join(f"{k}: {before.get(k)} in the checkpoint, {after.get(k)} now" for k in changed)
        raise ValueError(
            f"Cannot resume with other plans than the checkpoint's ({listing}). Restore configuration {configuration} in the "
            "plans file, or start a new training without --c."
        )


def can_be_continued(folder: str | Path) -> bool:
    """Whether there is a checkpoint that holds a whole run, damaged or not."""
    return any((Path(folder) / name).is_file() for name in WHOLE)


def newest(folder: str | Path, say: Callable[[str], None] = lambda line: None) -> tuple[Path, dict[str, Any]]:
    """The checkpoint in ``folder`` that the run came furthest with, by epoch and step inside the files, and its content. Damaged
    ones are named and the next is taken.

    Raises:
        ValueError: none of them can be continued.
    """
    there = [Path(folder) / name for name in WHOLE if (Path(folder) / name).is_file()]
    if not there and (Path(folder) / BEST).is_file():
        there = [Path(folder) / BEST]  # cannot be continued, which is said
    problems = []
    for path in sorted(there, key=_progress, reverse=True):
        try:
            return path, load_whole(path)
        except ValueError as e:
            problems.append(str(e))
            if len(there) > 1:
                say(f"WARNING: {e} An earlier checkpoint is taken instead.")
    raise ValueError(problems[0] if len(problems) == 1 else f"No checkpoint can be continued: {' '.join(problems)}")


def _progress(path: Path) -> tuple[int, int]:
    """Epochs and steps after them, as the file says; what cannot be read comes first and is complained about where it is read."""
    found = summary(path)
    return (2**62, 0) if found is None else (found["current_epoch"], found["cva"].get("step", 0))


def summary(path: str | Path) -> dict[str, Any] | None:
    """The content of a checkpoint without reading its tensors; None: missing or damaged."""
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return content if isinstance(content["current_epoch"], int) and isinstance(content["cva"], dict) else None
    except Exception:  # whatever damaged bytes raise
        return None


def _on_cpu(value: Any, moved: dict[Any, torch.Tensor]) -> Any:
    """``value`` with tensors on the CPU. Tensors that share memory still do: nnU-Net's state dicts hold each encoder twice, and
    copies would triple the file."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        if value.device.type == "cpu":
            return value
        key = (value.device, value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        if key not in moved:
            moved[key] = value.cpu()
        return moved[key]
    if isinstance(value, dict):
        return {k: _on_cpu(v, moved) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(v, moved) for v in value)
    return value
