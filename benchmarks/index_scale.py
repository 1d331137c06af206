"""Does the start of a training depend on how many cases there are? A generated index of up to 100,000 cases of 7 datasets.

    python benchmarks/index_scale.py [--cases 1000 10000 100000] [--folder WORK]

The cases are links to a few small real ones, in folders as OpenMind's are. Every number of cases is measured in a process of
its own: how long the trainer's start takes (list of cases, checks without voxels, loader, first batch), once with the index
and once by listing the folder (what nnU-Net does; cases in one folder), and what memory it and its two loader processes hold.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

SHAPES = [(1, 40, 48, 44), (1, 52, 40, 56), (1, 44, 60, 40)]
VIEW, BATCH, STEPS = (24, 32, 24), 4, 20


def generate(folder: Path, cases: int, indexed: bool) -> Path:
    """``folder`` with an index of a tree, or with all cases side by side."""
    import blosc2
    import numpy as np

    from nnunetv2_cva.views.index import Entry, write_index

    folder.mkdir(parents=True)
    originals = []
    for n, shape in enumerate(SHAPES):
        originals.append(folder / f"original_{n}.bin")
        voxels = np.random.default_rng(n).normal(size=shape).astype(np.float32)
        blosc2.asarray(voxels, urlpath=str(originals[-1]))
    entries, data = [], folder / "cases"
    for i in range(cases):
        dataset = f"ds{int(7 * (i / cases) ** 2):03d}"  # of very different sizes
        name = f"OpenNeuro/{dataset}/sub-{i // 3:06d}/ses-1/T{i % 3}w" if indexed else f"OpenNeuro__{dataset}__sub-{i:06d}"
        path = data / f"{name}.b2nd"
        if indexed or i == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
        os.link(originals[i % 3], path)
        entries.append(Entry(name, SHAPES[i % 3], dataset))
    if indexed:
        write_index(folder / "index", entries, str(data))
    return folder / "index" if indexed else data


def measure(folder: Path) -> dict[str, float]:
    """What a training does before its first step, and the first steps."""
    import numpy as np

    from nnunetv2_cva.config import CVAConfig
    from nnunetv2_cva.training.data import open_cases
    from nnunetv2_cva.views.cases import check_cases
    from nnunetv2_cva.views.geometry import feasibility
    from nnunetv2_cva.views.index import read_index
    from nnunetv2_cva.views.loader import Batches, Cases, PairDataset, make_loader

    before, began = memory(os.getpid()), perf_counter()  # later, what is shared with the workers would not count
    index = read_index(folder)
    cases = open_cases(folder) if index is None else Cases(index.root, index.keys)
    listed = perf_counter()
    config = CVAConfig()
    checked = check_cases(cases, 1, seconds=0)
    feasibility(checked.shapes[:512], VIEW, config, np.random.default_rng(0))
    ready = perf_counter()
    dataset = PairDataset(cases, cases.keys, VIEW, config, BATCH, (0, BATCH), 0)
    own = memory(os.getpid()) - before
    loader, _ = make_loader(dataset, 0, STEPS, workers=2, prefetch=2)
    batches = iter(Batches(loader))
    next(batches)
    first = perf_counter()
    workers = [memory(pid) for pid in children(os.getpid())]
    for _ in range(STEPS - 1):
        next(batches)
    after = [memory(pid) for pid in children(os.getpid())]
    return {
        "list s": listed - began,
        "checks s": ready - listed,
        "first batch s": first - ready,
        "start s": first - began,
        "own MB": own,
        "workers MB": sum(workers),
        "grown MB": sum(after) - sum(workers),
    }


def children(pid: int) -> list[int]:
    """Processes that ``pid`` has started (Linux)."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def memory(pid: int) -> float:
    """MB that the process alone holds (Linux): what it shares with its parent is not counted."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(lines[name].split()[0]) for name in ("Private_Clean", "Private_Dirty")) / 1024


def main() -> None:
    """Generate, measure in processes of their own, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for cases in args.cases:
            for indexed in (True, False):
                data = generate(Path(folder, f"{cases}_{indexed}"), cases, indexed)
                done = subprocess.run([sys.executable, __file__, "--measure", data], capture_output=True, text=True, check=True)
                rows.append({"cases": cases, "by": "index" if indexed else "listing", **json.loads(done.stdout.splitlines()[-1])})
    print("  ".join(f"{name:>13}" for name in rows[0]))
    for row in rows:
        print("  ".join(f"{v:13.3f}" if isinstance(v, float) else f"{v:>13}" for v in row.values()))


if __name__ == "__main__":
    main()
