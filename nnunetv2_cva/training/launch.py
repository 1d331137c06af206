"""``nnUNetv2_train`` on one device or many: started once per device, by torchrun or by SLURM's srun."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from nnunetv2.run.run_training import maybe_load_checkpoint
from torch import nn
from torch.backends import cudnn

from nnunetv2_cva.datasets.next_steps import NO_GPU
from nnunetv2_cva.installation.hook import VARIABLE, recipes_folder, with_folder
from nnunetv2_cva.training.checkpoint import BEST, FINAL
from nnunetv2_cva.training.device import local_device
from nnunetv2_cva.training.local_processes import run_on_every_device
from nnunetv2_cva.transfer.target import find_target
from nnunetv2_cva.transfer.weights import NeedsOption, opened

TIMEOUT = timedelta(minutes=60)  # for the slowest rank: reading headers, compiling


@dataclass(frozen=True)
class Training:
    """What nnUNetv2_train is given; names as there."""

    dataset: str
    configuration: str
    fold: str
    trainer: str = "nnUNetTrainerCVA"
    plans: str = "nnUNetPlans"
    pretrained_weights: str | None = None
    num_gpus: int = 1
    npz: bool = False
    continue_training: bool = False
    val: bool = False
    val_best: bool = False
    disable_checkpointing: bool = False
    device: str = "cuda"


def train(asked: Training) -> int:
    """Train in this process, or as one of the processes that a launcher has started. Returns the exit code.

    Raises:
        ValueError: arguments that cannot be met, or what the trainer refuses.
        Stopped: before the end, saved.
    """
    environment = os.environ
    from_slurm(environment)
    world = int(environment.get("WORLD_SIZE", "1"))
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(NO_GPU)
    if asked.device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("torch finds no GPU of a Mac here. Use another device.")
    if asked.num_gpus < 1:
        raise ValueError(f"`num_gpus={asked.num_gpus}`: expected 1 or more.")
    if asked.device == "cuda" and world == 1 and asked.num_gpus > torch.cuda.device_count():
        raise ValueError(f"`num_gpus={asked.num_gpus}`: torch finds {torch.cuda.device_count()} CUDA GPUs on this machine.")
    if asked.num_gpus > 1 and world == 1:
        return run_on_every_device([sys.executable, *sys.argv], asked.num_gpus)
    if asked.fold != "all" and not asked.fold.isdecimal():
        raise ValueError(f'`fold`: expected "all" or a number, found {asked.fold!r}.')
    if asked.continue_training and (asked.val or asked.pretrained_weights):
        raise ValueError("`continue_training` goes with neither `val` nor `pretrained_weights`. Give one of them.")
    environment[VARIABLE] = with_folder(environment.get(VARIABLE), recipes_folder())
    torch.set_num_threads(1 if asked.device == "cuda" or world > 1 else os.cpu_count() or 1)
    with ExitStack() as ending:
        if world > 1:
            local_device(torch.device(asked.device))  # before the processes meet
            dist.init_process_group({"cuda": "nccl"}.get(asked.device, "gloo"), timeout=TIMEOUT)
            ending.callback(dist.destroy_process_group)
        _run(asked)
        if world > 1:
            gc.collect()  # wrapped modules hold groups, which have to go before the program does
            dist.barrier()  # who leaves while others still write would be taken for one that failed
    return 0


def _run(asked: Training) -> None:
    target = find_target(asked.dataset, asked.configuration, asked.plans, asked.trainer)
    plans = {**target.plans, "continue_training": asked.continue_training}
    fold = asked.fold if asked.fold == "all" else int(asked.fold)
    trainer = target.trainer(plans, asked.configuration, fold, target.dataset_json, torch.device(asked.device))
    trainer.disable_checkpointing = asked.disable_checkpointing
    if asked.val and not os.path.isfile(final := os.path.join(trainer.output_folder, FINAL)):
        raise ValueError(f"{final} does not exist: the training has not ended. Continue it with --c.")
    if asked.pretrained_weights is None or asked.val:
        maybe_load_checkpoint(trainer, asked.continue_training, asked.val)
    else:
        trainer.initialize()
        load_pretrained(trainer.network, asked.pretrained_weights)
    cudnn.deterministic, cudnn.benchmark = False, torch.cuda.is_available()
    if not asked.val:
        trainer.run_training()
    if asked.val_best:
        trainer.load_checkpoint(os.path.join(trainer.output_folder, BEST))
    trainer.perform_actual_validation(asked.npz)


def load_pretrained(network: nn.Module, file: str) -> None:
    """What nnU-Net's function of this name does, but that of several processes it takes the number of this one for that of a GPU:
    all tensors of the network but those of segmentation layers, in the same shapes. Nothing in the file is executed.

    Raises:
        ValueError: no checkpoint, or of another network; names the first tensor that does not fit.
    """
    inner = getattr(network, "module", network)  # of several processes
    inner = getattr(inner, "_orig_mod", inner)  # compiled
    try:
        weights = opened(file).get("network_weights")
    except NeedsOption as e:
        raise ValueError(f"{e.reason} If you trust it, `nnUNetv2_cva export --trust` makes a file of weights alone.") from None
    if not isinstance(weights, dict):
        raise ValueError(f"{file} holds no weights of a network (no entry 'network_weights').")
    state = inner.state_dict()
    wanted = [name for name in state if ".seg_layers." not in name]
    for name in wanted:
        found = getattr(weights.get(name), "shape", "nothing")
        if found != state[name].shape:
            shapes = f"{name}: expected {tuple(state[name].shape)}, found {found if found == 'nothing' else tuple(found)}"
            raise ValueError(f"{file} does not fit the network ({shapes}). `nnUNetv2_cva export` makes a file that does.")
    inner.load_state_dict({**state, **{name: weights[name] for name in wanted}})


def from_slurm(environment: MutableMapping[str, str]) -> None:
    """What torchrun would have set, for a task of a job step with several tasks (``srun``). Leaves alone what is there, and a
    batch script, which has SLURM_PROCID and the tasks of the whole job, too, but is alone."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environment or "SLURM_PROCID" not in environment or not tasks.isdecimal() or int(tasks) < 2:
        return
    if "MASTER_ADDR" not in environment:
        nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", "localhost"))
        try:
            done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
            environment["MASTER_ADDR"] = done.stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError) as e:
            raise ValueError(f"The first of the nodes {nodes} could not be found ({e}): set MASTER_ADDR to its name.") from None
    job = environment.get("SLURM_JOB_ID", "0")
    environment.setdefault("MASTER_PORT", str(20000 + int(job) % 20000 if job.isdecimal() else 20000))
    environment.update(RANK=environment["SLURM_PROCID"], WORLD_SIZE=tasks, LOCAL_RANK=environment.get("SLURM_LOCALID", "0"))
