"""The doctor's diagnoses. That nnU-Net's real look-up finds our trainers is tested where the package is installed."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from collections import namedtuple
from pathlib import Path

import pytest

from nnunetv2_cva.commands import doctor as command
from nnunetv2_cva.installation import doctor, hook, versions

FACTS = {"torch": "2.8.0", "built_for": None, "cuda": False, "mps": False, "triton": False, "torchvision": "0.23.0"}
HEALTHY = {**FACTS, "agree": True, "timm": "1.0.22"}
CUDA = {"built_for": "12.8", "cuda": True, "triton": True}
GPU = {**HEALTHY, **CUDA, "gpus": 2, "gpu": "X1", "gpu_memory": 80 * 2**30, "bf16": True}
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def answers(monkeypatch):
    """What the subprocesses answer: "probe" and "lookup", each a CompletedProcess; healthy unless a test changes it."""
    ready = {
        "probe": subprocess.CompletedProcess([], 0, f"some library's chatter\n{json.dumps(HEALTHY)}\n", ""),
        "lookup": subprocess.CompletedProcess([], 0, using(hook.recipes_folder()), ""),
    }
    monkeypatch.setattr(doctor, "_python", lambda code, timeout: ready["lookup" if "find_objects" in code else "probe"])
    return ready


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(100e9, 0, 50e9))
    return tmp_path


def using(folder):
    return f"Searching in: {folder}\nUsing trainer 'nnUNetTrainerCVA' from: {folder}\nFOUND nnUNetTrainerCVA\n"


def failed(stderr):
    return subprocess.CompletedProcess([], 1, "", stderr)


def run(explain=False):
    return command.run(Namespace(explain=explain))


def lines(findings):
    return [str(finding) for finding in findings]


def fixes(findings):
    """The single FIX line of ``findings``."""
    (line,) = [text for text in lines(findings) if text.startswith("FIX ")]
    return line


# ---- as a command


def test_a_healthy_environment(answers, folders, capsys):
    assert run() == 0
    *checks, last = capsys.readouterr().out.splitlines()
    assert all(line.startswith("OK  ") for line in checks) and "--explain" in last
    topics = [line[4:].split(":")[0] for line in checks]
    assert topics == [
        "nnunetv2",
        "torch",
        "trainer look-up",
        "nnUNet_raw",
        "nnUNet_preprocessed",
        "nnUNet_results",
        "shared memory",
        "GPU",
        "compile",
    ]


def test_something_to_do_is_exit_code_1(answers, folders, monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_results")
    assert run() == 1
    assert "\nFIX nnUNet_results: not set -> export nnUNet_results=" in capsys.readouterr().out


def test_a_check_that_crashes_is_a_finding(answers, folders, monkeypatch, capsys):
    def broken():
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr(doctor, "check_paths", broken)
    answers["probe"] = subprocess.CompletedProcess([], 0, "not json", "")
    assert run() == 1
    out = capsys.readouterr().out
    assert "FIX paths: this check failed itself (ZeroDivisionError: by zero) -> please report this line\n" in out
    assert "FIX torch: this check failed itself (JSONDecodeError" in out
    assert "OK  shared memory" in out


def test_explanations_quote_nnunet(capsys):
    assert run(explain=True) == 0
    out = capsys.readouterr().out
    package = Path(importlib.util.find_spec("nnunetv2").origin).parent
    source = "".join((package / p).read_text() for p in ("utilities/find_objects.py", "run/load_pretrained_weights.py"))
    for words in (
        "Could not find requested nnunet trainer",
        "is missing in the pretrained model weights",
        "The shape of the parameters of key",
    ):
        assert words in out and words in source
    assert "torchvision::nms" in out and "Plans.json" in out


# ---- the checks


@pytest.mark.parametrize(
    ("version", "good"),
    [("2.8.0", True), ("2.8.12.post1", True), ("2.9.0", False), ("2.7.3", False), ("3.0", False), ("2.10", False)],
)
def test_version(version, good, monkeypatch):
    ordinary = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "nnunetv2" else ordinary(name))
    (line,) = lines(doctor.check_version())
    fix = f'FIX nnunetv2: {version}, expected <2.9,>=2.8 -> pip install "nnunetv2<2.9,>=2.8"'
    assert line == (f"OK  nnunetv2: {version}" if good else fix)


def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)


def test_nnunet_not_installed(monkeypatch):
    ordinary = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: missing(n) if n == "nnunetv2" else ordinary(n))
    assert "nnunetv2: not installed in this Python" in fixes(doctor.check_version())


@pytest.mark.parametrize(
    ("name", "version", "reason"),
    [
        ("torch", "2.9.1+cu128", "2.9.1+cu128, expected !=2.9.*,>=2.6 (convolutions of torch 2.9 are slow"),
        ("torch", "2.5.1", "2.5.1, expected"),
        ("timm", "1.0.31", "1.0.31, expected <1.0.23,>=1.0.15 (from timm 1.0.23 on"),
        ("numpy", "1.24.0", "1.24.0, expected >=1.26 ->"),
        ("batchgenerators", "0.24", "0.24, expected >=0.25.4 ->"),
        ("dynamic-network-architectures", "0.5.0", "0.5.0, expected <0.5,>=0.4.4 ->"),
    ],
)
def test_what_is_not_supported_is_said_by_the_doctor_and_on_import(name, version, reason, monkeypatch):
    requirements = (
        (Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8").partition("dependencies = [")[2].partition("]")[0]
    )
    asked = re.findall(r'^    "(.+?)"', requirements, flags=re.MULTILINE)
    ordinary = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "requires", lambda package: asked)
    monkeypatch.setattr(importlib.metadata, "version", lambda n: version if n == name else ordinary(n))
    assert f"FIX {name}: {reason}" in fixes(doctor.check_version())
    monkeypatch.delitem(sys.modules, "nnunetv2_cva.training", raising=False)
    with pytest.raises(ImportError, match=rf'{name} {re.escape(version)} \(expected .*To mend it: pip install "{name}'):
        importlib.import_module("nnunetv2_cva.training")


def test_versions_of_the_future_and_of_a_build_are_taken(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda package: ["torch>=2.6,!=2.9.*", 'pytest>=99; extra == "dev"'])
    for version in ("2.6.0+cu124", "2.12.0.dev20260101", "3.0"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, v=version: v)
        assert list(versions.unsupported()) == []
    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert list(versions.unsupported()) == []


def test_a_torchvision_that_does_not_fit_is_found_by_importing_it(tmp_path, monkeypatch):
    text = "raise RuntimeError('operator torchvision::nms does not exist')"
    (tmp_path / "torchvision.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    line = fixes(doctor.check_torch({}))
    assert re.match(r"FIX torchvision: does not fit \(torch \d.*operator torchvision::nms does not exist\)", line)
    assert "torchvision together" in line


@pytest.mark.parametrize(
    ("facts", "match"),
    [
        ({"error": "ImportError: libcudnn.so.9"}, r"FIX torch: does not import \(ImportError: libcudnn.so.9\)"),
        ({**FACTS, "error": "OSError: x\ny"}, r"FIX torchvision: does not fit \(torch 2.8.0, torchv.*; OSError: x y\)"),
        (
            {**FACTS, "agree": True, "cudnn": 91002},
            "FIX torch: .*cuDNN 91002: 9.10 is wrong or slow in bf16 .*nvidia-cudnn-cu12>=9.15",
        ),
        ({**FACTS, "agree": True, "error": "ImportError: z"}, r"FIX timm: does not import .*ImportError: z.*timm<1.0"),
    ],
)
def test_torch(answers, facts, match):
    answers["probe"] = subprocess.CompletedProcess([], 0, json.dumps(facts), "")
    assert re.match(match, fixes(doctor.check_torch({})))


def test_torch_that_takes_the_process_down(answers):
    answers["probe"] = subprocess.CompletedProcess([], -11, "", "")
    facts = {}
    assert "(exit code -11)" in fixes(doctor.check_torch(facts)) and not facts
    assert "unknown, torch does not import" in fixes(doctor.check_gpu(facts))


@pytest.mark.parametrize(
    ("facts", "stderr", "match"),
    [
        (HEALTHY, "RuntimeError: Could not find requested nnunet trainer nnUNet", "nnUNetv2_cva hook install"),
        (FACTS, "RuntimeError: operator torchvision::nms does not exist", "nms does not exist.*see the line above"),
        (HEALTHY, "ModuleNotFoundError: No module named 'nnunetv2_cva'", "nnunetv2_cva is not installed -> run `pip"),
        (
            HEALTHY,
            'Traceback:\n  File "/mine/broken.py", line 3, in <module>\nNameError: x\n',
            r"look-up fails \(NameError: x; /mine/broken.py:3\) -> .*nnUNet_extTrainer",
        ),
        (HEALTHY, "", r"look-up fails \(exit code 1; no traceback\)"),
    ],
)
def test_lookup_that_fails(answers, facts, stderr, match):
    answers["lookup"] = failed(stderr)
    assert re.search(match, fixes(doctor.check_lookup(facts)))


def test_lookup_that_finds_a_copy(answers):
    answers["lookup"] = subprocess.CompletedProcess([], 0, using("/somewhere/else"), "")
    assert "found in /somewhere/else instead of" in fixes(doctor.check_lookup(HEALTHY))


def test_lookup_that_does_not_answer(monkeypatch):
    def slow(code, timeout):
        raise subprocess.TimeoutExpired("python", timeout)

    monkeypatch.setattr(doctor, "_python", slow)
    assert "no answer within 300 s" in fixes(doctor.check_lookup(HEALTHY))


def test_paths(folders, monkeypatch):
    assert all(line.startswith("OK  ") for line in lines(doctor.check_paths()))
    with monkeypatch.context() as patch:
        patch.setenv("nnUNet_raw", str(folders / "gone"))
        assert fixes(doctor.check_paths()) == (
            f'FIX nnUNet_raw: {folders}/gone is not a folder -> mkdir -p "$nnUNet_raw", or correct the variable'
        )
        patch.setenv("nnUNet_raw", "")
        assert "nnUNet_raw: not set" in fixes(doctor.check_paths())


def test_paths_without_permission(folders, monkeypatch):
    monkeypatch.setattr(os, "access", lambda folder, mode: not (mode & os.W_OK and "preprocessed" not in folder))
    assert "results cannot be written" in fixes(doctor.check_paths())  # raw is only read
    monkeypatch.setattr(os, "access", lambda folder, mode: "raw" not in folder)
    assert "raw cannot be read" in fixes(doctor.check_paths())


def test_paths_without_room(folders, monkeypatch):
    free = {True: 3 * 2**30, False: 50 * 2**30}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(100 * 2**30, 0, free["results" in folder]))
    assert "nnUNet_results: 3.0 GB free" in fixes(doctor.check_paths())


def test_shared_memory(monkeypatch):
    if not Path("/dev/shm").is_dir():
        pytest.skip("this system has no /dev/shm")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(2**26, 0, 2**26))
    line = fixes(doctor.check_shared_memory())
    assert re.search(r"0\.1 of 0\.1 GB free in /dev/shm -> .*--shm-size.*nnUNet_n_proc_DA=0", line)
    monkeypatch.setattr(doctor, "Path", lambda folder: Path("/there is none"))
    assert "nothing to check" in lines(doctor.check_shared_memory())[0]


@pytest.mark.parametrize(
    ("facts", "driver", "match"),
    [
        (GPU, ["X1"], "OK  GPU: 2 x X1, 80 GB, bf16"),
        ({**GPU, "bf16": False}, ["X1"], "OK  GPU: 2 x X1, 80 GB, fp16, no bf16"),
        (HEALTHY, [], "OK  GPU: none, CPU only"),
        ({**HEALTHY, "mps": True}, [], "OK  GPU: Apple"),
        (HEALTHY, ["X1"], "FIX GPU: X1 is there, but torch 2.8.0 cannot use it -> this torch is built for CPUs only"),
        ({**HEALTHY, "built_for": "13.0"}, ["X1"], "FIX GPU: X1 is there, .* -> update the NVIDIA driver"),
    ],
)
def test_gpu(facts, driver, match, monkeypatch):
    monkeypatch.setattr(doctor, "_nvidia_gpus", lambda: driver)
    (line,) = lines(doctor.check_gpu(facts))
    assert re.match(match, line)


def test_toolchain(monkeypatch, tmp_path):
    assert "not needed" in lines(doctor.check_toolchain(HEALTHY))[0]
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setenv("CC", "mycc")
    assert lines(doctor.check_toolchain(GPU)) == ["OK  compile: mycc, headers, triton"]
    monkeypatch.setattr(shutil, "which", lambda name: None)
    (tmp_path / "Python.h").unlink()
    line = fixes(doctor.check_toolchain({**GPU, "triton": False}))
    assert re.search(r"missing: a C compiler .*, Python's headers .*, triton -> .*nnUNet_compile=f", line)


def test_gpus_of_the_driver(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: name)
    for code, gpus in ((0, ["NVIDIA H200", "Tesla T4"]), (9, [])):
        done = subprocess.CompletedProcess([], code, "GPU 0: NVIDIA H200 (UUID: GPU-1)\nGPU 1: Tesla T4 (UUID: G-2)\n")
        monkeypatch.setattr(subprocess, "run", lambda *_, done=done, **__: done)
        assert doctor._nvidia_gpus() == gpus
