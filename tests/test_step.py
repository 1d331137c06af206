"""One training step: gradients, scaler, teacher, and a compilation that may fail."""

import contextlib
import dataclasses
import functools
import re

import numpy as np
import pytest
import torch
from helpers.networks import PRIMUS_SIZE, primus, unet
from helpers.reads import Reads
from torch._dynamo.backends.common import aot_autograd

from nnunetv2_cva.config import PRIMUS, CVAConfig
from nnunetv2_cva.model.branches import Student, Teacher, make_backbone
from nnunetv2_cva.training.checkpoint import Run
from nnunetv2_cva.training.objective import prepare
from nnunetv2_cva.training.schedule import make_optimizer
from nnunetv2_cva.training.step import TrainingStep, all_finite

SIZE = (16, 24, 20)
CPU = torch.device("cpu")
CONFIG = CVAConfig(head_width=16, predictor_width=8, roi_size=(2, 3, 2), mask_block=8, learning_rate=0.1)


def make_run(scaler=None, config=CONFIG):
    torch.manual_seed(0)
    network = unet()
    student = Student(make_backbone(network, config), config)
    return Run(student, Teacher(student), make_optimizer(student.parameters(), config, CPU), scaler)


def batch(seed=0, size=SIZE, block=(8, 8, 8)):
    generator = torch.Generator().manual_seed(seed)
    views = torch.randn(4, 1, *size, generator=generator)
    rois = torch.tensor([[[0.2, 0.0, 0.1], [1.0, 0.9, 0.8]]] * 2 + [[[0.0, 0.1, 0.2], [0.8, 1.0, 0.9]]] * 2)
    loaded = {"views": views, "rois": rois, "inside": torch.ones(4, 1, *size, dtype=torch.bool)}
    return prepare(loaded, CONFIG, block, CPU, seed, 0, 0)


def hidden_changed(ready, seed=5):
    """The same batch whose views differ where they are hidden."""
    other = torch.randn(ready.views.shape, generator=torch.Generator().manual_seed(seed)) * 9
    return dataclasses.replace(ready, views=torch.where(ready.hidden, other, ready.views))


@pytest.mark.parametrize("network", [unet, *(functools.partial(primus, v) for v in (1, 2, 3))], ids=["U-Net", "V1", "V2", "V3"])
def test_the_student_never_sees_what_is_hidden_and_the_teacher_does(network):
    """Through the step itself: what the branches are called with, and what they make of it."""
    torch.manual_seed(0)
    student = Student(make_backbone(network(), CONFIG), CONFIG)
    run = Run(student, Teacher(student), make_optimizer(student.parameters(), CONFIG, CPU), None)
    size = PRIMUS_SIZE if network is not unet else SIZE
    ready = batch(size=size, block=student.backbone.block)
    seen, told = [], []
    student.eval()  # no dropped paths: both calls compute the same
    student.register_forward_hook(lambda module, inputs, found: seen.append((inputs[0].clone(), found)))
    run.teacher.register_forward_hook(lambda module, inputs, found: told.append((inputs[0].clone(), found)))
    step = TrainingStep(run, student, CONFIG)
    with torch.no_grad():
        unchanged = [p.clone() for p in student.parameters()], [p.clone() for p in run.teacher.parameters()]
    for views in (ready, hidden_changed(ready)):
        step(views)
        for module, values in zip((student, run.teacher), unchanged):
            for p, value in zip(module.parameters(), values):
                p.data.copy_(value)
    (first, one), (second, two) = seen
    assert torch.equal(first, ready.visible) and torch.equal(second, ready.visible)
    assert (first[ready.hidden.expand_as(first)] == 0).all() and ready.hidden.float().mean() > 0.5
    assert one.keys() == {"bins", "image", "reconstruction"} and all(torch.equal(one[k], two[k]) for k in one)
    assert torch.equal(told[0][0], ready.views) and not torch.equal(told[0][1]["bins"], told[1][1]["bins"])


def weights(module):
    return [p.detach().clone() for p in module.parameters()]


def test_student_and_teacher_move_and_the_teacher_by_the_momentum():
    run = make_run()
    student, teacher = weights(run.student), weights(run.teacher)
    losses = TrainingStep(run, run.student, CONFIG)(batch())
    assert set(losses) == {"reconstruction", "consistency", "contrastive", "total", "skipped"} and losses["skipped"] == 0
    assert not any(loss.requires_grad for loss in losses.values())
    assert any(not torch.equal(a, b) for a, b in zip(student, run.student.parameters()))
    before = teacher[0]
    after, followed = next(run.teacher.parameters()), next(iter(run.student.backbone.averaged().values()))
    expected = CONFIG.teacher_momentum * before + (1 - CONFIG.teacher_momentum) * next(followed.parameters())
    torch.testing.assert_close(after, expected)


def test_a_step_that_the_scaler_skips_moves_nobody():
    run = make_run(torch.amp.GradScaler("cpu", init_scale=2.0**10))
    step = TrainingStep(run, run.student, CONFIG)
    spoil = next(run.student.parameters()).register_hook(lambda gradient: gradient * torch.inf)
    student, teacher, scale = weights(run.student), weights(run.teacher), run.scaler.get_scale()
    step(batch())
    assert all(map(torch.equal, student, run.student.parameters()))
    assert all(map(torch.equal, teacher, run.teacher.parameters()))
    assert run.scaler.get_scale() == scale / 2
    spoil.remove()
    step(batch(1))
    assert not all(map(torch.equal, student, run.student.parameters()))
    assert not all(map(torch.equal, teacher, run.teacher.parameters()))
    assert all_finite(run.student)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("first", [True, False])
def test_a_batch_that_is_not_finite_leaves_the_weights_and_the_optimizer_alone(optimizer, fused, first):
    """Whether it comes first or later: what follows is as if it had not been there, but for the teacher."""
    still = {"learning_rate": 1e-3, "teacher_momentum": 1.0}
    config = dataclasses.replace(CONFIG, optimizer=optimizer, fused_optimizer=fused, **still)
    found = []
    for bad in (True, False):
        run = make_run(config=config)
        step = TrainingStep(run, run.student, config)
        if not first:
            step(batch(0))
        if bad:
            before = weights(run.student)
            spoiled = dataclasses.replace(batch(1), visible=batch(1).visible * torch.nan)
            losses = step(spoiled)
            assert losses["skipped"] == 1 and all(map(torch.equal, before, run.student.parameters()))
        assert step(batch(2))["skipped"] == 0
        found.append(weights(run.student))
    assert all(map(torch.equal, *found)) and all(w.isfinite().all() for w in found[0])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_first_step_that_is_skipped_leaves_nothing_behind(optimizer, monkeypatch):
    """A fused optimizer that makes its momentum in the first step would go on with memory that nobody has written."""
    monkeypatch.setattr(torch, "empty_like", lambda like, **options: torch.full_like(like, torch.nan, **options))
    config, found = dataclasses.replace(CONFIG, optimizer=optimizer, learning_rate=1e-2), []
    for skipped in (True, False):
        parameters = [torch.nn.Parameter(torch.ones(n, 5)) for n in (3, 40)]
        made = make_optimizer(parameters, config, torch.device("cuda"))
        for bad in (True, False, False) if skipped else (False, False):
            for p in parameters:
                p.grad = torch.full_like(p, torch.inf if bad else 0.5)
            made.found_inf = torch.tensor(float(bad))
            made.step()
        found.append([p.detach() for p in parameters])
    torch.testing.assert_close(*found)


def test_the_scaler_changes_no_weights_but_by_rounding():
    plain, scaled = make_run(), make_run(torch.amp.GradScaler("cpu", init_scale=2.0**10))
    for run in (plain, scaled):
        TrainingStep(run, run.student, CONFIG)(batch())
    for a, b in zip(plain.student.parameters(), scaled.student.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fused_optimizers_take_the_same_steps(optimizer):
    """The CPU has the kernels too; training uses them on CUDA."""
    found = []
    for fused in (True, False):
        config = dataclasses.replace(CONFIG, optimizer=optimizer, learning_rate=1e-2, fused_optimizer=fused)
        generator = torch.Generator().manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(n, 5, generator=generator)) for n in (3, 40)]
        made = make_optimizer(parameters, config, torch.device("cuda"))
        assert made.defaults["fused"] is fused
        for _ in range(4):
            for p in parameters:
                p.grad = torch.randn(p.shape, generator=generator)
            made.step()
        found.append([p.detach() for p in parameters])
    torch.testing.assert_close(*found)


def test_channels_last_trains_the_same():
    plain, last = make_run(), make_run()
    last.student.to(memory_format=torch.channels_last_3d)
    last = dataclasses.replace(last, teacher=Teacher(last.student))
    formats = [p.is_contiguous(memory_format=torch.channels_last_3d) for p in last.teacher.parameters() if p.ndim == 5]
    assert formats and all(formats)
    for n in range(3):
        losses = [TrainingStep(run, run.student, CONFIG)(batch(n)) for run in (plain, last)]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def test_bf16_losses_are_those_of_float32_but_for_rounding():
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    exact, rounded = (
        TrainingStep(run, run.student, CONFIG, autocast=how)(batch())
        for run, how in ((make_run(), contextlib.nullcontext), (make_run(), autocast))
    )
    for name, loss in exact.items():
        assert rounded[name].dtype == torch.float32
        torch.testing.assert_close(rounded[name], loss, rtol=0.05, atol=0.02)


def failing(direction):
    """A backend that compiles forward or backward, whichever is not to fail."""

    def refuse(graph, inputs):
        raise RuntimeError(f"no compiler for {direction}\nlong story")

    return aot_autograd(
        fw_compiler=refuse if direction == "forward" else lambda graph, inputs: graph.forward,
        bw_compiler=refuse if direction == "backward" else lambda graph, inputs: graph.forward,
    )


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_compilation_that_fails_is_said_and_the_step_done_without(direction, monkeypatch):
    eager = make_run()
    expected = [TrainingStep(eager, eager.student, CONFIG)(batch(n))["total"] for n in range(2)]
    compile_, said = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda module, options: compile_(module, backend=failing(direction)))
    run = make_run()
    step = TrainingStep(run, run.student, CONFIG, compiled=True, say=said.append)
    found = [step(batch(n))["total"] for n in range(2)]
    line, *rest = said
    what = " for the student" if direction == "backward" else ""  # the teacher has no backward pass: it stays compiled
    assert line.startswith(f"Going on without torch.compile{what}, which failed: no compiler for {direction} (")
    assert "long story" not in line and [r[:20] for r in rest] == ["The first step took "] * bool(what)
    torch.testing.assert_close(found, expected)
    assert all(map(torch.equal, weights(run.student), weights(eager.student)))


@pytest.mark.parametrize("recompute", [False, True, "selective"])
def test_compiled_branches_train_the_same(recompute, monkeypatch, caplog):
    compile_, said = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda module, options: compile_(module, backend="aot_eager", fullgraph=True))
    config = CONFIG.updated({"gradient_checkpointing": recompute}, "test")
    eager, compiled = make_run(), make_run(config=config)
    steps = [
        TrainingStep(eager, eager.student, CONFIG),
        TrainingStep(compiled, compiled.student, config, compiled=True, say=said.append),
    ]
    for n in range(3):
        first, second = (step(batch(n)) for step in steps)
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    (line,) = said
    assert re.fullmatch(r"The first step took \d+\.\d s, torch\.compile included\.", line) and "in-place" not in caplog.text


def test_a_compiled_primus_that_recomputes_trains_the_same(monkeypatch):
    """The default of Primus on CUDA, each branch one graph. Paths are not dropped here: a compiled step draws others."""
    compile_, said = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda module, options: compile_(module, backend="aot_eager", fullgraph=True))
    found = []
    for recompute in (False, "selective"):
        config = CONFIG.updated({**PRIMUS, "gradient_checkpointing": recompute}, "test")
        network = primus(drop_path_rate=0.0)
        pupil = Student(make_backbone(network, config), config)
        run = Run(pupil, Teacher(pupil), make_optimizer(pupil.parameters(), config, CPU), None)
        step = TrainingStep(run, pupil.train(), config, compiled=bool(recompute), say=said.append)
        found.append([step(batch(n, PRIMUS_SIZE)) for n in range(2)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert len(said) == 1 and said[0].startswith("The first step took")


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_primus_that_drops_paths_is_one_graph(version):
    """As its trainers build it."""
    config = CONFIG.updated(PRIMUS, "test")
    pupil = Student(make_backbone(primus(version, depth=1), config), config).train()
    ready, graphs = batch(0, PRIMUS_SIZE), []
    torch._dynamo.reset()

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        torch.compile(pupil, backend=count, fullgraph=True)(ready.visible, ready.mask, ready.rois)
        torch.compile(Teacher(pupil).eval(), backend=count, fullgraph=True)(ready.views, ready.rois)
    assert len(graphs) == 2


@pytest.mark.parametrize("recompute", [False, "selective"])
@pytest.mark.parametrize("network", [unet, *(functools.partial(primus, v) for v in (1, 2, 3))], ids=["U-Net", "V1", "V2", "V3"])
def test_a_step_waits_for_nothing(network, recompute):
    """Nothing is read back from the device: losses, gradients, clipping, optimizer, teacher. The optimizer is CUDA's."""
    config = CONFIG.updated({"gradient_checkpointing": recompute}, "test")
    pupil = Student(make_backbone(network(), config), config).train()
    run = Run(pupil, Teacher(pupil), make_optimizer(pupil.parameters(), config, torch.device("cuda")), None)
    step, ready = TrainingStep(run, pupil, config), batch(0, SIZE if network is unet else PRIMUS_SIZE, pupil.backbone.block)
    with Reads() as reads:
        step(ready)
    assert reads.found == []


def test_attention_is_chosen_for_forward_and_backward():
    """What computes activations again in the backward pass needs the same kernel."""
    entered, inside = [], []

    @contextlib.contextmanager
    def kernel():
        entered.append(True)
        inside.append(True)
        yield
        inside.pop()

    run = make_run()
    run.student.register_forward_hook(lambda *_: entered.append(bool(inside)))
    next(run.student.parameters()).register_hook(lambda gradient: entered.append(bool(inside)))
    TrainingStep(run, run.student, CONFIG, attention=kernel)(batch())
    assert entered == [True, True, True] and inside == []


def test_what_compiling_is_not_to_blame_for_is_raised(monkeypatch):
    run = make_run()
    monkeypatch.setattr(torch, "compile", lambda module, options: module)
    step = TrainingStep(run, run.student, CONFIG, compiled=True, say=lambda line: pytest.fail(line))
    run.student.predictor.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken layer")))
    with pytest.raises(RuntimeError, match="broken layer"):
        step(batch())


def test_weights_that_are_not_finite_are_seen():
    run = make_run()
    assert all_finite(run.student)
    for bad in (np.nan, np.inf):
        with torch.no_grad():
            next(run.student.parameters()).view(-1)[0] = bad
        assert not all_finite(run.student)
