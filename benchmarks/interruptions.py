"""Runs that are killed and stopped at random moments end bit for bit as one that was left alone.

    python benchmarks/interruptions.py --folder /tmp/interrupted [--count 48] [--seed 0]

A tiny training, started again with --c after every interruption: SIGKILL (half of them), SIGTERM, SIGUSR1, SIGHUP; one in five
comes while the program starts. When a run has reached its end it is compared with the one left alone, network, teacher, heads,
optimizer and metrics, and the next one begins, until there were enough interruptions. POSIX only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
SETTINGS = {"epochs": 24, "iterations_per_epoch": 8, "checkpoint_minutes": 1e-9, "mask_block": 4, "workers": 1}
ENTRY = "import sys; from nnunetv2_cva.commands.main import main; sys.exit(main(sys.argv[1:]))"
WAYS = (signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def start(log: Path) -> subprocess.Popen[bytes]:
    from helpers.projects import CONFIGURATION, NAME

    command = [sys.executable, "-W", "ignore", "-c", ENTRY, "train", NAME, CONFIGURATION, "all", "-device", "cpu", "--c"]
    with open(log, "wb") as f:
        return subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, start_new_session=True)


def interrupt(log: Path, draw: random.Random, starting: float) -> tuple[str, int]:
    """Start, and send one signal at a random moment. Returns what was sent, empty where the run ended before, and the code."""
    process, way = start(log), draw.choice(WAYS)
    if draw.random() < 0.2:
        moment = draw.uniform(0, starting)
    else:
        while process.poll() is None and b"\nEpoch " not in log.read_bytes() and b": Epoch " not in log.read_bytes():
            time.sleep(0.05)
        moment = draw.uniform(0, 6)
    try:
        return "", process.wait(moment)
    except subprocess.TimeoutExpired:
        process.send_signal(way)
    try:
        return way.name, process.wait(120)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # loader processes that outlive a killed training
        except ProcessLookupError:
            pass


def ended(results: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    (final,) = results.rglob("checkpoint_final.pth")
    records = [json.loads(line) for line in (final.parent / "metrics.jsonl").read_text().splitlines()]
    left = sorted(p.name for p in final.parent.iterdir() if p.suffix in (".partial", ".lock"))
    assert not left, left
    return torch.load(final, weights_only=True), [
        {k: v for k, v in r.items() if k not in ("seconds", "data_wait")} for r in records
    ]


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [where]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for k in a if k not in ("seconds", "data_wait", "waited") for d in differences(a[k], b[k], f"{where}.{k}")]
    if isinstance(a, (list, tuple)) and len(a) == len(b):
        return [d for n, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{where}.{n}")]
    return [] if a == b else [where]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from helpers.projects import make_project

    draw, sent, runs = random.Random(args.seed), Counter[tuple[str, int]](), 0
    args.folder.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        make_project(args.folder, patch, view=(8, 12, 8), cva=SETTINGS)
        results, log = args.folder / "results", args.folder / "output.txt"
        began = time.monotonic()
        process = start(log)
        while b"Epoch 0" not in log.read_bytes() and process.poll() is None:
            time.sleep(0.05)
        starting = time.monotonic() - began
        assert process.wait() == 0, log.read_text()
        alone = ended(results)
        results.rename(args.folder / "alone")
        while sent.total() < args.count:
            results.mkdir()
            while not list(results.rglob("checkpoint_final.pth")):
                way, code = interrupt(log, draw, starting)
                if way:
                    sent[way, code] += 1
                    assert code in (0, 75, -getattr(signal, way)), log.read_text()
                    print(f"{sent.total()}: {way}, code {code}", file=sys.stderr, flush=True)
                else:
                    assert code == 0, log.read_text()
            assert start(log).wait() == 0, (
                log.read_text()
            )  # a signal after the last step may have ended what comes after training
            found, runs = ended(results), runs + 1
            assert not (wrong := differences(alone, found)), wrong
            results.rename(args.folder / f"run_{runs}")
    print(f"{runs} runs, each equal to the one left alone bit for bit. Signals and exit codes:")
    for (way, code), number in sorted(sent.items()):
        print(f"  {way}, {code}: {number}")


if __name__ == "__main__":
    main()
