"""How fast are pairs of views read from disk, beside what the disk format and the resampling cost at least?

    python benchmarks/loader.py [--image FILE.nii.gz] [--pairs 40] [--tables views cases workers memory] [--folder WORK]

Cases are made of one image (or of smooth noise) and written in nnU-Net's own blocks and chunks. Times are CPU time of one
thread: other programs on the machine change them less than they change the time on the clock.

The floor is taken for the very same pairs in the same run: opening the file, decompressing exactly the blocks of both windows
(at once where that is fewer), one copy per view into new memory (a batch is handed over), and, where a view is not a mere crop,
the resampling itself with everything prepared beforehand: three products with ready matrices for a scale, ``grid_sample`` with a
ready grid for a rotation.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time

import blosc2
import numpy as np
import torch
import torch.nn.functional as F

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.seeding import stream
from nnunetv2_cva.views.cases import Case, Cases
from nnunetv2_cva.views.geometry import Pair, draw_pair
from nnunetv2_cva.views.loader import Batches, PairDataset, make_loader
from nnunetv2_cva.views.resample import window

CASE = (192, 224, 192)
SETTINGS = {"crops": CVAConfig(rotation_p=0.0, scale_p=0.0), "default": CVAConfig(), "all rotated": CVAConfig(rotation_p=1.0)}


def write(folder: Path, shape: tuple[int, int, int], view: int, image: Path | None, count: int = 1) -> list[str]:
    """Cases of this shape as nnU-Net's preprocessing writes them for views of this size; returns their names."""
    from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

    keys = [f"case_{'x'.join(map(str, shape))}_{view}_{n}" for n in range(count)]
    if all((folder / f"{key}.b2nd").exists() for key in keys):
        return keys
    if image is not None:
        import SimpleITK

        source = torch.from_numpy(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(image))).astype(np.float32))
    else:
        generator = torch.Generator().manual_seed(0)
        source = torch.randn(24, 28, 24, generator=generator)
    voxels = F.interpolate(source[None, None], shape, mode="trilinear")[0]
    if image is None:
        voxels = voxels + 0.05 * torch.randn(voxels.shape, generator=generator)
    data = ((voxels - voxels.mean()) / voxels.std()).numpy()
    blocks, chunks = comp_blosc2_params(data.shape, (view,) * 3, data.itemsize)
    codec, level = blosc2.Codec.LZ4HC, 5
    chosen = nnUNetDatasetBlosc2._select_filter(data, blocks, chunks, codec, level)
    cparams = {"codec": codec, "clevel": level, "filters": [chosen], "nthreads": 1}
    for key in keys:
        blosc2.asarray(data, urlpath=str(folder / f"{key}.b2nd"), mode="w", chunks=chunks, blocks=blocks, cparams=cparams)
    return keys


def floor(case: Case, pair: Pair) -> Callable[[], None]:
    """What these two views cost at least, ready to be timed."""
    boxes = [window(pair, v) for v in (0, 1)]
    union = np.stack([np.min(boxes, axis=0)[:, 0], np.max(boxes, axis=0)[:, 1]], axis=1)
    together = pair.rotation is None and case.blocks(union) <= sum(map(case.blocks, boxes))
    limit = np.array(case.shape)[:, None]
    wanted = [np.clip(box, 0, limit) for box in ([union] if together else boxes)]
    slices = [(slice(None), *(slice(int(b), int(e)) for b, e in box)) for box in wanted]
    resampled = [pair.rotation is not None or view.extent != pair.size for view in pair.views]
    prepared = [_prepared(pair, v, boxes[v]) if resampled[v] else None for v in (0, 1)]
    inner = [tuple(slice(0, int(e - b)) for b, e in np.clip(box, 0, limit)) for box in boxes]

    def run() -> None:
        out = torch.empty(2, 1, *pair.size)
        opened = Case(case.path)
        for where in slices:
            opened.array[where]
        for v in (0, 1):
            if resampled[v]:
                _resample(prepared[v], out[v])
            else:  # a copy of as many voxels as the view has of the case
                i, j, k = inner[v]
                out[v, :, i, j, k].copy_(source[v, :, i, j, k])

    source = torch.zeros(2, 1, *pair.size)
    return run


def _prepared(pair: Pair, view: int, box: np.ndarray) -> tuple:
    extent = [int(e - b) for b, e in box]
    x = torch.zeros(1, *extent)
    if pair.rotation is None:
        return x, [torch.rand(n, s) for n, s in zip(pair.size, extent, strict=True)]
    coordinates = np.stack(pair.coordinates(view)[::-1], axis=-1)
    scaled = 2 * (coordinates - box[::-1, 0]) / np.array(extent[::-1]) - 1
    return x, torch.from_numpy(scaled.astype(np.float32))[None]


def _resample(prepared: tuple, out: torch.Tensor) -> None:
    x, how = prepared
    if isinstance(how, torch.Tensor):
        out.copy_(F.grid_sample(x[None], how, mode="bilinear", padding_mode="border", align_corners=False)[0])
        return
    i, j, k = how
    x = (i @ x.flatten(2).flatten(1).view(x.shape[1], -1)).view(1, len(i), *x.shape[2:])
    x = torch.matmul(j, x)
    torch.matmul(x, k.T, out=out)


def measure(folder: Path, keys: list[str], view: int, config: CVAConfig, pairs: int) -> dict[str, float]:
    """Mean CPU milliseconds per pair: the loader, the floor; both for every pair."""
    size = (view,) * 3
    data = PairDataset(Cases(folder, keys), keys, size, config, 1, (0, 1), seed=0)
    loader = least = 0.0
    for step in range(-2, pairs):  # the first two warm up
        case = data.cases.open(keys[0])
        run = floor(case, draw_pair(case.shape, size, data.config, stream("views", 0, abs(step), 0)))
        # Who comes second finds the compressed blocks in the processor's cache: they take turns.
        spent = {}
        for who in (("loader", "floor"), ("floor", "loader"))[step % 2]:
            began = process_time()
            data[abs(step)] if who == "loader" else run()
            spent[who] = process_time() - began
        if step >= 0:
            loader, least = loader + spent["loader"], least + spent["floor"]
        del run
    return {"ms": 1000 * loader / pairs, "floor": 1000 * least / pairs}


def table_of_views(folder: Path, image: Path | None, pairs: int, views: list[int]) -> None:
    """One core: every size of view, every setting."""
    print(f"Case {'x'.join(map(str, CASE))}, CPU ms per pair of views, one core:\n")
    print("| view | spatial transforms | ms per pair | floor | ratio | pairs/s per core |\n|---|---|---|---|---|---|")
    for view in views:
        keys = write(folder, CASE, view, image)
        for name, config in SETTINGS.items():
            found = measure(folder, keys, view, config, pairs)
            print(
                f"| {view}^3 | {name} | {found['ms']:.1f} | {found['floor']:.1f} | {found['ms'] / found['floor']:.2f} | "
                f"{1000 / found['ms']:.1f} |",
                flush=True,
            )
    print()


def table_of_cases(folder: Path, image: Path | None, pairs: int) -> None:
    """One core: the same view out of larger and larger cases."""
    print("View 128^3, crops, larger cases:\n\n| case | ms per pair | floor |\n|---|---|---|")
    for shape in (CASE, (256, 256, 256), (320, 320, 320), (448, 448, 448)):
        found = measure(folder, write(folder, shape, 128, image), 128, SETTINGS["crops"], pairs)
        print(f"| {'x'.join(map(str, shape))} | {found['ms']:.1f} | {found['floor']:.1f} |", flush=True)
    print()


def table_of_workers(folder: Path, image: Path | None, steps: int) -> None:
    """Through torch's DataLoader: time on the clock, 4 cases per step."""
    print("4 cases per step, on the clock:\n\n| view | workers | default, pairs/s | crops, pairs/s |\n|---|---|---|---|")
    for view in (128, 160):
        keys = write(folder, CASE, view, image, count=4)
        for workers in (1, 2):
            rates = [_rate(folder, keys, view, SETTINGS[name], workers, steps) for name in ("default", "crops")]
            print(f"| {view}^3 | {workers} | {rates[0]:.1f} | {rates[1]:.1f} |", flush=True)
    print()


def _rate(folder: Path, keys: list[str], view: int, config: CVAConfig, workers: int, steps: int) -> float:
    """Pairs per second over the same steps with any number of workers."""
    data = PairDataset(Cases(folder, keys), keys, (view,) * 3, config, 4, (0, 4), seed=0)
    batches = Batches(make_loader(data, 0, 10**6, workers, 2)[0])
    for _ in range(4):
        next(batches)
    began = perf_counter()
    for _ in range(steps):
        next(batches)
    seconds = perf_counter() - began
    batches.close()
    return 4 * steps / seconds


def table_of_memory(folder: Path, image: Path | None) -> None:
    """Peak of a worker (Linux, VmHWM: all of the process with torch in it, and the shared memory of its batches)."""
    print("Peak memory of a worker process, 4 cases per step:\n")
    print("| view | spatial transforms | MB | of which batches |\n|---|---|---|---|")
    for view in (128, 160):
        keys = write(folder, CASE, view, image, count=4)
        for name in ("crops", "all rotated"):
            command = [sys.executable, __file__, "--worker", str(folder), str(view), name, *keys]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peak, batches = map(float, done.stdout.splitlines()[-1].split())
            print(f"| {view}^3 | {name} | {peak:.0f} | {batches:.0f} |", flush=True)
    print()


def worker(folder: str, view: str, name: str, *keys: str) -> None:
    """Load some steps with one worker; print its peak and the three batches in it, in MB."""
    data = PairDataset(Cases(folder, list(keys)), list(keys), (int(view),) * 3, SETTINGS[name], 4, (0, 4), seed=0)
    batches = Batches(make_loader(data, 0, 10**6, 1, 2)[0])
    (process,) = batches._iterator._workers
    for _ in range(8):
        next(batches)
    peak = _peak(process.pid)
    batches.close()
    print(peak, 3 * data.batch_bytes / 2**20)


def _peak(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def main() -> None:
    """Write the cases, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = ("views", "cases", "workers", "memory")
    parser.add_argument("--image", type=Path, help="an image to make the cases of (default: smooth noise)")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--views", type=int, nargs="+", default=[64, 96, 128, 160])
    parser.add_argument("--tables", nargs="+", choices=tables, default=tables)
    parser.add_argument("--folder", type=Path, help="where to write the cases (default: a temporary folder)")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.worker:
        worker(*args.worker)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if "views" in args.tables:
            table_of_views(folder, args.image, args.pairs, args.views)
        if "cases" in args.tables:
            table_of_cases(folder, args.image, args.pairs)
        if "workers" in args.tables:
            table_of_workers(folder, args.image, args.pairs)
        if "memory" in args.tables:
            table_of_memory(folder, args.image)


if __name__ == "__main__":
    main()
