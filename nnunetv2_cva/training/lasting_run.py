"""A run that lasts: alone in its folder, saved, stopped and continued exactly, never destroyed by a restart."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist
from batchgenerators.utilities.file_and_folder_operations import isfile, join, maybe_mkdir_p
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_cva import __version__
from nnunetv2_cva.config import CVAConfig, check_resumable
from nnunetv2_cva.failures import sentence
from nnunetv2_cva.files import write_json, written_whole
from nnunetv2_cva.model.branches import Student, Teacher
from nnunetv2_cva.signals import EXIT_CODE
from nnunetv2_cva.training import checkpoint as checkpoints
from nnunetv2_cva.training.data import TrainingData
from nnunetv2_cva.training.failing import noting, speak_plainly_in_nnunets_command
from nnunetv2_cva.training.folder import only_one, refuse_or_set_aside
from nnunetv2_cva.training.history import History
from nnunetv2_cva.training.progress import Progress
from nnunetv2_cva.training.report import note_watched
from nnunetv2_cva.training.stopping import Stopped, Stopping
from nnunetv2_cva.training.watching import criterion


class LastingRun(nnUNetTrainer):
    """What nnU-Net's trainer does about checkpoints, and what long runs need beyond it. The training itself is the trainer's."""

    config: CVAConfig
    backbone_trainer: type[nnUNetTrainer]
    current_epoch: int
    was_initialized: bool
    student: Student
    teacher: Teacher | None
    optimizer: torch.optim.Optimizer
    grad_scaler: torch.amp.GradScaler | None
    history: History
    record: dict[str, Any]  # of the epoch that has ended
    data: TrainingData
    _stamps: dict[str, str]  # of the training cases, when this process began
    _constructed: float
    _asked_to_continue: bool
    _saved_at: float
    _unwritten: set[str]  # names of files
    _progress: Progress
    _stopping: Stopping | None
    _resumed: dict[str, Any] | None
    _resumed_from: str
    _to_fine_tune: str
    _started_from: dict[str, Any] | None
    _at_start: dict[str, float]

    def _begin(self, plans: dict[str, Any]) -> None:
        """Before anything can fail."""
        self._constructed = monotonic()
        self._unwritten = set()
        self._asked_to_continue = bool(plans.get("continue_training"))
        speak_plainly_in_nnunets_command()

    def run_training(self) -> None:
        """nnU-Net's loop, alone in its folder, until it ends or is told to stop.

        Raises:
            Stopped: before the end, saved.
        """
        self._stopping = Stopping(self.config.stop_after_minutes, self._constructed)
        alone = only_one(self.output_folder, self.print_to_log_file) if self.local_rank == 0 else nullcontext()
        with noting(self.print_to_log_file), alone, self._stopping.noticing():
            super().run_training()

    def _claim_folder(self) -> None:
        """Find what is to be continued, or make sure that nothing is destroyed."""
        if self._resumed is None and self._asked_to_continue and checkpoints.can_be_continued(self.output_folder):
            self.load_checkpoint(join(self.output_folder, checkpoints.LATEST))  # nnU-Net does not know of the previous one
        elif self._resumed is None and self.local_rank == 0:
            aside = refuse_or_set_aside(self.output_folder, [os.path.basename(self.log_file)], self.config.set_aside)
            if aside is not None:
                self.print_to_log_file(f"An earlier run was moved to {aside}.")

    def _write_folder(self) -> None:
        """What nnU-Net keeps beside its checkpoints, our settings, and the metrics so far."""
        maybe_mkdir_p(self.output_folder)
        write_json(join(self.output_folder_base, "plans.json"), self.plans_manager.plans)
        write_json(join(self.output_folder_base, "dataset.json"), self.dataset_json)
        write_json(join(self.output_folder, "cva_config.json"), self.config.as_dict())
        fingerprint = join(self.preprocessed_dataset_folder_base, "dataset_fingerprint.json")
        if isfile(fingerprint):
            with written_whole(join(self.output_folder_base, "dataset_fingerprint.json")) as partial:
                shutil.copyfile(fingerprint, partial)
        note_watched(Path(self.output_folder), self.preprocessed_dataset_folder, self.data.watched)
        self.history.restore([] if self._resumed is None else self._resumed["cva"]["history"])

    def _stop_if_told(self) -> None:
        """Save and end the program, all ranks after the same step."""
        reason = "" if self._stopping is None else self._stopping.reason()
        if reason:
            self._save_as(checkpoints.LATEST)
            if self.is_ddp:
                dist.barrier()  # who ended before the file is written would have the others ended
            self.dataloader_train.close()
            done = len(self._progress.outputs)
            self.print_to_log_file(
                f"Stopped: {reason}. Saved after {self.current_epoch} epochs and {done} iterations: --c goes on from there. "
                f"Exit code {EXIT_CODE}."
            )
            raise Stopped

    def _save(self, improved: bool) -> None:
        """Latest, where it is time, and best. Latest first: best alone cannot be continued."""
        age = monotonic() - self._saved_at + self.record["seconds"]
        last = self.current_epoch == self.num_epochs
        due = not last and (self.current_epoch == 1 or age > 60 * self.config.checkpoint_minutes)
        if due and self._written(checkpoints.LATEST, partial(self._save_as, checkpoints.LATEST)):
            self._saved_at = monotonic()
        if improved:
            self._written(checkpoints.BEST, partial(self._save_as, checkpoints.BEST))

    def _save_final(self) -> None:
        """The run has ended: the others are of no use any more."""
        self._save_as(checkpoints.FINAL)
        for name in (checkpoints.LATEST, checkpoints.PREVIOUS) if self.local_rank == 0 and not self.disable_checkpointing else ():
            with suppress(FileNotFoundError):
                os.remove(join(self.output_folder, name))

    def _save_as(self, name: str) -> None:
        self.save_checkpoint(join(self.output_folder, name))

    def _written(self, name: str, write: Callable[[], None]) -> bool:
        """Whether something could be written that a run can do without for now: a disk that is full need not be in the end. Said
        when it begins, of the latest checkpoint every time."""
        try:
            write()
        except OSError as e:
            if name not in self._unwritten or name == checkpoints.LATEST:
                self.print_to_log_file(f"WARNING: {sentence(e)} Training goes on without a new {name}.")
            self._unwritten.add(name)
            return False
        self._unwritten.discard(name)
        return True

    def _mend_best(self) -> None:
        """Write the best checkpoint again from the weights that are continued, where a kill has left none or one of an earlier
        epoch than the best of the history."""
        metric, epochs = criterion(self.config), self.history.epochs
        scored = [e for e in epochs if metric.name in e]
        if self.local_rank != 0 or not scored or self._progress.outputs:
            return
        best = max(scored, key=lambda e: metric.sign * e[metric.name])["epoch"] + 1
        found = checkpoints.summary(join(self.output_folder, checkpoints.BEST))
        if found is not None and found["current_epoch"] >= best:
            return
        if not self._written(checkpoints.BEST, partial(self._save_as, checkpoints.BEST)):
            return
        lost = "" if best == self.current_epoch else f" The best was after {best} epochs, and those weights are lost."
        self.print_to_log_file(f"{checkpoints.BEST} was made again from the weights after {self.current_epoch} epochs.{lost}")

    def save_checkpoint(self, filename: str) -> None:
        """Latest and final hold the whole run, best holds weights. Written atomically by rank 0."""
        progress = self._progress.state(0.0 if self.dataloader_train is None else self.dataloader_train.waited)  # of all ranks
        if self.local_rank != 0 or self.disable_checkpointing:
            return
        name = os.path.basename(filename)
        content = {
            "init_args": {
                "plans": self.plans_manager.plans,
                "configuration": self.configuration_name,
                "fold": self.fold,
                "dataset_json": self.dataset_json,
            },
            "trainer_name": type(self).__name__,
            "inference_allowed_mirroring_axes": None,
            "current_epoch": self.current_epoch,
            "cva": {
                "version": __version__,
                "config": self.config.as_dict(),
                "history": self.history.epochs,
                "backbone_trainer": self.backbone_trainer.__name__,
                "step": len(self._progress.outputs),
                "progress": progress,
                "cases": self._stamps,
                "started_from": self._started_from,
                "at_start": self._at_start,
            },
        }
        checkpoints.save(self._run().put_into(content, whole=name != checkpoints.BEST), filename)

    def load_checkpoint(self, filename_or_checkpoint: Any) -> None:
        """Continue a run exactly, from the checkpoint that came furthest, whichever of them nnU-Net asks for.

        Asked for best where there is a final one (``--val_best``): best's weights are what the closing command names.
        """
        folder = os.path.dirname(filename_or_checkpoint)
        if os.path.basename(filename_or_checkpoint) == checkpoints.BEST and isfile(join(folder, checkpoints.FINAL)):
            self._to_fine_tune = checkpoints.BEST
            return
        path, content = checkpoints.newest(folder, self.print_to_log_file)
        self.config = check_resumable(content["cva"]["config"], self.config)
        checkpoints.check_plans(content["init_args"]["plans"], self.plans_manager.plans, self.configuration_name)
        if not self.was_initialized:
            self.initialize()
        self._run().restore(content)
        self.current_epoch = content["current_epoch"]
        self.history.epochs = list(content["cva"]["history"])
        self._started_from = content["cva"].get("started_from")
        self._resumed, self._resumed_from = content, f"{path}, {datetime.fromtimestamp(path.stat().st_mtime):%Y-%m-%d %H:%M}"

    def _run(self) -> checkpoints.Run:
        return checkpoints.Run(self.student, self.teacher, self.optimizer, self.grad_scaler)
