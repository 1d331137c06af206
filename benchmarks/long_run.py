"""Whether a long run stays as large as it was: memory, file descriptors and shared memory of a training of many short epochs.

    python benchmarks/long_run.py --folder /tmp/long [--steps 10000] [--steps-per-epoch 25] [--workers 2]

A tiny network and tiny cases, everything else as always: loader processes, checkpoints, metrics, pictures. One line for every
tenth epoch, then how fast memory grew in each quarter of the run. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))


def memory(process: int, kind: str = "Anonymous") -> float:
    """MB of a process: what is its own ("Anonymous"), or its part of shared memory ("Pss_Shmem")."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) / 1024


def children(process: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def held() -> dict[str, float]:
    """What this process and its loader processes hold now."""
    me = os.getpid()
    return {
        "main": memory(me),
        "loaders": sum(memory(c) for c in children(me)),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "shared": memory(me, "Pss_Shmem"),
        "files": len(os.listdir("/dev/shm")),
        "objects": len(gc.get_objects()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--steps-per-epoch", type=int, default=25)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    from helpers.projects import make_project, make_trainer
    from nnunetv2_cva.trainers.nnUNetTrainerCVA import nnUNetTrainerCVA

    args.folder.mkdir(parents=True)
    epochs = args.steps // args.steps_per_epoch
    settings = {"epochs": epochs, "iterations_per_epoch": args.steps_per_epoch, "workers": args.workers}
    rows: list[tuple[int, dict[str, float]]] = []
    with pytest.MonkeyPatch.context() as patch:
        make_project(args.folder, patch, view=(8, 12, 8), cva={**settings, "mask_block": 4, "checkpoint_minutes": 0.5})
        trainer: Any = make_trainer(nnUNetTrainerCVA)
        ordinary = trainer.on_epoch_end

        def on_epoch_end() -> None:
            ordinary()
            rows.append((trainer.current_epoch * args.steps_per_epoch, held()))
            if trainer.current_epoch % 10 == 0:
                print(rows[-1][0], {k: round(v, 1) for k, v in rows[-1][1].items()}, file=sys.stderr, flush=True)

        trainer.on_epoch_end = on_epoch_end
        trainer.run_training()
    print("after the end:", {k: round(v, 1) for k, v in held().items()})
    for part in np.array_split(np.arange(len(rows)), 4):
        steps = np.array([rows[n][0] for n in part])
        slopes = {k: np.polyfit(steps, [rows[n][1][k] for n in part], 1)[0] * 1000 for k in ("main", "loaders")}
        last = rows[part[-1]][1]
        print(
            f"steps {steps[0]:5d} to {steps[-1]:5d}: main {last['main']:.0f} MB ({slopes['main']:+.1f} MB per 1000 steps), "
            f"loaders {last['loaders']:.0f} MB ({slopes['loaders']:+.1f}), {last['descriptors']:.0f} descriptors, "
            f"{last['shared']:.1f} MB shared"
        )


if __name__ == "__main__":
    main()
