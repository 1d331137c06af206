"""What this process may use of the machine: cores and memory for loading data."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

WORKERS_VARIABLE = "nnUNet_n_proc_DA"  # nnU-Net's own
MOST_WORKERS = 12
MOST_WORKERS_CPU = 2  # training on the CPU needs the cores itself
MEMORY_SHARE = 0.25  # of what is available, for batches that wait to be used
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
SHARED_MEMORY = Path("/dev/shm")


def worker_count(configured: int | None, device_type: str, environment: Mapping[str, str], processes: int = 1) -> int:
    """How many worker processes load data: ``nnUNet_n_proc_DA``, else ``configured``, else from the cores.

    ``processes``: training processes that share this machine's cores; SLURM's share per task is already one process's.

    Raises:
        ValueError: the variable is not a whole number >= 0.
    """
    text = environment.get(WORKERS_VARIABLE, "").strip()
    if text:
        if not text.isdecimal():
            raise ValueError(f"environment variable {WORKERS_VARIABLE}: expected a whole number >= 0, found {text!r}.")
        return int(text)
    if configured is not None:
        return configured
    most = MOST_WORKERS_CPU if device_type == "cpu" else MOST_WORKERS
    return min(max(usable_cores(environment, CGROUPS, processes) - 1, 1), most)


def usable_cores(environment: Mapping[str, str], cgroups: Path, processes: int = 1) -> int:
    """Cores that one of ``processes`` may keep busy: the least of affinity, cgroup quota and SLURM's allocation."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = [float(available), *_cgroup_quota(cgroups)]
    if environment.get("SLURM_CPUS_ON_NODE", "").isdecimal():
        limits.append(int(environment["SLURM_CPUS_ON_NODE"]))
    limits = [limit / processes for limit in limits]
    if environment.get("SLURM_CPUS_PER_TASK", "").isdecimal():
        limits.append(int(environment["SLURM_CPUS_PER_TASK"]))
    return max(1, int(min(limits)))


def fit_into_memory(batch_bytes: int, workers: int, prefetch: int) -> tuple[int, int, str | None]:
    """``(workers, prefetch, note)``: as asked for, or less, so that waiting batches keep to their share of memory.

    A worker has memory for ``prefetch`` batches that wait and one that is in use. 0 workers load in the main process, where
    nothing is shared and nothing waits.
    """
    available = [free for free, _ in (_shared_memory(), _memory()) if free is not None]
    if not workers or not available:
        return workers, prefetch, None
    room = int(MEMORY_SHARE * min(available) // batch_bytes)  # batches
    if workers * (prefetch + 1) <= room:
        return workers, prefetch, None
    fitting_prefetch = max(1, min(prefetch, room // workers - 1))
    fitting_workers = min(workers, room // (fitting_prefetch + 1))
    note = (
        f"Loading with {fitting_workers} instead of {workers} workers and {fitting_prefetch} instead of {prefetch} "
        f"steps ahead: a batch takes {batch_bytes / 2**20:.0f} MB and {memory_report()}. In docker, --shm-size "
        "gives more."
    )
    return fitting_workers, fitting_prefetch, note


def memory_report() -> str:
    """Free and total shared and main memory in words."""
    parts = []
    for name, (free, total) in (("shared memory (/dev/shm)", _shared_memory()), ("memory", _memory())):
        if free is not None and total is not None:
            parts.append(f"{free / 2**30:.1f} of {total / 2**30:.1f} GB {name}")
    return " and ".join(parts) + " are free" if parts else "the free memory is not known"


def _shared_memory() -> tuple[int | None, int | None]:
    """Free and total bytes."""
    if not SHARED_MEMORY.is_dir():
        return None, None
    usage = shutil.disk_usage(SHARED_MEMORY)
    return usage.free, usage.total


def _memory() -> tuple[int | None, int | None]:
    """Available and total bytes of main memory; of the container's, where it is limited to less."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free, total = (int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    except (OSError, KeyError, ValueError):
        return None, None
    for folder in _own_groups(CGROUPS):
        limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
        if limit is not None and used is not None and limit < total:
            free, total = min(free, max(0, limit - used + _cached(folder))), limit
    return free, total


def _cached(folder: Path) -> int:
    """Bytes of files that a group's memory holds and gives back when asked to: cases that were read count as used."""
    try:
        lines = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return int(lines["active_file"]) + int(lines["inactive_file"])
    except (OSError, KeyError, ValueError):
        return 0


def _own_groups(cgroups: Path) -> Iterator[Path]:
    """The folders whose limits hold for this process (cgroup v2), outermost first. In a container that is mostly the root."""
    yield cgroups
    try:
        own = next(line[3:] for line in OWN_CGROUP.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return
    parts = [part for part in own.split("/") if part not in ("", "..")]
    for depth in range(1, len(parts) + 1):
        yield cgroups.joinpath(*parts[:depth])


def _cgroup_quota(cgroups: Path) -> list[float]:
    """Cores that quotas amount to (cgroup v2, else v1); empty where there is none."""
    quotas = []
    for folder in _own_groups(cgroups):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            quotas.append(int(quota) / int(period))
        except (OSError, ValueError):  # no such file, or "max"
            pass
    if quotas:
        return quotas
    quota_v1, period_v1 = (_number(cgroups / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    return [quota_v1 / period_v1] if quota_v1 is not None and period_v1 and quota_v1 > 0 else []


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
