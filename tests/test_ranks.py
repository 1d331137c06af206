"""Several processes train as one: 2 and 3 of them, and two nodes (two torchrun agents) on the loopback address."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.networks import primus, unet
from helpers.projects import CONFIGURATION, NAME, make_project

from nnunetv2_cva.config import PRIMUS, CVAConfig
from nnunetv2_cva.model.branches import Student, Teacher, make_backbone
from nnunetv2_cva.training.checkpoint import Run
from nnunetv2_cva.training.device import Share, local_device
from nnunetv2_cva.training.launch import from_slurm
from nnunetv2_cva.training.objective import prepare
from nnunetv2_cva.training.schedule import make_optimizer
from nnunetv2_cva.training.step import TrainingStep

CASES, STEPS, SIZE = 4, 5, (8, 16, 24)
SMALL = {"head_width": 16, "predictor_width": 8, "mask_block": 8, "roi_size": (2, 3, 2), "noise_p": 0.0}
ROWS = {
    "MAE+CVA+Cont": {},
    "AE": {"mask_ratio": 0.0, "consistency_weight": 0.5, "contrastive_weight": 0.0, "teacher_momentum": 0.0},
    "MAE": {"consistency_weight": 0.0, "contrastive_weight": 0.0},
    "MAE+C-CVA": {"consistency": "nt_xent", "consistency_weight": 0.2, "contrastive_weight": 0.0},
    "MAE+Cont": {"consistency_weight": 0.0},
    "Gram": {"consistency": "gram", "consistency_weight": 2.0},
    "Cont": {"reconstruction_weight": 0.0, "consistency_weight": 0.0, "contrastive_weight": 1.0},
}
# AdamW would make steps of full length of rounding, where a gradient is 0 but for that: weights are compared after SGD.
FAMILIES = {"U-Net": {"learning_rate": 1e-3}, "Primus": {"learning_rate": 1e-3, "gradient_clip": PRIMUS["gradient_clip"]}}


PAIRS = [(family, row) for family in FAMILIES for row in ROWS]


def settings(family, row):
    return CVAConfig(**{**SMALL, **FAMILIES[family], **ROWS[row]})


def five_steps(family, config, share):
    """Losses of every step, gradients of the first, and weights after the last, of this rank's part."""
    torch.manual_seed(0)
    network = unet(features=4) if family == "U-Net" else primus(2, size=SIZE, drop_path_rate=0.0)
    pupil = Student(make_backbone(network, config), config).train()
    teacher = Teacher(pupil).eval() if config.needs_teacher else None
    run = Run(pupil, teacher, make_optimizer(pupil.parameters(), config, torch.device("cpu")), None)
    called = torch.nn.parallel.DistributedDataParallel(pupil) if dist.is_initialized() else pupil
    step = TrainingStep(run, called, config, share.per_rank)
    per_case = 2 if config.needs_second_view else 1
    losses, gradients = [], []
    for number in range(STEPS):
        generator = torch.Generator().manual_seed(number)
        views = torch.randn(per_case, CASES, 1, *SIZE, generator=generator)
        rois = torch.rand(per_case, CASES, 2, 3, generator=generator)
        inside = torch.rand(per_case, CASES, 1, *SIZE, generator=generator) < 0.9
        mine = {k: v[:, share.begin : share.end].flatten(0, 1) for k, v in (("views", views), ("rois", rois), ("inside", inside))}
        ready = prepare(mine, config, pupil.backbone.block, torch.device("cpu"), 3, number, share=share)
        losses.append({k: v for k, v in step(ready).items() if k != "skipped"})
        if number == 0:
            gradients = [p.grad.clone() for p in pupil.parameters() if p.grad is not None]
    parts = {"student": pupil.state_dict(), **({"teacher": teacher.state_dict()} if teacher else {})}
    return losses, gradients, {f"{n}.{k}": v.clone() for n, part in parts.items() for k, v in part.items()}


def _rank(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world)
    base, extra = divmod(CASES, world)
    share = Share(tuple(base + (r < extra) for r in range(world)), rank)
    torch.save({pair: five_steps(pair[0], settings(*pair), share) for pair in PAIRS}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_processes_with_ragged_shares_train_as_one(world, tmp_path):
    """Every objective: losses and gradients of the whole batch, and student and teacher after five steps, to 1e-5."""
    torch.multiprocessing.spawn(_rank, args=(world, str(tmp_path)), nprocs=world)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    worst = {}
    for row in PAIRS:
        losses, gradients, weights = five_steps(row[0], settings(*row), Share((CASES,)))
        for number, expected in enumerate(losses):
            for name, value in expected.items():
                found = torch.stack([r[row][0][number][name] for r in ranks]).mean()
                torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5, msg=f"{row}, step {number}, {name}")
        for r in ranks:
            for a, b in zip(r[row][1], gradients, strict=True):
                assert (a - b).abs().max() <= 1e-5 * max(1.0, float(b.abs().max())), row
            assert r[row][2].keys() == weights.keys()
            worst[row] = max(float((r[row][2][k] - v).abs().max()) for k, v in weights.items() if v.is_floating_point())
            assert all(torch.equal(r[row][2][k], v) for k, v in ranks[0][row][2].items()), f"{row}: ranks differ"
    print(world, worst)  # for docs/reliability.md
    assert max(worst.values()) < 1e-5, worst


def test_masks_and_intensities_do_not_depend_on_the_number_of_processes():
    config = settings("U-Net", "MAE+CVA+Cont")
    views, inside = torch.randn(2, CASES, 2, *SIZE), torch.ones(2, CASES, 1, *SIZE, dtype=torch.bool)
    rois = torch.rand(2, CASES, 2, 3)

    def prepared(share):
        part = {
            k: v[:, share.begin : share.end].flatten(0, 1).clone() for k, v in dict(views=views, rois=rois, inside=inside).items()
        }
        found = prepare(part, dataclasses.replace(config, **always), (8, 8, 8), torch.device("cpu"), 1, 2, share=share)
        return {k: getattr(found, k).unflatten(0, (2, -1)) for k in ("views", "visible", "mask", "hidden")}

    names = ("blur", "brightness", "contrast", "low_resolution", "inverted_gamma", "gamma")
    for p in (0.5, 1.0):
        always = {f"{name}_p": p for name in names}
        whole, shares = prepared(Share((CASES,))), [Share((2, 1, 1), rank) for rank in range(3)]
        for name, value in whole.items():
            assert torch.equal(torch.cat([prepared(s)[name] for s in shares], dim=1), value), (name, p)


# ---- the command


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def command(*options):
    entry = "import sys; from nnunetv2_cva.commands.main import main; sys.exit(main(sys.argv[1:]))"
    (script := Path(os.environ["nnUNet_results"]) / "command.py").write_text(entry)
    return [str(script), "train", NAME, CONFIGURATION, "all", "-device", "cpu", *options]


def agents(nodes, per_node, *options):
    """A torchrun agent for each node, all on this machine. Returns code and output of each."""
    return [(p.communicate(timeout=280)[0], p.returncode) for p in started_agents(nodes, per_node, *options)]


def started_agents(nodes, per_node, *options):
    port = free_port()
    run = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc_per_node={per_node}"]
    run += ["--master_addr=127.0.0.1", f"--master_port={port}"]
    return [
        subprocess.Popen(
            [*run, f"--node_rank={n}", *command(*options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for n in range(nodes)
    ]


@pytest.fixture
def project(tmp_path, monkeypatch):
    settings = {"epochs": 2, "iterations_per_epoch": 3, "noise_p": 0.0, "checkpoint_minutes": 1e-9}
    settings.update(optimizer="sgd", learning_rate=1e-3, warmup_epochs=0)
    make_project(tmp_path, monkeypatch, batch_size=3, cva=settings)
    return tmp_path


def final(project, name="fold_all"):
    folder = project / "results" / NAME / "nnUNetTrainerCVA__nnUNetPlans__3d_fullres" / name
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.load(folder / "checkpoint_final.pth", weights_only=True), records


def test_two_nodes_train_as_one_process_and_write_once(project):
    done = agents(2, 1)
    assert [code for _, code in done] == [0, 0], done
    logs = "".join(out for out, _ in done)
    assert "Cases of a step on each of 2 processes: 2, 1." in logs and logs.count("Training done.") >= 1
    two, records = final(project)
    results = project / "results" / NAME
    assert not list(results.rglob("training.lock")) and len(list(results.rglob("training_log_*.txt"))) == 1
    results.rename(project / "of two")
    one = subprocess.run([sys.executable, *command()], capture_output=True, text=True)
    assert one.returncode == 0, one.stderr
    alone, expected = final(project)
    for key, value in alone["network_weights"].items():
        torch.testing.assert_close(two["network_weights"][key], value, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(records, expected, strict=True):
        for name in wanted.keys() - {"seconds", "data_wait"}:
            assert found[name] == pytest.approx(wanted[name], rel=1e-4, abs=1e-5), name


def test_a_run_of_one_process_is_continued_by_two(project, monkeypatch):
    monkeypatch.setenv("nnUNet_cva", '{"stop_after_minutes": 1e-6}')
    assert subprocess.run([sys.executable, *command()], capture_output=True).returncode == 75
    monkeypatch.delenv("nnUNet_cva")
    ((out, code),) = agents(1, 2, "--c")
    assert code == 0 and "Resuming after" in out, out
    assert len(final(project)[1]) == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_nodes_that_are_stopped_and_started_again_end_as_if_they_had_been_left_alone(project):
    """SIGTERM to both agents: their codes tell nothing, the log says that the run was saved."""
    plans = project / "preprocessed" / NAME / "nnUNetPlans.json"
    content = json.loads(plans.read_text())
    content["configurations"][CONFIGURATION]["cva"].update(epochs=2, iterations_per_epoch=20)
    plans.write_text(json.dumps(content))
    started, results = started_agents(2, 1, "--c"), project / "results" / NAME
    while not any("Epoch 0" in log.read_text() for log in results.rglob("training_log_*.txt")):
        assert all(p.poll() is None for p in started), [p.communicate() for p in started]
        time.sleep(0.2)
    for p in started:
        p.terminate()
    done = [(p.communicate(timeout=100)[0], p.returncode) for p in started]
    (log,) = results.rglob("training_log_*.txt")
    assert all(code not in (0, 75) for _, code in done) and "Stopped: SIGTERM" in log.read_text(), done
    assert "Exit code 75" in log.read_text() and not list(results.rglob("checkpoint_final.pth"))
    again = agents(2, 1, "--c")
    assert [code for _, code in again] == [0, 0] and "Resuming after" in "".join(out for out, _ in again), again
    interrupted, records = final(project)
    results.rename(project / "interrupted")
    assert [code for _, code in agents(2, 1, "--c")] == [0, 0]
    alone, expected = final(project)
    for part in ("teacher", "heads"):
        for one, other in zip(tensors(interrupted["cva"][part]), tensors(alone["cva"][part]), strict=True):
            assert torch.equal(one, other), part
    assert all(torch.equal(v, alone["network_weights"][k]) for k, v in interrupted["network_weights"].items())
    timed = ("seconds", "data_wait")
    assert [{k: v for k, v in r.items() if k not in timed} for r in records] == [
        {k: v for k, v in r.items() if k not in timed} for r in expected
    ]


def tensors(content):
    if isinstance(content, torch.Tensor):
        return [content]
    return [t for value in content.values() for t in tensors(value)] if isinstance(content, dict) else []


def test_what_one_rank_refuses_ends_all_with_one_sentence(project, monkeypatch):
    (project / "preprocessed" / NAME / "nnUNetPlans_3d_fullres" / "case_03.b2nd").write_bytes(b"torn")
    ((out, code),) = agents(1, 2)
    assert code != 0 and "case_03.b2nd" in out and "nnUNetv2_cva: error: " in out


def test_slurms_variables_are_torchruns(monkeypatch):
    environment = {
        "SLURM_PROCID": "5",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_JOB_ID": "123",
        "SLURM_JOB_NODELIST": "n[1-4]",
    }
    done = subprocess.CompletedProcess([], 0, "n1\nn2\n", "")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: done)
    from_slurm(environment)
    found = [environment[k] for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")]
    assert found == ["5", "8", "1", "n1", "20123"]
    tasks = "SLURM_STEP_NUM_TASKS"
    batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
    for alone in (batch_script, {"SLURM_PROCID": "0", tasks: "1"}, {"RANK": "0", "SLURM_PROCID": "1", tasks: "2"}, {}):
        before = dict(alone)
        from_slurm(alone)
        assert alone == before


def test_a_missing_scontrol_asks_for_the_address(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="first of the nodes a could not be found .*set MASTER_ADDR"):
        from_slurm({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_NODELIST": "a"})


def test_the_local_number_names_the_device(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    for there, expected in ((8, 3), (1, 0)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda there=there: there)
        assert local_device(torch.device("cuda")) == torch.device("cuda", expected) and chosen.pop() == expected
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    with pytest.raises(ValueError, match="Process 3 of this machine has no GPU: torch finds 3"):
        local_device(torch.device("cuda"))
    assert local_device(torch.device("cpu")) == torch.device("cpu") and not chosen
