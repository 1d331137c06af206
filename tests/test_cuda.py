"""On a GPU: a training step is what it is on a CPU, in every precision and with every switch, and nothing waits for the device.

``CVA_TEST_DEVICE=cpu`` runs those that need no GPU on the CPU: a rehearsal of this file.
"""

import contextlib
import functools
import os
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import PRIMUS_SIZE, primus, unet
from helpers.projects import CONFIGURATION, NAME, make_project, make_trainer, train
from nnunetv2_cva.trainers.nnUNetTrainerCVA import nnUNetTrainerCVA

from nnunetv2_cva.config import PRIMUS, CVAConfig
from nnunetv2_cva.model.branches import Student, Teacher, make_backbone
from nnunetv2_cva.training.attention import KERNELS, Attention, choose, measure, preferring
from nnunetv2_cva.training.checkpoint import Run
from nnunetv2_cva.training.copies import COPIED, DeviceBatches, Lane
from nnunetv2_cva.training.objective import prepare
from nnunetv2_cva.training.schedule import make_optimizer
from nnunetv2_cva.training.step import TrainingStep, all_finite

DEVICE, CPU = torch.device(os.environ.get("CVA_TEST_DEVICE", "cuda")), torch.device("cpu")
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="needs a GPU")]

SIZE = (16, 24, 20)
BASE = CVAConfig(head_width=32, predictor_width=16, roi_size=(2, 3, 2), mask_block=8, learning_rate=1e-2, noise_p=0.0)
UNET, VIT = "U-Net", "Primus"
# Not AdamW: where a gradient is 0 but for rounding, which it is for the keys' bias, its steps are large all the same.
CONFIG = {UNET: BASE, VIT: BASE.updated({**PRIMUS, "optimizer": "sgd", "learning_rate": 1e-2}, "test")}
ADAMW = {"optimizer": "adamw", "learning_rate": 1e-4}


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def make_run(family, device, config, scaler=None):
    torch.manual_seed(0)
    network = unet(features=8) if family == UNET else primus(drop_path_rate=0.0)
    student = Student(make_backbone(network, config), config).to(device)
    if config.channels_last:
        student.to(memory_format=torch.channels_last_3d)
    return Run(student.train(), Teacher(student).eval(), make_optimizer(student.parameters(), config, device), scaler)


def batch(family, number, device, config, block):
    size = SIZE if family == UNET else PRIMUS_SIZE
    views = torch.randn(4, 1, *size, generator=torch.Generator().manual_seed(number))
    rois = torch.tensor([[[0.2, 0.0, 0.1], [1.0, 0.9, 0.8]]] * 2 + [[[0.0, 0.1, 0.2], [0.8, 1.0, 0.9]]] * 2)
    loaded = {"views": views, "rois": rois, "inside": torch.ones(4, 1, *size, dtype=torch.bool)}
    return prepare(loaded, config, block, device, number, 0, 0)


def trained(family, device, dtype=None, compiled=False, steps=2, **changes):
    """Losses of some steps, the weights behind them, and what was said."""
    config, said = replace(CONFIG[family], **changes), []
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10) if dtype == torch.float16 else None
    run = make_run(family, device, config, scaler)
    autocast = functools.partial(torch.autocast, device.type, dtype) if dtype else contextlib.nullcontext
    step = TrainingStep(run, run.student, config, autocast=autocast, compiled=compiled, say=said.append)
    block = run.student.backbone.block
    losses = [step(batch(family, n, device, config, block)) for n in range(steps)]
    assert all_finite(run.student) and all_finite(run.teacher)
    return losses, [p.detach().cpu() for p in run.student.parameters()], said


@functools.cache
def reference(family, optimizer="sgd"):
    """The CPU's float32."""
    return trained(family, CPU, **(ADAMW if optimizer == "adamw" else {}))[:2]


def close(found, expected, **tolerance):
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close({k: v.cpu().float() for k, v in mine.items()}, theirs, **tolerance)


@pytest.mark.parametrize("family", CONFIG)
@pytest.mark.parametrize(
    "changes", [{}, {"channels_last": True}, {"gradient_checkpointing": True}, {"gradient_checkpointing": "selective"}], ids=str
)
def test_float32_trains_as_on_a_cpu(family, changes):
    losses, weights, _ = trained(family, DEVICE, **changes)
    close(losses, reference(family)[0], rtol=1e-3, atol=1e-4)
    for mine, theirs in zip(weights, reference(family)[1], strict=True):
        assert (mine - theirs).norm() <= 1e-3 * theirs.norm() + 1e-4


@pytest.mark.parametrize("family", CONFIG)
def test_adamw_trains_as_on_a_cpu(family):
    losses, *_ = trained(family, DEVICE, **ADAMW)
    close(losses, reference(family, "adamw")[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("family", CONFIG)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16 with its scaler"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels last"])
def test_reduced_precision_differs_by_rounding(family, dtype, channels_last):
    losses, *_ = trained(family, DEVICE, dtype, channels_last=channels_last)
    close(losses, reference(family)[0], rtol=0.06, atol=0.05)


@pytest.mark.parametrize(
    "family, changes",
    [(UNET, {}), (UNET, {"channels_last": True}), (UNET, {"gradient_checkpointing": "selective"})]
    + [(VIT, {"gradient_checkpointing": "selective"})],
    ids=str,
)
def test_compiled_steps_are_the_plain_ones(family, changes):
    if DEVICE.type == "cpu":
        pytest.skip("compiling for a CPU takes minutes; tests/test_step.py has the same without code generation")
    losses, _, said = trained(family, DEVICE, torch.bfloat16, compiled=True, **changes)
    close(losses, reference(family)[0], rtol=0.06, atol=0.05)
    assert not any("Going on without" in line for line in said)


@pytest.mark.parametrize("heads, channels", [(12, 72), (16, 54)], ids=["Primus-M", "its feature blocks"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_of_attention_computes_the_same(kernel, heads, channels):
    generator = torch.Generator().manual_seed(0)
    exact = [torch.randn(2, heads, 200, channels, generator=generator, requires_grad=True) for _ in range(3)]
    rounded = [x.detach().to(DEVICE, torch.bfloat16).requires_grad_() for x in exact]
    expected = F.scaled_dot_product_attention(*exact)
    with preferring(kernel):
        found = F.scaled_dot_product_attention(*rounded)
        found.float().square().sum().backward()
    expected.square().sum().backward()
    for mine, theirs in [(found, expected), *((a.grad, b.grad) for a, b in zip(rounded, exact))]:
        assert (mine.float().cpu() - theirs).norm() < 0.03 * theirs.norm()


def test_kernels_are_measured_and_the_fastest_is_chosen():
    found = measure([Attention((2, 4, 512, 72), 1, True), Attention((2, 4, 512, 54), 1, False)], DEVICE, torch.bfloat16)
    assert set(found) == set(KERNELS) and list(found.values()) == sorted(found.values()) and min(found.values()) > 0
    if DEVICE.type == "cuda":
        backbone = make_backbone(primus(), CONFIG[VIT])
        kernel, line = choose("auto", backbone, 4, DEVICE, torch.bfloat16)
        assert kernel in KERNELS and line.startswith(f"Attention: {kernel} is the fastest here")


# ---- copies


@GPU
def test_the_copy_of_a_batch_ends_while_the_step_before_it_still_runs(tmp_path, monkeypatch):
    batches = device_batches(tmp_path, monkeypatch)
    next(batches)
    torch.cuda._sleep(2**31)  # about a second of "step"
    behind = torch.cuda.current_stream().record_event()
    next(batches)
    batches._copied.synchronize()
    assert not behind.query(), "the step has ended before the copy did"
    torch.cuda.synchronize()
    batches.close()


@GPU
@pytest.mark.parametrize("workers", [0, 2])
def test_copied_batches_are_the_loaders_while_steps_are_slow(tmp_path, monkeypatch, workers):
    monkeypatch.setenv("nnUNet_n_proc_DA", str(workers))
    batches, sums = device_batches(tmp_path, monkeypatch), []
    for _ in range(12):
        copied = next(batches)
        torch.cuda._sleep(2**24)
        sums.append(torch.stack([copied[name].double().sum() for name in COPIED]))
        copied["views"].fill_(-1e6)  # as augmentation may
    found = torch.stack(sums).cpu()
    batches.close()
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    plain = device_batches(tmp_path / "again", monkeypatch).batches
    expected = torch.tensor([[one[name].double().sum() for name in COPIED] for one in (next(plain) for _ in range(12))])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-3)


def device_batches(folder, monkeypatch):
    folder.mkdir(exist_ok=True)
    make_project(folder, monkeypatch, cva={"epochs": 20})
    trainer = make_trainer(nnUNetTrainerCVA, device="cuda")
    trainer.initialize()
    trainer.open_data()
    return DeviceBatches(trainer.data.batches(0, 40), Lane(torch.device("cuda", torch.cuda.current_device())))


# ---- the trainer


@GPU
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_nothing_waits_for_the_device_in_a_step(tmp_path, monkeypatch, precision):
    """fp16's scaler looks at its scale, once a step."""
    monkeypatch.setenv("nnUNet_compile", "f")
    make_project(tmp_path, monkeypatch, cva={"precision": precision})
    trainer = make_trainer(nnUNetTrainerCVA, device="cuda")
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    trainer.train_step(next(trainer.dataloader_train))  # libraries initialise themselves
    given = next(trainer.dataloader_train)
    torch.cuda.set_sync_debug_mode("warn" if precision == "fp16" else "error")
    try:
        with pytest.warns(UserWarning) if precision == "fp16" else contextlib.nullcontext() as waits:
            trainer.train_step(given)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert precision != "fp16" or len(waits) <= 3
    trainer.dataloader_train.close()


@pytest.mark.parametrize("precision", ["bf16", "fp16"] if DEVICE.type == "cuda" else ["fp32"])
def test_stopped_and_continued_is_the_uninterrupted_training(tmp_path, monkeypatch, precision):
    monkeypatch.setenv("nnUNet_compile", "f")
    ends = []
    for name, parts in (("at once", [4]), ("in two", [2, 4])):
        (tmp_path / name).mkdir()
        make_project(tmp_path / name, monkeypatch, cva={"epochs": 4, "precision": precision, "checkpoint_minutes": 1e-6})
        for number, last in enumerate(parts):
            trainer = make_trainer(nnUNetTrainerCVA, resume=number > 0, device=DEVICE.type)
            trainer.on_train_start()
            for _ in range(trainer.current_epoch, last):
                epoch(trainer)
            trainer.dataloader_train.close()
        ends.append(trainer)
    history = [[r["total_loss"] for r in t.history.epochs] for t in ends]
    torch.testing.assert_close(*map(torch.tensor, history), rtol=0.02, atol=0.01)
    assert len(history[1]) == 4
    for mine, theirs in zip(ends[0].student.parameters(), ends[1].student.parameters(), strict=True):
        assert (mine - theirs).norm() <= 0.02 * theirs.norm() + 1e-3


def epoch(trainer):
    """As nnU-Net's loop has it."""
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    trainer.on_train_epoch_end(
        [trainer.train_step(next(trainer.dataloader_train)) for _ in range(trainer.num_iterations_per_epoch)]
    )
    trainer.on_validation_epoch_start()
    trainer.on_validation_epoch_end([])
    trainer.on_epoch_end()


def test_a_training_ends_with_weights_that_load_anywhere(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_compile", "f")
    monkeypatch.setenv("nnUNet_n_proc_DA", "2" if DEVICE.type == "cuda" else "1")
    make_project(tmp_path, monkeypatch, cva={"epochs": 2, "iterations_per_epoch": 4})
    trainer = train(nnUNetTrainerCVA, device=DEVICE.type)
    content = torch.load(os.path.join(trainer.output_folder, "checkpoint_final.pth"), weights_only=True)
    assert all(tensor.device == CPU and tensor.isfinite().all() for tensor in content["network_weights"].values())
    assert len(content["cva"]["history"]) == 2 and NAME in trainer.output_folder


def test_bench_measures_this_device(tmp_path, monkeypatch, capsys):
    from nnunetv2_cva.commands import main
    from nnunetv2_cva.transfer import target

    monkeypatch.setenv("nnUNet_compile", "f")
    monkeypatch.setattr(target, "trainer_class", lambda name: nnUNetTrainerCVA)
    make_project(tmp_path, monkeypatch)
    assert main.main(["bench", "-d", "100", "-c", CONFIGURATION, "-device", DEVICE.type, "--seconds", "1"]) == 0
    assert f"device alone ({DEVICE.type})" in capsys.readouterr().out
