"""What ``gpu.py`` has found, as tables for ``speed.md``: numbers beside what the machine can do and beside what is aimed at."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

# Seconds for 250 iterations on an H100 or H200: usual in the field, and what the FLOPs allow at best.
AIMS = {"resencl_128": {"usual": 91, "best public": 55, "floor": 43}, "primusm_160": {"usual": 112, "reachable": 82, "floor": 65}}
WHOLE = "whole step, compiled"


def tables(results: dict[str, Any]) -> Iterator[str]:
    """Lines of Markdown."""
    items = results["items"]
    found = {name: item["found"] for name, item in items.items() if item["found"]}
    yield from _hardware(found.get("machine", {}), results["device"])
    yield from _states(items)
    peak = found.get("machine", {}).get("bf16_tflops")
    for name in ("resencl", "primus"):
        yield from _steps(found.get(name, {}), peak)
    for subject, parts in found.get("parts", {}).items():
        yield from _parts(subject, parts)
    yield from _attention(found.get("attention", {}))
    yield from _switches(found)
    yield from _data(found.get("data", {}))
    yield from _augmentation(found.get("augmentation", {}))
    yield from _training(found.get("training", {}))


def _table(title: str, head: list[str], rows: list[list[Any]]) -> Iterator[str]:
    if rows:
        yield from ("", f"### {title}", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head))
        yield from ("| " + " | ".join(map(str, row)) + " |" for row in rows)


def _hardware(machine: dict[str, Any], device: str) -> Iterator[str]:
    if not machine:
        yield f"Device: {device}; the machine has not been measured."
        return
    gpu = ""
    if "driver" in machine:
        gpu = (
            f", {machine['memory'] / 2**30:.0f} GB, compute capability {machine['capability']}, driver {machine['driver']}, "
            f"CUDA {machine['cuda']}, cuDNN {machine['cudnn']}"
        )
    yield f"Hardware: {machine['name']}{gpu}; {machine['cores']} cores, torch {machine['torch']}, Python {machine['python']}."
    if "bf16_tflops" in machine:
        yield (
            f"It copies {machine['copy_gb_s']:.0f} GB/s (read and written) and multiplies bf16 matrices at "
            f"{machine['bf16_tflops']:.3g} TFLOP/s: shares below are of these."
        )


def _states(items: dict[str, Any]) -> Iterator[str]:
    rows = [[name, item["state"], item["seconds"], _last(item.get("error", ""))] for name, item in items.items()]
    yield from _table("What ran", ["item", "came to", "s", "error"], rows)
    tests = items.get("correct", {}).get("found", {})
    if "summary" in tests:
        yield from ("", f"Tests: {tests['summary']}", *(f"- {line}" for line in tests["failed"]))


def _last(error: str) -> str:
    lines = error.strip().splitlines()
    return lines[-1][:120].replace("|", "/") if lines else ""


@cache
def _flops(subject: str) -> dict[str, int]:
    from step import counted

    return counted(subject)[1]


def _row(name: str, found: dict[str, float], flops: int | None, peak: float | None) -> list[str]:
    rate = None if flops is None else flops / found["seconds"] / 1e12
    return [
        name,
        f"{found['first']:.1f}",
        f"{1000 * found['seconds']:.1f}",
        f"{100 * found['spread']:.1f} %",
        f"{250 * found['seconds']:.1f}",
        "" if rate is None else f"{rate:.3g}",
        "" if rate is None or not peak else f"{100 * rate / peak:.0f} %",
        f"{found['peak']:.2f}" if "peak" in found else "",
    ]


HEAD = ["step", "first, s", "ms", "halves differ by", "s for 250", "TFLOP/s", "of the peak", "GB at the peak"]


def _steps(found: dict[str, Any], peak: float | None) -> Iterator[str]:
    runs = {name: value for name, value in found.items() if isinstance(value, dict)}
    if not runs:
        return
    subject = found["subject"]
    flops = _flops(subject)
    yield from _table(subject, HEAD, [_row(n, v, flops[n.partition(",")[0]], peak) for n, v in runs.items()])
    whole, slow = runs.get(WHOLE), runs.get("slow way")
    if whole and slow:
        memory = f", of its memory {whole['peak'] / slow['peak']:.2f}" if "peak" in whole else ""
        yield from ("", f"Whole step / slow way: {whole['seconds'] / slow['seconds']:.2f} of its time{memory}.")
    if whole and subject in AIMS:
        aims = ", ".join(f"{name} {seconds}" for name, seconds in AIMS[subject].items())
        yield from ("", f"250 iterations: {250 * whole['seconds']:.0f} s ({aims}).")


def _parts(subject: str, parts: dict[str, float]) -> Iterator[str]:
    whole = parts["whole step"]
    rows = [[name, f"{1000 * s:.2f}", f"{100 * s / whole:.1f} %"] for name, s in parts.items()]
    yield from _table(f"{subject}, parts, plain", ["part", "ms", "of the whole step"], rows)


def _attention(found: dict[str, Any]) -> Iterator[str]:
    kernels = ("flash", "cudnn", "efficient")
    alone = {label: times for label, times in found.items() if not label.startswith("whole")}
    rows = [
        [label, *("fails" if times[k] is None else f"{1000 * times[k]:.2f}" for k in kernels)] for label, times in alone.items()
    ]
    yield from _table("Attention by itself, ms per step", ["views x heads x tokens x channels", *kernels], rows)
    yield from _table("Kernels of attention", HEAD, _rows(found, "whole"))


def _rows(found: dict[str, Any], start: str = "") -> list[list[str]]:
    """Ways that were measured; those that failed say how."""
    chosen = {label: v for label, v in found.items() if label.startswith(start) and label != "subject"}
    blank = [""] * (len(HEAD) - 2)
    return [_row(n, v, None, None) if isinstance(v, dict) else [n, v.replace("|", "/"), *blank] for n, v in chosen.items()]


def _switches(found: dict[str, Any]) -> Iterator[str]:
    titles = {
        "channels_last": "channels_last_3d",
        "graphs": "CUDA graphs (reduce-overhead), compiled",
        "checkpointing": "gradient_checkpointing, compiled",
    }
    for name, title in titles.items():
        yield from _table(title, HEAD, _rows(found.get(name, {})))
    rows = [[label, f"{1000 * v['seconds']:.2f}", f"{v['gb_s']:.0f}"] for label, v in found.get("norms", {}).items()]
    yield from _table("Instance norm and LeakyReLU, forward and backward", ["how", "ms", "GB/s of what has to be moved"], rows)


def _data(found: dict[str, Any]) -> Iterator[str]:
    rows = [
        [
            label,
            f"{v['loader'] * v['cases']:.1f}",
            f"{v['device'] * v['cases']:.1f}",
            f"{v['both'] * v['cases']:.1f}",
            f"{100 * v['waiting']:.1f} %",
            f"{v['first_step']:.1f}",
            f"{v['memory'] / 2**30:.1f}",
        ]
        for label, v in found.items()
        if isinstance(v, dict)
    ]
    head = ["loader", "loader alone, cases/s", "device alone", "both", "data wait", "first step, s", "GB"]
    yield from _table("A training's data", head, rows)
    yield from (f"- {label}: {line}" for label, v in found.items() if isinstance(v, dict) for line in v["said"])
    yield from (f"- {label}: {v}" for label, v in found.items() if isinstance(v, str))


def _augmentation(found: dict[str, Any]) -> Iterator[str]:
    names = list(next(iter(found.values()), {}))
    rows = [[name, *(f"{times[name]:.3f}" for times in found.values())] for name in names]
    yield from _table("Augmentation and masking on the device, ms", ["per view", *found], rows)


def _training(found: dict[str, Any]) -> Iterator[str]:
    rows = [[name, f"{value:.4g}"] for name, value in found.items() if isinstance(value, float)]
    yield from _table("A pretraining and what it is good for", ["", ""], rows)
    yield from ("", found.get("verdict", ""), "", *("    " + line for line in found.get("comparison", [])))
    epochs = found.get("epochs", [])
    names = [n for n in (epochs[-1] if epochs else {}) if n.endswith("_loss") or n in ("retrieval", "effective_rank", "seconds")]
    shown = epochs[:: max(1, len(epochs) // 10)]
    yield from _table("Its epochs", ["epoch", *names], [[e["epoch"], *(f"{e[n]:.3g}" for n in names)] for e in shown])
