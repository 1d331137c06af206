"""Fine-tuning with nnU-Net's own trainers: another learning rate and a warm-up, all else as they do it.

Checkpoints carry the stock trainer's name, so prediction needs nothing of this package.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_cva.config import FinetuneConfig, resolve
from nnunetv2_cva.training import checkpoint as checkpoints
from nnunetv2_cva.training import messages
from nnunetv2_cva.training.schedule import learning_rate, make_optimizer


class Finetuning(nnUNetTrainer):
    """Stands before a stock trainer in a recipe's bases: ``class X(Finetuning, nnUNet_Primus_M_Trainer)``."""

    config: FinetuneConfig = FinetuneConfig()
    optimizer: Any
    lr_scheduler: Any

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008  nnU-Net's signature
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.config = resolve(type(self).config, self.plans_manager.plans, configuration, os.environ)
        self.initial_lr, self.weight_decay = self.config.learning_rate, self.config.weight_decay
        self.num_epochs, self.num_iterations_per_epoch = self.config.epochs, self.config.iterations_per_epoch

    @classmethod
    def stock_trainer(cls) -> type[nnUNetTrainer]:
        """The class that this one fine-tunes with, which stands behind ``Finetuning`` in a recipe's bases."""
        return cls.__mro__[cls.__mro__.index(Finetuning) + 1]

    def configure_optimizers(self, stage: str | None = None) -> tuple[torch.optim.Optimizer, Schedule]:
        """One optimizer for the whole training. ``stage``: trainers with a warm-up of their own ask again when it ends."""
        if self.optimizer is not None:
            return self.optimizer, self.lr_scheduler
        optimizer = make_optimizer(self.network.parameters(), self.config, self.device)
        return optimizer, Schedule(optimizer, self.config)

    def on_train_start(self) -> None:
        super().on_train_start()
        self.print_to_log_file(
            f"Fine-tuning: {self.config.optimizer}, learning rate {self.config.learning_rate:g} after "
            f"{self.config.warmup} warm-up epochs of {self.num_epochs}. "
            f"Checkpoints carry the name {self.stock_trainer().__name__}."
        )
        for line in messages.short_fine_tuning(self.config, self.stock_trainer().__name__):
            self.print_to_log_file(line)

    def save_checkpoint(self, filename: str) -> None:
        """nnU-Net's checkpoint, written atomically, under the stock trainer's name."""
        if self.local_rank != 0 or self.disable_checkpointing:
            return
        network = self.network.module if isinstance(self.network, DistributedDataParallel) else self.network
        network = network._orig_mod if isinstance(network, OptimizedModule) else network
        content = {
            "network_weights": network.state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "grad_scaler_state": self.grad_scaler.state_dict() if self.grad_scaler is not None else None,
            "logging": self.logger.get_checkpoint(),
            "_best_ema": self._best_ema,
            "current_epoch": self.current_epoch + 1,
            "init_args": self.my_init_kwargs,
            "trainer_name": self.stock_trainer().__name__,
            "inference_allowed_mirroring_axes": self.inference_allowed_mirroring_axes,
        }
        checkpoints.save(content, filename)

    def load_checkpoint(self, filename_or_checkpoint: Any) -> None:
        """As nnU-Net's base trainer does it: the schedule follows from the epoch, no stage has to be restored first."""
        nnUNetTrainer.load_checkpoint(self, filename_or_checkpoint)


class Schedule:
    """nnU-Net's interface to a learning rate that is a function of the epoch alone."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: FinetuneConfig) -> None:
        self.optimizer, self.config = optimizer, config

    def step(self, epoch: int) -> None:
        """Set the rate of ``epoch``."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(epoch, self.config)
