"""``benchmarks/gpu.py``: what was measured stays, what was cut off is tried again, and nothing is left running."""

import fcntl
import importlib
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ITEM = """
    import os, sys, time
    sys.path.insert(0, {benchmarks!r})
    from pathlib import Path
    from gpu_report import Report
    name, out = sys.argv[sys.argv.index("--item") + 1], Path(sys.argv[sys.argv.index("--out") + 1])
    report = Report(out / "item.json")
    print("this is", name)
    (out / "pid").write_text(str(os.getpid()))
    report.once("first", lambda: 1)
    if name == "slow":
        time.sleep(60)
    if name == "broken":
        raise ValueError("of no use")
    report.once("second", lambda: 2)
"""


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """The script with three items of its own, and a program in the place of what measures."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("gpu")
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(ITEM.format(benchmarks=str(BENCHMARKS))))
    monkeypatch.setattr(module, "__file__", str(program))
    monkeypatch.setattr(module, "ITEMS", tuple(module.Item(n, 0, 30, None) for n in ("broken", "slow", "quick")))
    monkeypatch.setattr(module, "GRACE", 1.0)
    yield module
    for name in ("gpu", "gpu_items", "gpu_tables", "gpu_report"):
        sys.modules.pop(name, None)


@pytest.fixture
def until_it_sleeps(gpu, monkeypatch, tmp_path):
    """The slow item's time is up as soon as it has found something: no test waits for a clock. Returns what to raise then."""
    how = [subprocess.TimeoutExpired("slow", 30.0)]

    class Process(subprocess.Popen):
        def wait(self, timeout=None):
            if "slow" in self.args and how[0] is not None:
                while "first" not in (tmp_path / "out" / "item.json").read_text():
                    time.sleep(0.02)
                error, how[0] = how[0], None
                raise error
            return super().wait(timeout)

    monkeypatch.setattr(gpu.subprocess, "Popen", Process)
    return how


def states(gpu, out):
    return {name: item["state"] for name, item in gpu.load(out, "cpu")["items"].items()}


def test_items_fail_and_are_cut_off_each_by_itself_and_what_they_found_stays(gpu, until_it_sleeps, tmp_path, capsys):
    out = tmp_path / "out"
    gpu.measure(out, "cpu", 1.0, [])
    assert states(gpu, out) == {"broken": "failed", "slow": "cut off", "quick": "done"}
    items = gpu.load(out, "cpu")["items"]
    assert items["broken"]["found"] == items["slow"]["found"] == {"first": 1} and items["quick"]["found"] == {
        "first": 1,
        "second": 2,
    }
    assert "of no use" in items["broken"]["error"] and "this is quick" in (out / "gpu.log").read_text()
    assert not (out / "item.json").exists()
    assert [item.name for item in gpu.order(gpu.load(out, "cpu"))] == ["broken", "slow"], "again, what did not come to its end"


def test_a_call_that_was_killed_is_continued_with_what_it_had_found(gpu, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    out.mkdir()
    gpu.save(out, {"device": "cpu", "items": {"broken": {"state": "done", "seconds": 1.0, "found": {}}}})
    gpu.write_json(out / "item.json", {"item": "quick", "found": {"first": "earlier"}})
    gpu.measure(out, "cpu", 1.0, ["quick"])
    assert gpu.load(out, "cpu")["items"]["quick"] == {
        "state": "done",
        "seconds": gpu.load(out, "cpu")["items"]["quick"]["seconds"],
        "found": {"first": "earlier", "second": 2},
    }


def test_a_call_that_is_told_to_end_ends_its_item(gpu, until_it_sleeps, tmp_path):
    until_it_sleeps[0] = SystemExit(143)
    out = tmp_path / "out"
    out.mkdir()
    with open(out / "gpu.log", "a+") as log, pytest.raises(SystemExit):
        gpu.attempt(gpu.ITEMS[1], {}, out, "cpu", 60.0, log)
    with pytest.raises(ProcessLookupError):
        os.kill(int((out / "pid").read_text()), 0)


def test_what_does_not_fit_is_not_begun(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "ITEMS", (gpu.Item("quick", 100, 200, None),))
    gpu.measure(tmp_path / "out", "cpu", 0.5, [])
    assert "quick: not begun, 30 s are left and it needs 100" in capsys.readouterr().out
    assert states(gpu, tmp_path / "out") == {}


def test_two_calls_at_once_are_refused(gpu, tmp_path):
    with open(tmp_path / "gpu.log", "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="Another call is measuring"):
            gpu.measure(tmp_path, "cpu", 1.0, [])


def test_results_of_another_device_are_not_mixed(gpu, tmp_path):
    gpu.save(tmp_path, {"device": "cuda", "items": {}})
    with pytest.raises(ValueError, match="holds results of cuda, not of cpu"):
        gpu.load(tmp_path, "cpu")


def test_tables_of_whatever_there_is(gpu):
    step = {"seconds": 0.2, "spread": 0.01, "first": 30.0, "peak": 20.0}
    items = {
        "machine": {"found": {"name": "H", "cores": 16, "torch": "2", "python": "3", "copy_gb_s": 3000.0, "bf16_tflops": 700.0}},
        "correct": {"found": {"summary": "3 passed", "failed": ["FAILED a"], "code": 1}},
        "graphs": {"found": {"a": step, "b": "RuntimeError: no | graph"}},
        "data": {"found": {}},
    }
    for item in items.values():
        item.update(state="done", seconds=1.0)
    text = "\n".join(gpu.tables({"device": "cuda", "items": items}))
    for words in (
        "700 TFLOP/s",
        "Tests: 3 passed",
        "- FAILED a",
        "| a | 30.0 | 200.0 | 1.0 % | 50.0 |  |  | 20.00 |",
        "no / graph",
    ):
        assert words in text, words
    assert "training's data" not in text
    assert "has not been measured" in "\n".join(gpu.tables({"device": "cuda", "items": {}}))
