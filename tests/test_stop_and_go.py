"""What happens to a run: signals, limits of time, kills, damaged files, a second training, other cases."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import blosc2
import numpy as np
import pytest
import torch
from helpers.projects import CONFIGURATION, NAME, make_project, make_trainer, train
from nnunetv2_cva.trainers.nnUNetTrainerCVA import nnUNetTrainerCVA

from nnunetv2_cva import files
from nnunetv2_cva.failures import TOLD, TrainingFailed, sentence
from nnunetv2_cva.training import checkpoint, failing, folder, local_processes, showing, stopping
from nnunetv2_cva.training.folder import LOCK, only_one, refuse_or_set_aside
from nnunetv2_cva.training.progress import Progress, judge_skipped
from nnunetv2_cva.training.run_cases import refuse_other_cases, stamps
from nnunetv2_cva.training.step import TrainingStep

ENVIRONMENT = "nnUNet_cva"
REST: dict = {"network_weights": {}, "optimizer_state": {}, "init_args": {}}
SETTINGS = {"epochs": 3, "iterations_per_epoch": 3, "checkpoint_minutes": 1e-9}


def everything(trainer):
    found = {f"network.{k}": v for k, v in trainer.network.state_dict().items()}
    found.update({f"teacher.{k}": v for k, v in trainer.teacher.state_dict().items()})
    return found


def comparable(trainer):
    return [{k: v for k, v in e.items() if k not in ("seconds", "data_wait")} for e in trainer.history.epochs]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of three epochs of three steps."""
    with pytest.MonkeyPatch.context() as patch:
        make_project(tmp_path_factory.mktemp("whole"), patch, cva=SETTINGS)
        return train(nnUNetTrainerCVA)


def stopped_in(recipe_step, monkeypatch, number=signal.SIGTERM):
    """Train until the signal arrives in the step ``recipe_step``; returns the trainer."""
    trainer = make_trainer(nnUNetTrainerCVA)
    ordinary = trainer.train_step

    def step(batch):
        if batch["step"] == recipe_step:
            os.kill(os.getpid(), number)
        return ordinary(batch)

    trainer.train_step = step
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as ended:
        trainer.run_training()
    assert ended.value.code == stopping.EXIT_CODE == 75 and signal.getsignal(number) == before
    return trainer


@pytest.mark.parametrize(
    ("step", "number"),
    [(4, signal.SIGTERM), (3, signal.SIGUSR1), (5, signal.SIGHUP), (0, signal.SIGINT)],
    ids=["within", "first of an epoch", "last of an epoch", "first of all"],
)
def test_a_signal_saves_within_the_epoch_and_nothing_is_repeated(whole, tmp_path, monkeypatch, capsys, step, number):
    make_project(tmp_path, monkeypatch, cva=SETTINGS)
    first = stopped_in(step, monkeypatch, number)
    assert f"Stopped: {number.name}" in capsys.readouterr().out and not (Path(first.output_folder) / LOCK).exists()
    saved = torch.load(Path(first.output_folder) / "checkpoint_latest.pth", weights_only=True)
    assert saved["current_epoch"] * 3 + saved["cva"]["step"] == step + 1
    again = make_trainer(nnUNetTrainerCVA, resume=True)
    steps = []
    ordinary = again.train_step
    again.train_step = lambda batch: (steps.append(batch["step"]), ordinary(batch))[1]
    again.run_training()
    assert steps == list(range(step + 1, 9))
    one, other = everything(whole), everything(again)
    assert [k for k in one if not torch.equal(one[k], other[k])] == []
    assert comparable(whole) == comparable(again)


def test_the_time_that_is_allowed_ends_a_run_in_the_same_way(tmp_path, monkeypatch, capsys):
    make_project(tmp_path, monkeypatch, cva={**SETTINGS, "stop_after_minutes": 1e-6})
    with pytest.raises(SystemExit) as ended:
        train(nnUNetTrainerCVA)
    assert ended.value.code == 75 and "Stopped: 1e-06 minutes are over" in capsys.readouterr().out
    monkeypatch.setenv(ENVIRONMENT, '{"stop_after_minutes": null}')
    assert len(train(nnUNetTrainerCVA, resume=True).history.epochs) == 3


def test_a_second_signal_ends_at_once():
    code = (
        "import os, signal, time\nfrom nnunetv2_cva.training.stopping import Stopping\n"
        "s = Stopping(None, 0.0)\nwith s.noticing():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    print(s.reason(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "SIGTERM\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_while_the_program_starts_asks_for_another_start(number):
    """As soon as it is asked to train, before anything slow is imported."""
    code = (
        "import os, sys\nfrom nnunetv2_cva.commands.main import main\n"
        "class Sent:\n    def find_spec(self, name, *rest):\n"
        f"        if name == 'nnunetv2_cva.training': os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Sent())\nsys.exit(main(['train', '100', '3d_fullres', 'all', '--c']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    expected = f"nnunetv2_cva: {number.name} came outside the training: start the same command again. Exit code 75.\n"
    assert (done.returncode, done.stderr) == (75, expected)


# ---- no run is destroyed


def test_a_new_run_does_not_destroy_an_old_one(tmp_path, monkeypatch, capsys):
    make_project(tmp_path, monkeypatch, cva={"epochs": 1})
    first = train(nnUNetTrainerCVA)
    results = Path(first.output_folder)
    before = {p.name: p.read_bytes() for p in results.iterdir() if "log" not in p.name}
    with pytest.raises(ValueError, match=r"holds a run \(checkpoint_best.pth, checkpoint_final.pth\).*--c.*set_aside"):
        train(nnUNetTrainerCVA)
    assert {p.name: p.read_bytes() for p in results.iterdir() if "log" not in p.name} == before
    monkeypatch.setenv(ENVIRONMENT, '{"set_aside": true, "seed": 5}')
    second = train(nnUNetTrainerCVA)
    (aside,) = results.parent.glob("fold_all_aside_*")
    assert {p.name: p.read_bytes() for p in aside.iterdir() if "log" not in p.name} == before
    assert second.config.seed == 5 and (results / "checkpoint_final.pth").is_file()
    assert f"An earlier run was moved to {aside}" in capsys.readouterr().out


def test_a_folder_without_a_checkpoint_is_free(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}")
    assert refuse_or_set_aside(tmp_path, [], False) is None and refuse_or_set_aside(tmp_path, [], True) is None


# ---- one training per folder


def test_a_second_training_is_refused_and_the_first_goes_on(tmp_path):
    code = (
        "import sys, time\nfrom nnunetv2_cva.training.folder import only_one\n"
        f"with only_one({str(tmp_path)!r}):\n    print('held', flush=True)\n    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"is in use: process {holder.pid} on .* trains there since 20"):
        with only_one(tmp_path):
            pass
    holder.kill()
    holder.communicate()
    said = []
    with only_one(tmp_path, said.append):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert len(said) == 1 and "has ended without saying so" in said[0] and not (tmp_path / LOCK).exists()


def test_a_number_that_another_process_has_got_since_is_not_the_holder(tmp_path):
    mine = {**folder._myself(), "started": "1"}
    (tmp_path / LOCK).write_text(json.dumps(mine))
    with only_one(tmp_path):
        pass


@pytest.mark.parametrize("alive", [True, False])
def test_a_holder_on_another_host_is_believed_while_it_touches_the_file(tmp_path, monkeypatch, alive):
    monkeypatch.setattr(folder, "STILL", 0.5)
    path = tmp_path / LOCK
    path.write_text(json.dumps({**folder._myself(), "host": "elsewhere", "boot": "x"}))
    os.utime(path, (1, 1))
    done = threading.Event()
    if alive:
        threading.Timer(0.2, lambda: os.utime(path, (2, 2))).start()
        with pytest.raises(ValueError, match="on elsewhere trains there"):
            with only_one(tmp_path):
                pass
    else:
        with only_one(tmp_path):
            pass
    done.set()


def test_a_torn_lock_is_taken_over(tmp_path):
    (tmp_path / LOCK).write_text('{"host": "x"')
    with only_one(tmp_path):
        pass


# ---- checkpoints


def test_latest_rotates_and_a_damaged_one_is_named(tmp_path, monkeypatch, capsys):
    make_project(tmp_path, monkeypatch, cva=SETTINGS)
    first = stopped_in(7, monkeypatch)
    results = Path(first.output_folder)
    steps = {n: (c["current_epoch"], c["cva"]["step"]) for n in checkpoint.WHOLE if (c := checkpoint.summary(results / n))}
    assert steps == {"checkpoint_latest.pth": (2, 2), "checkpoint_previous.pth": (2, 0)}
    latest = results / "checkpoint_latest.pth"
    content = bytearray(latest.read_bytes())
    content[len(content) // 2] ^= 1  # one bit of one tensor
    latest.write_bytes(content)
    capsys.readouterr()
    again = make_trainer(nnUNetTrainerCVA, resume=True)
    assert again.current_epoch == 2 and "checkpoint_previous.pth" in again._resumed_from
    assert "checkpoint_latest.pth is damaged" in capsys.readouterr().out
    latest.unlink()  # between two names, where files cannot have two
    (results / "checkpoint_best.pth").unlink()
    assert len(train(nnUNetTrainerCVA, resume=True).history.epochs) == 3
    assert sorted(p.name for p in results.glob("*.pth")) == ["checkpoint_best.pth", "checkpoint_final.pth"]


def test_the_order_is_that_inside_the_files(tmp_path):
    for name, epoch, step in (("final", 3, 0), ("latest", 3, 2), ("previous", 2, 9)):
        content = {"current_epoch": epoch, "cva": {"step": step, "heads": {}}, **REST}
        checkpoint.save(content, tmp_path / f"checkpoint_{name}.pth")
        os.utime(tmp_path / f"checkpoint_{name}.pth", (epoch, epoch) if name != "previous" else (10, 10))
    assert checkpoint.newest(tmp_path)[0].name == "checkpoint_latest.pth"
    for name in checkpoint.WHOLE:
        (tmp_path / name).write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="No checkpoint can be continued: .*final.*latest.*previous|final.*previous"):
        checkpoint.newest(tmp_path)


@pytest.mark.parametrize("how", ["missing", "stale"])
def test_best_is_made_again(tmp_path, monkeypatch, capsys, how):
    make_project(tmp_path, monkeypatch, cva=SETTINGS)
    trainer = make_trainer(nnUNetTrainerCVA)
    save = trainer.save_checkpoint

    def killed(path):
        if path.endswith("best.pth") and trainer.current_epoch == (1 if how == "missing" else 2):
            raise KeyboardInterrupt
        save(path)

    trainer.save_checkpoint = killed
    monkeypatch.setattr(trainer, "watch", lambda: {"retrieval": 0.1 * trainer.current_epoch})  # every epoch is the best
    with pytest.raises(KeyboardInterrupt):
        trainer.run_training()
    again = make_trainer(nnUNetTrainerCVA, resume=True)
    again.on_train_start()
    assert f"checkpoint_best.pth was made again from the weights after {again.current_epoch}" in capsys.readouterr().out
    best = torch.load(Path(again.output_folder) / "checkpoint_best.pth", weights_only=True)
    assert best["current_epoch"] == again.current_epoch
    assert all(torch.equal(v, best["network_weights"][k]) for k, v in again.network.state_dict().items())


# ---- a full disk


class Disk:
    """Files whose name is in ``full`` are written to a device of the system on which nothing has room."""

    def __init__(self):
        self.full = ()

    def fill(self, folder, name="*"):
        if name in self.full:
            os.symlink("/dev/full", folder / f"{name}.{files.HOST}.{os.getpid()}{files.PARTIAL}")


@pytest.fixture
def disk(monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    disk = Disk()
    monkeypatch.setattr(files, "remove_abandoned", disk.fill)  # called before every file that is written whole
    return disk


NOT_NEEDED_NOW = ("checkpoint_latest.pth", "checkpoint_best.pth", "metrics.jsonl", "progress.png", "views.png")


def test_a_run_goes_on_while_the_disk_is_full(tmp_path, monkeypatch, capsys, disk):
    make_project(tmp_path, monkeypatch, cva={**SETTINGS, "epochs": 5, "iterations_per_epoch": 1})
    trainer = make_trainer(nnUNetTrainerCVA)
    monkeypatch.setattr(trainer, "watch", lambda: {"retrieval": 0.1 * trainer.current_epoch})  # every epoch is the best
    monkeypatch.setattr(showing, "EVERY", 1)  # and has a picture
    ordinary, before = trainer.on_epoch_end, {}

    def epoch_end():
        results = Path(trainer.output_folder)
        if trainer.current_epoch == 1:
            before.update({p.name: p.read_bytes() for p in results.iterdir() if p.name in NOT_NEEDED_NOW})
        disk.full = NOT_NEEDED_NOW if trainer.current_epoch in (1, 2) else ()
        ordinary()
        if trainer.current_epoch == 3:
            assert len(before) == 5 and {name: (results / name).read_bytes() for name in before} == before

    trainer.on_epoch_end = epoch_end
    trainer.run_training()
    out = capsys.readouterr().out
    times = {name: out.count(f"Training goes on without a new {name}.") for name in NOT_NEEDED_NOW}
    assert times == {name: 2 if name == "checkpoint_latest.pth" else 1 for name in NOT_NEEDED_NOW}
    assert out.count("No space left on device") == 6
    results = Path(trainer.output_folder)
    assert len((results / "metrics.jsonl").read_text().splitlines()) == 5 and not list(results.glob("*.partial"))
    assert sorted(p.name for p in results.glob("*.pth")) == ["checkpoint_best.pth", "checkpoint_final.pth"]


def test_output_that_goes_to_a_full_disk_costs_no_run(tmp_path, monkeypatch, disk):
    make_project(tmp_path, monkeypatch)
    trainer = make_trainer(nnUNetTrainerCVA)
    full = open("/dev/full", "w")
    with contextlib.redirect_stdout(full):
        trainer.print_to_log_file("x" * 10_000)
    assert "x" * 10_000 in Path(trainer.log_file).read_text()
    with pytest.raises(OSError, match="No space left"):
        full.close()


@pytest.mark.parametrize("at", ["a stop", "the end"])
def test_what_a_full_disk_ends_can_be_continued(whole, tmp_path, monkeypatch, capsys, disk, at):
    make_project(tmp_path, monkeypatch, cva=SETTINGS)
    trainer = make_trainer(nnUNetTrainerCVA)
    name, latest = "checkpoint_final.pth", Path(trainer.output_folder) / "checkpoint_latest.pth"
    if at == "a stop":
        name, ordinary = latest.name, trainer.train_step
        trainer.train_step = lambda batch: (batch["step"] == 7 and os.kill(os.getpid(), signal.SIGTERM), ordinary(batch))[1]
    opened = trainer.on_train_epoch_start
    trainer.on_train_epoch_start = lambda: (setattr(disk, "full", (name,) if trainer.current_epoch == 2 else ()), opened())
    expected = r"No space left on device.*checkpoint_latest.pth is untouched: make room, then continue with --c"
    with pytest.raises(OSError, match=f"{name} cannot be written: {expected}") as error:
        trainer.run_training()
    assert "\n" not in sentence(error.value) and checkpoint.summary(latest)["current_epoch"] == 2
    disk.full = ("checkpoint_best.pth",)
    (latest.parent / disk.full[0]).unlink()
    again = train(nnUNetTrainerCVA, resume=True)
    assert "Training goes on without a new checkpoint_best.pth" in capsys.readouterr().out
    assert all(torch.equal(v, everything(again)[k]) for k, v in everything(whole).items())


# ---- cases


def uncompressed(path, seed):
    """A case of noise that takes as many bytes whatever it holds. Returns how many."""
    noise = np.random.default_rng(seed).normal(size=(1, 26, 30, 24)).astype(np.float32)
    blosc2.asarray(noise, urlpath=str(path), mode="w", cparams={"clevel": 0})
    return path.stat().st_size


@pytest.mark.parametrize("size", [0, 10, 5000, 40_000])
def test_a_stamp_tells_files_of_equal_size_apart(tmp_path, size):
    content = bytearray(np.random.default_rng(0).bytes(size))
    found = set()
    for place in (None, 0, size // 2, size - 1) if size else (None,):
        changed = bytearray(content)
        if place is not None:
            changed[place] ^= 1
        (tmp_path / "a.b2nd").write_bytes(changed)
        found.add(stamps(str(tmp_path), ["a"])["a"])
    assert len(found) == (4 if size else 1)
    (tmp_path / "a.b2nd").write_bytes(content)
    now = stamps(str(tmp_path), ["a"])
    assert refuse_other_cases({"a": size}, now, False) == ""  # what checkpoints held earlier
    with pytest.raises(ValueError, match=r"^The training cases .*: 1 changed \(a\)"):
        refuse_other_cases({"a": size + 1}, now, False)


def test_other_cases_are_named_and_refused_unless_asked_for(tmp_path, monkeypatch, capsys):
    data = make_project(tmp_path, monkeypatch, cva=SETTINGS)
    uncompressed(data / "case_07.b2nd", 0)
    stopped_in(4, monkeypatch)
    assert (data / "case_07.b2nd").stat().st_size == uncompressed(data / "case_07.b2nd", 1)
    (data / "case_03.b2nd").rename(data / "case_99.b2nd")
    (data / "case_05.b2nd").write_bytes((data / "case_06.b2nd").read_bytes())
    again = make_trainer(nnUNetTrainerCVA, resume=True)
    expected = r"1 new \(case_99\), 1 gone \(case_03\), 2 changed \(case_05, case_07\)"
    with pytest.raises(ValueError, match=f"not those that the run began with: {expected}"):
        again.run_training()
    monkeypatch.setenv(ENVIRONMENT, '{"other_cases": true}')
    assert len(train(nnUNetTrainerCVA, resume=True).history.epochs) == 3


def test_a_case_that_disappears_during_training_is_named(tmp_path, monkeypatch):
    data = make_project(tmp_path, monkeypatch, cva={"epochs": 30})
    trainer = make_trainer(nnUNetTrainerCVA)
    trainer.on_epoch_end = lambda: (nnUNetTrainerCVA.on_epoch_end(trainer), (data / "case_04.b2nd").unlink(missing_ok=True))
    with pytest.raises(ValueError, match="case_04.b2nd"):
        trainer.run_training()


# ---- what is not finite


def test_a_batch_that_is_not_finite_is_skipped_and_its_cases_are_named(tmp_path, monkeypatch, capsys):
    make_project(tmp_path, monkeypatch, cva={"epochs": 1, "iterations_per_epoch": 4})
    trainer = make_trainer(nnUNetTrainerCVA)
    ordinary, seen = trainer.train_step, {}

    def step(batch):
        before = [p.detach().clone() for p in trainer.student.parameters()]
        if batch["step"] == 2:
            batch = {**batch, "views": batch["views"] * torch.nan}
        output = ordinary(batch)
        seen[batch["step"]] = (batch["keys"], all(map(torch.equal, before, trainer.student.parameters())))
        return output

    trainer.train_step = step
    trainer.run_training()
    assert {n: still for n, (_, still) in seen.items()} == {0: False, 1: False, 2: True, 3: False}
    (record,) = trainer.history.epochs
    assert record["skipped"] == 1 and record["total_loss"] == pytest.approx(record["total_loss"])
    out = capsys.readouterr().out
    assert f"1 of 4 steps left out, loss or gradient was not finite. In them were: {', '.join(sorted(seen[2][0]))}." in out


def test_many_steps_that_are_not_finite_stop_the_training():
    assert judge_skipped([], 10, lambda steps: []) == ""
    assert "In them were: a." in judge_skipped([4], 10, lambda steps: ["a"])
    with pytest.raises(RuntimeError, match="2 of 10 steps were left out .* in them were a, b"):
        judge_skipped([4, 5], 10, lambda steps: ["a", "b"])


def test_the_state_of_an_epoch_goes_through_a_checkpoint():
    outputs = [{"total": torch.tensor(float(n)), "skipped": torch.tensor(float(n == 1))} for n in range(4)]
    again = Progress.restored(Progress(list(outputs)).state(0.5))
    assert again.means(torch.device("cpu")) == ({"total": pytest.approx(5 / 3), "skipped": 1}, [1]) and again.waited == 0.5
    assert Progress.restored(Progress().state(0.0)).outputs == []


def nnunets_command(*options, **environment):
    recipes = Path(sys.modules[nnUNetTrainerCVA.__module__].__file__).parent
    entry = "from nnunetv2.run.run_training import run_training_entry as r; r()"
    command = [sys.executable, "-c", entry, NAME, CONFIGURATION, "all", "-tr", "nnUNetTrainerCVA", "-device", "cpu", *options]
    environment = {**os.environ, "nnUNet_extTrainer": str(recipes), **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_the_command_a_user_types_stops_with_the_code(tmp_path, monkeypatch):
    make_project(tmp_path, monkeypatch, cva={**SETTINGS, "stop_after_minutes": 1e-6})
    done = nnunets_command()
    assert done.returncode == 75 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("when", ["constructed", "trained"])
def test_nnunets_command_says_in_one_sentence_what_is_wrong(tmp_path, monkeypatch, when):
    """Whatever a user can mend; its log has the traceback where the training had begun."""
    data = make_project(tmp_path, monkeypatch, cva=SETTINGS)
    if when == "trained":
        (data / "case_03.b2nd").write_bytes(b"torn")
    done = nnunets_command(nnUNet_cva="{}" if when == "trained" else '{"epohcs": 1}')
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert ("case_03.b2nd" if when == "trained" else "epohcs") in done.stderr.splitlines()[-1]
    assert done.stderr.splitlines()[-1].startswith("nnunetv2_cva: error: ")
    if when == "trained":
        (log,) = (tmp_path / "results").rglob("training_log_*.txt")
        assert "Traceback" in log.read_text() and "Traceback" not in done.stdout


def test_other_programs_and_our_own_bugs_keep_their_tracebacks(monkeypatch):
    shown = []
    monkeypatch.setattr(failing, "_before", lambda *error: shown.append(error[0]))
    for error in (ValueError("theirs"), AssertionError("ours")):
        try:
            raise error
        except Exception as e:
            failing._one_sentence(type(e), e, e.__traceback__)
    assert shown == [ValueError, AssertionError]


def test_a_step_without_memory_says_what_to_change(tmp_path, monkeypatch):
    """With the measured need where the device can be asked; from nnUNetv2_cva and nnUNetv2_train alike one sentence."""
    make_project(tmp_path, monkeypatch, cva=SETTINGS)
    trainer = make_trainer(nnUNetTrainerCVA)

    def no_memory(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nMore lines")

    monkeypatch.setattr(TrainingStep, "__call__", no_memory)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 75.5 * 2**30)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda n: SimpleNamespace(total_memory=80 * 2**30))
    batch = next(iter_batches(trainer))
    expected = r"It held 75.5 GB .* the device has 80.0 GB. Set gradient_checkpointing .*smaller batch_size.*allocate 9.00 GiB.\)"
    with pytest.raises(TrainingFailed, match=expected) as failed:
        trainer.train_step(batch)
    assert isinstance(failed.value, TOLD) and len(str(failed.value).splitlines()) == 1


def iter_batches(trainer):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        trainer.on_train_start()
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
    yield next(trainer.dataloader_train)


# ---- processes of one machine


@pytest.mark.parametrize(("codes", "expected"), [((0, 0), 0), ((75, 75), 75), ((0, 3), 3), ((-9, 0), 137)])
def test_processes_of_one_machine_end_with_their_own_code(monkeypatch, codes, expected):
    """torchrun makes 1 of every code."""
    monkeypatch.setattr(local_processes, "GRACE", 5)
    code = (
        "import os, sys\nassert os.environ['WORLD_SIZE'] == '2' and os.environ['LOCAL_RANK'] == os.environ['RANK']\n"
        f"c = {codes}[int(os.environ['RANK'])]\nos.kill(os.getpid(), -c) if c < 0 else sys.exit(c)"
    )
    assert local_processes.run_on_every_device([sys.executable, "-c", code], 2) == expected


def test_signals_are_passed_on_and_who_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(local_processes, "GRACE", 0.5)
    code = (
        "import os, signal, sys, time\nrank = os.environ['RANK']\n"
        "signal.signal(signal.SIGUSR1, (lambda *a: sys.exit(75)) if rank == '0' else signal.SIG_IGN)\n"
        f"open({str(tmp_path)!r} + '/' + rank, 'w').close()\ntime.sleep(60)\n"
    )

    def send():
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.getsignal(signal.SIGUSR1)
    threading.Thread(target=send).start()
    assert local_processes.run_on_every_device([sys.executable, "-c", code], 2) == 75
    assert signal.getsignal(signal.SIGUSR1) == before
