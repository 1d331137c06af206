"""What has to be right before nnU-Net reaches our code, one line per check.

Whatever could take the process down with it (torch, torchvision, timm, nnU-Net's trainer look-up) runs in a subprocess.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_cva.installation.hook import VARIABLE, recipes_folder
from nnunetv2_cva.installation.versions import REASONS, unsupported

TRAINER = "nnUNetTrainerCVA"
DISK_GB, SHARED_MEMORY_GB = 10, 2

_REINSTALL = "install torch and torchvision together, from one index, by the command that pytorch.org/get-started gives"
_LOOKUP = (
    "from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find\n"
    f"print('FOUND', find({TRAINER!r}).__name__)\n"
)
_ASK_TORCH = """
import importlib, importlib.util, json
facts = {}
try:
    import torch
    cuda = torch.cuda.is_available()
    facts.update(torch=torch.__version__, built_for=torch.version.cuda or torch.version.hip, cuda=cuda)
    facts.update(mps=torch.backends.mps.is_available(), triton=importlib.util.find_spec("triton") is not None)
    if cuda:
        p = torch.cuda.get_device_properties(0)
        facts.update(gpus=torch.cuda.device_count(), gpu=p.name, gpu_memory=p.total_memory)
        facts.update(cudnn=torch.backends.cudnn.version())
        facts.update(bf16=p.major >= 8 or bool(torch.version.hip))
    import torchvision
    facts["torchvision"] = torchvision.__version__
    torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    facts["agree"] = True
    import timm.layers
    facts["timm"] = timm.__version__
except Exception as e:
    facts["error"] = f"{type(e).__name__}: {e}"
print("\\n" + json.dumps(facts))
"""

EXPLANATIONS = (
    (
        f"RuntimeError: Could not find requested nnunet trainer {TRAINER}",
        "nnU-Net does not know our folder of trainers: `nnUNetv2_cva hook install` in the environment you train in.",
    ),
    (
        "RuntimeError: operator torchvision::nms does not exist",
        "torchvision does not fit torch. nnU-Net imports its own trainers first (Primus, timm, torchvision), so every "
        "trainer outside nnU-Net fails. Install torch and torchvision together, from the same index.",
    ),
    (
        "FileNotFoundError: ... /nnUNetPlans.json (or another Plans.json)",
        "This dataset has no plans of that name in nnUNet_preprocessed. Run nnUNetv2_plan_and_preprocess, and give "
        "nnUNetv2_train the name of the plans with -p.",
    ),
    (
        "AssertionError: Key ... is missing in the pretrained model weights",
        "The weights belong to another architecture than the one that -p and -tr describe. Fine-tune with the plans "
        "that the pretraining used, or make a file that fits: `nnUNetv2_cva check` and `nnUNetv2_cva export`.",
    ),
    (
        "AssertionError: The shape of the parameters of key ... is not the same",
        "Same architecture, other sizes: input channels, features or kernel sizes differ between the two plans files, or it is "
        "a Primus, whose tensors also depend on patch size and number of classes. `nnUNetv2_cva check` says what differs, "
        "`nnUNetv2_cva export` makes a file that fits.",
    ),
    (
        "AssertionError: Torch not compiled with CUDA enabled, RuntimeError: Found no NVIDIA driver, No CUDA GPUs are available",
        "nnU-Net trains on a CUDA GPU unless told otherwise, and torch finds none: add -device cpu (or mps on a Mac), which is "
        "enough to try things out.",
    ),
    (
        "ValueError: ProcessGroupNCCL is only supported with GPUs, no GPUs found!",
        "-num_gpus asks for several CUDA GPUs, and torch finds none: leave it out and add -device cpu.",
    ),
)


@dataclass(frozen=True)
class Diagnosis:
    """One line: what was found, and what to do if that is not as it should be."""

    topic: str
    found: str
    to_do: str = ""

    def __str__(self) -> str:
        return f"FIX {self.topic}: {self.found} -> {self.to_do}" if self.to_do else f"OK  {self.topic}: {self.found}"


def examine() -> Iterator[Diagnosis]:
    """Every check in turn. A check that fails is a diagnosis itself: nothing but an interruption escapes."""
    facts: dict[str, Any] = {}
    checks: tuple[tuple[str, Callable[[], Iterable[Diagnosis]]], ...] = (
        ("nnunetv2", check_version),
        ("torch", lambda: check_torch(facts)),
        ("trainer look-up", lambda: check_lookup(facts)),
        ("paths", check_paths),
        ("shared memory", check_shared_memory),
        ("GPU", lambda: check_gpu(facts)),
        ("compile", lambda: check_toolchain(facts)),
    )
    for topic, check in checks:
        try:
            yield from check()
        except Exception as e:
            text = " ".join(f"{type(e).__name__}: {e}".split())
            yield Diagnosis(topic, f"this check failed itself ({text})", "please report this line")


def check_version() -> Iterator[Diagnosis]:
    """nnunetv2, and everything else that has another version than this package's metadata asks for."""
    wrong = {requirement.name: (requirement, version) for requirement, version in unsupported()}
    if "nnunetv2" not in wrong:
        yield Diagnosis("nnunetv2", importlib.metadata.version("nnunetv2"))
    for name, (requirement, version) in wrong.items():
        reason = f" ({REASONS[name]})" if name in REASONS else ""
        found = f"{version}, expected {requirement.specifier}{reason}" if version else "not installed in this Python"
        yield Diagnosis(name, found, f'pip install "{name}{requirement.specifier}"')


def check_torch(facts: dict[str, Any]) -> Iterator[Diagnosis]:
    """torch, torchvision and timm import and fit each other; fills ``facts`` for the checks after it."""
    done = _python(_ASK_TORCH, timeout=300)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        yield Diagnosis("torch", f"importing torch, torchvision and timm fails ({_last_line(done)})", _REINSTALL)
        return
    facts.update(json.loads(lines[-1]))
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "torchvision", "timm") if name in facts)
    error = " ".join(facts.get("error", "").split())[:300]
    if "torch" not in facts:
        yield Diagnosis("torch", f"does not import ({error})", _REINSTALL)
    elif "agree" not in facts:
        yield Diagnosis("torchvision", f"does not fit ({versions}; {error}), which breaks our trainers too", _REINSTALL)
    elif error:
        yield Diagnosis("timm", f"does not import beside {versions} ({error})", 'pip install --upgrade "timm<1.0.23"')
    elif 91000 <= (facts.get("cudnn") or 0) < 91100:
        found = f"{versions}, with cuDNN {facts['cudnn']}: 9.10 is wrong or slow in bf16 convolutions of large 3D inputs"
        yield Diagnosis("torch", found, 'pip install --upgrade "nvidia-cudnn-cu12>=9.15", or a newer torch')
    else:
        yield Diagnosis("torch", versions)


def check_lookup(facts: dict[str, Any]) -> Iterator[Diagnosis]:
    """nnU-Net's real look-up finds our trainer, and ours rather than a copy of it."""
    topic, folder = "trainer look-up", recipes_folder()
    try:
        done = _python(_LOOKUP, timeout=300)
    except subprocess.TimeoutExpired:
        yield Diagnosis(topic, "no answer within 300 s", "try again; is the environment on a slow network drive?")
        return
    if done.returncode == 0:
        where = re.findall(rf"^Using trainer '{TRAINER}' from: (.+)$", done.stdout, flags=re.MULTILINE)
        if where and os.path.realpath(where[-1]) != os.path.realpath(folder):
            to_do = f"take that folder out of {VARIABLE}, or if it comes from an old hook: nnUNetv2_cva hook install"
            yield Diagnosis(topic, f"{TRAINER} found in {where[-1]} instead of {folder}", to_do)
        else:
            yield Diagnosis(topic, f"nnU-Net finds {TRAINER} in {where[-1] if where else 'its own folder'}")
    elif "Could not find requested nnunet trainer" in done.stderr:
        to_do = 'nnUNetv2_cva hook install (or, for one shell: eval "$(nnUNetv2_cva env)")'
        yield Diagnosis(topic, f"nnU-Net does not find {TRAINER}", to_do)
    elif "timm" not in facts:
        yield Diagnosis(topic, f"nnU-Net's own trainers do not import ({_last_line(done)})", "see the line above")
    elif "No module named 'nnunetv2_cva" in done.stderr:
        to_do = "run `pip install nnunetv2_cva` (or `pip install -e .` in the repository) with this Python"
        yield Diagnosis(topic, "the trainers are found, but the package nnunetv2_cva is not installed", to_do)
    else:
        to_do = f"repair what the message names; folders in {VARIABLE} other than {folder} are searched as well"
        yield Diagnosis(topic, f"nnU-Net's look-up fails ({_last_line(done)}; {_last_file(done)})", to_do)


def check_paths() -> Iterator[Diagnosis]:
    """nnU-Net's three folders: set, there, writable where it writes, with room."""
    for name, writes in (("nnUNet_raw", False), ("nnUNet_preprocessed", True), ("nnUNet_results", True)):
        folder = os.environ.get(name, "")
        if not folder:
            yield Diagnosis(name, "not set", f"export {name}=/some/folder in your shell's start-up file")
        elif not Path(folder).is_dir():
            yield Diagnosis(name, f"{folder} is not a folder", f'mkdir -p "${name}", or correct the variable')
        elif not os.access(folder, os.R_OK | os.X_OK):
            yield Diagnosis(name, f"{folder} cannot be read", "get permission to read it or choose another folder")
        elif writes and not os.access(folder, os.W_OK):
            yield Diagnosis(name, f"{folder} cannot be written", "get permission to write it or choose another folder")
        elif writes and _gigabytes(shutil.disk_usage(folder).free) < DISK_GB:
            found = f"{_gigabytes(shutil.disk_usage(folder).free):.1f} GB free in {folder}"
            yield Diagnosis(name, found, f"make room: {DISK_GB} GB or more for images and weights")
        else:
            room = f", {_gigabytes(shutil.disk_usage(folder).free):.0f} GB free" if writes else ""
            yield Diagnosis(name, f"{folder}{room}")


def check_shared_memory() -> Iterator[Diagnosis]:
    """The loader's workers hand their batches over in shared memory."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        yield Diagnosis("shared memory", "no /dev/shm on this system, nothing to check")
        return
    usage = shutil.disk_usage(folder)
    found = f"{_gigabytes(usage.free):.1f} of {_gigabytes(usage.total):.1f} GB free in /dev/shm"
    small = _gigabytes(usage.free) < SHARED_MEMORY_GB
    to_do = "start the container with --shm-size=8g (or --ipc=host), or load without workers: export nnUNet_n_proc_DA=0"
    yield Diagnosis("shared memory", found, to_do if small else "")


def check_gpu(facts: dict[str, Any]) -> Iterator[Diagnosis]:
    """What training will run on; a GPU that this torch cannot use is a fault, none is not."""
    if "torch" not in facts:
        yield Diagnosis("GPU", "unknown, torch does not import", "see the line about torch")
    elif facts.get("cuda"):
        precision = "bf16" if facts["bf16"] else "fp16, no bf16"
        memory = _gigabytes(facts["gpu_memory"])
        yield Diagnosis("GPU", f"{facts['gpus']} x {facts['gpu']}, {memory:.0f} GB, {precision}")
    elif _nvidia_gpus():
        if facts.get("built_for"):
            to_do = "update the NVIDIA driver, or install a torch built for an older CUDA (pytorch.org/get-started)"
        else:
            to_do = "this torch is built for CPUs only; install the CUDA one (pytorch.org/get-started)"
        yield Diagnosis("GPU", f"{_nvidia_gpus()[0]} is there, but torch {facts.get('torch')} cannot use it", to_do)
    else:
        cpu_only = "none, CPU only (-device cpu): enough to try things out, not to pretrain"
        yield Diagnosis("GPU", "Apple (-device mps)" if facts.get("mps") else cpu_only)


def check_toolchain(facts: dict[str, Any]) -> Iterator[Diagnosis]:
    """What torch.compile needs on a GPU: a C compiler, Python's headers, triton."""
    if not facts.get("cuda"):
        yield Diagnosis("compile", "not needed without a CUDA GPU")
        return
    compiler = next((c for c in (os.environ.get("CC"), "gcc", "clang", "cc") if c and shutil.which(c)), None)
    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    has = {"a C compiler (gcc)": compiler, "Python's headers (python3-dev)": headers, "triton": facts.get("triton")}
    missing = [name for name, there in has.items() if not there]
    to_do = "install it for faster steps, or train without compiling: export nnUNet_compile=f"
    if missing:
        yield Diagnosis("compile", f"missing: {', '.join(missing)}", to_do)
    else:
        yield Diagnosis("compile", f"{compiler}, headers, triton")


def _python(code: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run ``code`` as nnU-Net's commands run: a fresh interpreter, hook included, without the current folder."""
    command = [sys.executable, "-c", f"import sys; sys.path[:] = filter(None, sys.path)\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout)


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    """The error of a failed subprocess in one line."""
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else f"exit code {done.returncode}"


def _last_file(done: subprocess.CompletedProcess[str]) -> str:
    """Where the traceback of a failed subprocess ends."""
    places = re.findall(r'File "([^"]+)", line (\d+)', done.stderr)
    return f"{places[-1][0]}:{places[-1][1]}" if places else "no traceback"


def _nvidia_gpus() -> list[str]:
    """The GPUs that the driver reports, whatever torch says."""
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    return re.findall(r"^GPU \d+: (.+?) \(", done.stdout, flags=re.MULTILINE) if done.returncode == 0 else []


def _gigabytes(size: float) -> float:
    return size / 2**30
