"""The pretraining trainer: nnU-Net's own, with other data, two branches and other losses. Wiring only."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist
from batchgenerators.utilities.file_and_folder_operations import join
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.helpers import empty_cache
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch import Tensor, nn

from nnunetv2_cva import nnunet
from nnunetv2_cva.config import CVAConfig, resolve
from nnunetv2_cva.datasets.destination import check_made_for
from nnunetv2_cva.datasets.next_steps import NO_GPU
from nnunetv2_cva.failures import TrainingFailed
from nnunetv2_cva.model.branches import Backbone, Student, Teacher, make_backbone
from nnunetv2_cva.model.primus import not_built
from nnunetv2_cva.seeding import torch_seed
from nnunetv2_cva.seeing.verdict import verdict
from nnunetv2_cva.training import checkpoint as checkpoints
from nnunetv2_cva.training import messages
from nnunetv2_cva.training.attention import choose, preferring
from nnunetv2_cva.training.copies import DeviceBatches, Lane
from nnunetv2_cva.training.data import IndexedDataset, TrainingData, check_folds, keep_back, open_cases
from nnunetv2_cva.training.device import autocast_dtype, local_device, one_after_the_other, share_of_rank
from nnunetv2_cva.training.history import History
from nnunetv2_cva.training.lasting_run import LastingRun
from nnunetv2_cva.training.objective import Objective, objective, prepare
from nnunetv2_cva.training.progress import Progress, judge_skipped
from nnunetv2_cva.training.run_cases import refuse_other_cases, stamps
from nnunetv2_cva.training.schedule import learning_rate, make_optimizer
from nnunetv2_cva.training.showing import Board, RunBar, Views, report_quietly
from nnunetv2_cva.training.step import TrainingStep, all_finite
from nnunetv2_cva.training.stopping import Stopping
from nnunetv2_cva.training.watching import criterion, score
from nnunetv2_cva.transfer.start import start_from
from nnunetv2_cva.transfer.target import Target


class CVATrainer(LastingRun):
    """Base of all recipes. A recipe sets ``config`` and, for a network that nnU-Net builds in a trainer, ``backbone_trainer``.

    Research may also set ``objective`` (losses of its own; ``config`` may be a subclass of CVAConfig with their settings) and
    ``backbone`` (how the student uses a network that ``make_backbone`` does not know), both as ``staticmethod``.
    """

    config: CVAConfig = CVAConfig()
    backbone_trainer: type[nnUNetTrainer] = nnUNetTrainer
    objective: Objective = staticmethod(objective)
    backbone: Callable[[nn.Module, CVAConfig], Backbone] = staticmethod(make_backbone)
    watched_batches: list[dict[str, Any]]

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net's signature
    ) -> None:
        self._begin(plans)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(NO_GPU)
        self.view_size: tuple[int, int, int] = tuple(nnunet.configuration(plans, configuration).get("patch_size", ()))
        super().__init__(plans, configuration, fold, dataset_json, device)
        if self.is_ddp:  # nnU-Net takes the number among all processes for the number on this machine, and a GPU for granted
            self.device = local_device(device)
        self.config = resolve(type(self).config, self.plans_manager.plans, configuration, os.environ)
        self.num_epochs = self.config.epochs
        self.num_iterations_per_epoch = self.config.iterations_per_epoch
        self.num_val_iterations_per_epoch = 0  # nothing is labelled; watched pairs are scored instead
        self.enable_deep_supervision = False
        self._check_plans()
        self.config = self.config.for_view(self.view_size)
        if self.config.gradient_checkpointing and self.device.type == "mps":
            self.config = replace(self.config, gradient_checkpointing=False)
            self.print_to_log_file("gradient_checkpointing is off: torch cannot repeat random draws on mps.")
        self.autocast_dtype = autocast_dtype(self.config.precision, self.device)
        self.grad_scaler = torch.amp.GradScaler("cuda") if self.autocast_dtype == torch.float16 else None
        self.history = History(self.output_folder)
        self.teacher: Teacher | None = None
        self._to_fine_tune = checkpoints.FINAL
        self._resumed: dict[str, Any] | None = None
        self._resumed_from = ""
        self._stopping: Stopping | None = None
        self._progress = Progress()
        self._started_from: dict[str, Any] | None = None  # of the weights of init_from: what transfer.card.inheritance says

    def _check_plans(self) -> None:
        """Refuse, before anything is built, what cannot be pretrained on."""
        where = f"Configuration {self.configuration_name} of {self.plans_manager.plans_name}"
        if len(self.view_size) != 3:
            raise ValueError(
                f"{where} is {len(self.view_size)}D (patch_size {list(self.view_size)}). Pretraining needs a 3D configuration, "
                "for example 3d_fullres."
            )
        if self.is_cascaded:
            raise ValueError(f"{where} is the second stage of a cascade and needs segmentations. Use 3d_fullres or 3d_lowres.")
        if self.config.contrastive_weight > 0 and self.configuration_manager.batch_size < 2:
            raise ValueError(
                f"{where} has batch_size {self.configuration_manager.batch_size}. The contrastive loss compares cases: raise "
                "batch_size to 2 or more, or set contrastive_weight to 0."
            )

    @staticmethod
    def build_network_architecture(
        plans_manager: Any,
        configuration_manager: Any,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """nnUNetv2_predict is the only caller: there is no segmentation to predict."""
        raise ValueError(
            "This folder holds a pretraining, which cannot predict. Fine-tune from it (nnUNetv2_train ... -pretrained_weights "
            "checkpoint_final.pth) and predict with the fine-tuned model."
        )

    def initialize(self) -> None:
        """Build the network with nnU-Net's code, and around it what pretraining needs."""
        assert not self.was_initialized, "initialize() is called once"
        open_cases(self.preprocessed_dataset_folder)
        check_made_for(Path(self.preprocessed_dataset_folder), self.plans_manager.plans, self.configuration_name)
        self.dataset_class = IndexedDataset
        torch.manual_seed(self.config.seed)
        try:
            self.num_input_channels = determine_num_input_channels(
                self.plans_manager, self.configuration_manager, self.dataset_json
            )
            channels, managers = self.num_input_channels, (self.plans_manager, self.configuration_manager)
            self.network = nnunet.build_network(self.backbone_trainer, *managers, channels, channels, deep_supervision=False)
        except Exception as e:  # whatever nnU-Net's code makes of plans and dataset.json
            raise not_built(self.backbone_trainer.__name__, self.view_size, e) from e
        backbone = self.backbone(self.network, self.config)
        backbone.check_view(self.view_size)
        self.student = Student(backbone, self.config).to(self.device)
        if self.config.channels_last:
            self.student.to(memory_format=torch.channels_last_3d)  # convolutions take the format of their weights
        self.optimizer = make_optimizer(self.student.parameters(), self.config, self.device)
        self._built = _checksum(self.network)
        self.was_initialized = True

    # ---- start

    def on_train_start(self) -> None:
        self._claim_folder()
        if not self.was_initialized:
            self.initialize()
        self._start_from_file()
        self.make_teacher()
        self.open_data()
        cases = self.configuration_manager.batch_size
        has_teacher = self.teacher is not None
        for line in messages.opening(self.config, cases, self.view_size, self.student, has_teacher, self.autocast_dtype):
            self.print_to_log_file(line)
        if self.is_ddp:
            shares = ", ".join(map(str, self.data.share.per_rank))
            self.print_to_log_file(f"Cases of a step on each of {dist.get_world_size()} processes: {shares}.")
        self.print_plans()
        if self.local_rank == 0:
            self._write_folder()
        torch.backends.cudnn.allow_tf32 = self.config.tf32
        self.logger.update_config({"cva": self.config.as_dict()})
        self._step = TrainingStep(
            self._run(),
            self._wrapped(self.student),
            self.config,
            self.data.share.per_rank,
            self.autocast,
            self._do_i_compile(),
            self.print_to_log_file,
            self.objective,
            attention=partial(preferring, self._choose_attention()),
        )
        self._at_start = self._measure_start()
        its = self.config.iterations_per_epoch
        self._progress = Progress.restored(None if self._resumed is None else self._resumed["cva"].get("progress"))
        first = self.current_epoch * its + len(self._progress.outputs)
        self._pace = messages.Pace(its, self.num_epochs * its - first, self.print_to_log_file)
        self._views = Views(self.output_folder, self.num_epochs)
        self._bar = RunBar(self.num_epochs * its, first, self.local_rank == 0)
        self._board = Board(self.output_folder, self.local_rank == 0)
        batches = self.data.batches(first, self.num_epochs * its)
        self.dataloader_train = DeviceBatches(batches, Lane(self.device)) if self.device.type == "cuda" else batches
        if self._resumed is not None:
            self._mend_best()
        self._resumed = None
        self._saved_at = monotonic()
        empty_cache(self.device)

    def _choose_attention(self) -> str | None:
        """The kernel that attention prefers; None: torch's order."""
        views = (self.data.share.end - self.data.share.begin) * (2 if self.config.needs_second_view else 1)
        kernel, line = choose(self.config.attention, self.student.backbone, views, self.device, self.autocast_dtype)
        if line is not None:
            self.print_to_log_file(line)
        return kernel

    def _start_from_file(self) -> None:
        """Fill the network from ``init_from``, adapted where it must be; a resumed run has its weights already."""
        if self.config.init_from is not None and self._resumed is None:
            if _checksum(self.network) != self._built:
                raise ValueError("Both -pretrained_weights and init_from name weights to start from. Give one of them.")
            here = Target(self.plans_manager.plans, self.configuration_name, self.dataset_json, type(self))
            start = start_from(self.config.init_from, self.network, here)
            self._started_from = start.inherited
            for line in start.lines:
                self.print_to_log_file(line)
            heads = checkpoints.carry_heads(self.config.init_from, self.student)
            if heads is not None:
                self.print_to_log_file(heads)

    def make_teacher(self) -> None:
        """The teacher starts as a copy of the student as it is now: after nnU-Net has loaded any weights."""
        if self.config.needs_teacher:
            self.teacher = Teacher(self.student).to(self.device).eval()
        if self._resumed is not None:
            if self.teacher is not None:
                self.teacher.load_state_dict(self._resumed["cva"]["teacher"])
            steps = self._resumed["cva"].get("step", 0)
            within = f" and {steps} iterations" if steps else ""
            self.print_to_log_file(
                f"Resuming after {self.current_epoch} epochs{within}: student, teacher, heads, optimizer as in "
                f"{self._resumed_from}."
            )
        elif _checksum(self.network) != self._built:
            teacher = "the teacher starts as a copy of them" if self.teacher else "there is no teacher"
            self.print_to_log_file(f"Starting from pretrained weights; {teacher}.")
            if self.config.init_from is None:  # nnU-Net's flag, which loads the network and nothing else
                heads = ", ".join(self.student.heads()) or "none"
                self.print_to_log_file(f"Heads that start anew: {heads}. init_from takes those of a pretraining checkpoint, too.")
                self._started_from = {"file": "weights that nnU-Net's -pretrained_weights loaded"}  # it does not say which

    def open_data(self) -> None:
        """Cases to train on and pairs to watch. The student has to be there."""
        with one_after_the_other():  # the first one writes nnU-Net's splits
            training, watched = self.do_split()
        self.data = TrainingData(
            self.preprocessed_dataset_folder,
            training,
            [] if set(watched) & set(training) else watched,
            self.num_input_channels,
            self.view_size,
            self.config,
            share_of_rank(self.configuration_manager.batch_size),
            self.device.type,
            self.print_to_log_file,
        )
        self.watched_batches = self.data.watched_batches()
        self._stamps = stamps(self.data.cases.folder, training)
        before = None if self._resumed is None else self._resumed["cva"].get("cases")
        said = "" if before is None else refuse_other_cases(before, self._stamps, self.config.other_cases)
        if said:
            self.print_to_log_file(said)

    def do_split(self) -> tuple[list[str], list[str]]:
        """nnU-Net's split. With fold "all" a few cases, named in the log, are kept back for the watched pairs."""
        if self.fold != "all":
            check_folds(self.fold, self.preprocessed_dataset_folder_base, self.preprocessed_dataset_folder)
        # Of splits that it has just made nnU-Net gives NumPy's strings, and a checkpoint that holds those is not opened again.
        training, held_back = ([str(case) for case in cases] for cases in super().do_split())
        return keep_back(training, self.config.watched_cases) if self.fold == "all" else (sorted(training), sorted(held_back))

    def _wrapped(self, module: nn.Module) -> nn.Module:
        if self.is_ddp and self.config.gradient_checkpointing:
            # torch 2.6 cannot cut a graph that recomputes dropped paths at DDP's buckets, and would not compile at all.
            torch._dynamo.config.optimize_ddp = False
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=ids) if self.is_ddp else module

    # ---- one epoch

    def on_epoch_start(self) -> None:
        if not self._progress.outputs:
            self._progress = Progress()
        self._stop_if_told()
        self._pace.begin(len(self._progress.outputs))

    def on_train_epoch_start(self) -> None:
        self.num_iterations_per_epoch = self.config.iterations_per_epoch - len(self._progress.outputs)  # after a stop: the rest
        self.student.train()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.current_epoch, self.config)
        self.dataloader_train.waited = 0.0
        self.print_to_log_file("")
        self.print_to_log_file(f"Epoch {self.current_epoch} of {self.num_epochs}")

    def train_step(self, batch: dict) -> dict[str, Tensor]:
        block = self.student.backbone.block
        ready = prepare(batch, self.config, block, self.device, self.config.seed, batch["step"], share=self.data.share)
        torch.manual_seed(torch_seed("network", self.config.seed, batch["step"], self.local_rank))
        try:
            losses = self._step(ready)
        except torch.cuda.OutOfMemoryError as e:
            raise TrainingFailed(messages.out_of_memory(e, self.config)) from e
        self._pace.tick()
        self._bar.tick()
        share = self.data.share  # the mean over processes is that over cases, though they have different numbers of them
        output = {**losses, "overlap": batch["overlap"].sum() * (len(share.per_rank) / share.total)}
        self._progress.outputs.append(output)
        last = len(self._progress.outputs) == self.config.iterations_per_epoch
        if last and self.local_rank == 0 and self._views.due(self.current_epoch):
            self._views.keep(ready, batch["keys"], batch["overlap"])
        self._stop_if_told()
        return output

    def print_to_log_file(self, *args: Any, also_print_to_console: bool = True, add_timestamp: bool = True) -> None:
        """nnU-Net's, beside the progress bar of the run where there is one. A file that standard output goes to may be full."""
        bar: RunBar | None = getattr(self, "_bar", None)
        with suppress(OSError), nullcontext() if bar is None else bar.aside():
            super().print_to_log_file(*args, also_print_to_console=also_print_to_console, add_timestamp=add_timestamp)

    def autocast(self) -> AbstractContextManager:
        """The precision of a step."""
        return torch.autocast(self.device.type, self.autocast_dtype) if self.autocast_dtype else nullcontext()

    def on_train_epoch_end(self, train_outputs: list[dict[str, Tensor]]) -> None:
        seconds = self._progress.seconds + monotonic() - self._progress.began
        steps, whole = self.config.iterations_per_epoch, self._progress
        whole.outputs[len(whole.outputs) - len(train_outputs) :] = train_outputs
        means, left_out = whole.means(self.device)
        first = self.current_epoch * steps
        said = judge_skipped(left_out, steps, lambda found: self.data.cases_of(first + n for n in found))
        if said:
            self.print_to_log_file(said)
        finite = math.isfinite(means["total"])
        if not (finite and all_finite(self.student)):  # the last step of an epoch may spoil the weights without showing in a loss
            what = "weights are not finite after" if finite else f"loss became {means['total']} in"
            raise TrainingFailed(
                f"The {what} epoch {self.current_epoch}. The last checkpoint is untouched: "
                "continue from it with --c and precision fp32, or start again with a lower learning_rate."
            )
        others = {name: means.pop(name) for name in ("overlap", "skipped")}
        self.record: dict[str, Any] = {
            "epoch": self.current_epoch,
            **{f"{name}_loss": value for name, value in means.items()},
            **self._nulls(),
            **self._at_start,
            **others,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "data_wait": (whole.waited + self.dataloader_train.waited) / seconds,
            "seconds": seconds,
        }

    def _measure_start(self) -> dict[str, float]:
        """How much the features differ before the first step: what a verdict of collapse compares with. A run of 0.1.0 that is
        continued does not know."""
        if self._resumed is not None:
            return self._resumed["cva"].get("at_start", {})
        return {f"{k}_start": v for k, v in self.watch().items() if k in ("effective_rank", "spread")}

    def _nulls(self) -> dict[str, float]:
        """What losses are when nothing was learned, as far as that follows from the settings."""
        cases = self.configuration_manager.batch_size
        return {"contrastive_null": math.log(4 * cases - 3)} if self.config.contrastive_weight > 0 else {}

    def on_validation_epoch_start(self) -> None:
        pass

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        self.record.update(self.watch())

    def watch(self) -> dict[str, float]:
        """The metrics of the watched pairs now."""
        batches, how = self.watched_batches, self.autocast
        return score(self.student, self.teacher, batches, self.config, self.device, how, self.objective)

    def on_epoch_end(self) -> None:
        best = criterion(self.config)
        key, sign = best.name, best.sign
        earlier = [sign * record[key] for record in self.history.epochs if key in record]
        improved = not earlier or sign * self.record[key] > max(earlier)
        self.record["seconds"] = self._progress.seconds + monotonic() - self._progress.began
        self.history.epochs.append(self.record)
        self.current_epoch += 1
        self._progress = Progress()
        self._save(improved)
        if self.local_rank == 0:
            self._report(f"best so far: {key}" if improved else "")
            self.print_to_log_file(f"  {verdict(self.history.epochs)}")
            self._written("metrics.jsonl", self.history.write)
            self._written("progress.png", partial(self.history.plot, self.config))
            self._written("views.png", partial(self._views.draw, self.student, self.autocast))

    def _report(self, note: str) -> None:
        """The epoch's metrics to the log, and to W&B where nnU-Net's switch for it is on."""
        for line in messages.epoch(self.record, note):
            self.print_to_log_file(line)
        for name in messages.metrics(self.record):
            for logger in self.logger.loggers:
                logger.log(name, self.record[name], self.record["epoch"])
            self._written("tensorboard", partial(self._board.log, name, self.record[name], self.record["epoch"]))

    # ---- end

    def on_train_end(self) -> None:
        self._save_final()
        self.dataloader_train.close()
        self._bar.close()
        self._written("tensorboard", self._board.close)
        empty_cache(self.device)
        self.print_to_log_file("Training done.")

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Nothing is labelled: the last metrics, and what to do with the weights."""
        if self.local_rank != 0:
            return
        if self.history.epochs:
            last = {k: round(v, 4) for k, v in self.history.epochs[-1].items()}
            self.print_to_log_file(f"Metrics of the last epoch: {last}")
            self.print_to_log_file(str(verdict(self.history.epochs)))
            report_quietly(self.output_folder, self.print_to_log_file)
        if self.disable_checkpointing:
            self.print_to_log_file("Nothing was saved (--disable_checkpointing): there are no weights to fine-tune from.")
            return
        weights = join(self.output_folder, self._to_fine_tune)
        plans, name = self.plans_manager.plans, self.configuration_name
        self.print_to_log_file(messages.closing(plans, name, self.student, self.backbone_trainer, weights))


def _checksum(network: nn.Module) -> float:
    """Tells whether somebody has loaded other weights."""
    return sum(p.detach().cpu().double().abs().sum().item() for p in network.parameters())  # not every device has float64
