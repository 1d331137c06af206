"""Which attention a step has, which kernel is preferred, and that the preference changes no result."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import PRIMUS_SIZE, primus, unet
from torch.overrides import TorchFunctionMode

from nnunetv2_cva.config import PRIMUS, CVAConfig
from nnunetv2_cva.model.branches import Student, Teacher, make_backbone
from nnunetv2_cva.training import attention
from nnunetv2_cva.training.attention import Attention, attentions, choose, measure, preferring

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CONFIG = CVAConfig(head_width=16, predictor_width=8, roi_size=(2, 3, 2))


class Seen(TorchFunctionMode):
    """Shapes of every self-attention, and whether a gradient goes through it."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention and args[0].shape == args[1].shape:
            self.found.append((tuple(args[0].shape), args[0].requires_grad))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("change", [{}, {"consistency_weight": 0.0, "contrastive_weight": 0.0}, {"mask_ratio": 0.0}])
@pytest.mark.parametrize("options", [{}, {"num_register_tokens": 2}], ids=["plain", "registers"])
def test_the_attention_of_a_step_is_what_a_step_calls(options, change):
    config = CONFIG.updated(change, "test")
    student = Student(make_backbone(primus(drop_path_rate=0.0, **options), config), config)
    views = torch.randn(4, 1, *PRIMUS_SIZE)
    rois = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]).expand(4, 2, 3)
    mask = (torch.arange(48) < 36).view(1, 4, 6, 2).expand(4, -1, -1, -1).contiguous() if config.mask_ratio else None
    with Seen() as seen:
        student(views, mask, rois)
        if config.needs_heads:
            Teacher(student)(views, rois)
    expected = [(a.shape, a.trained) for a in attentions(student.backbone, 4) for _ in range(a.count)]
    assert sorted(seen.found) == sorted(expected)


def test_a_unet_has_no_attention():
    assert attentions(make_backbone(unet(), CONFIG), 4) == []


def test_preferring_puts_one_kernel_first_and_leaves_the_others():
    before = torch._C._get_sdp_priority_order()
    for kernel, backend in attention.KERNELS.items():
        with preferring(kernel):
            order = torch._C._get_sdp_priority_order()
            assert order[0] == backend.value
            assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()
            assert torch.backends.cuda.mem_efficient_sdp_enabled() and torch.backends.cuda.cudnn_sdp_enabled()
        assert torch._C._get_sdp_priority_order() == before
    with preferring(None):
        assert torch._C._get_sdp_priority_order() == before


def test_every_kernel_is_measured_and_one_that_fails_comes_last(monkeypatch):
    steps, real = [Attention((2, 2, 6, 8), 3, True), Attention((2, 2, 9, 8), 1, False)], F.scaled_dot_product_attention

    def broken(*inputs):
        if torch._C._get_sdp_priority_order()[0] == attention.KERNELS["cudnn"].value:
            raise RuntimeError("no execution plan")
        return real(*inputs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", broken)
    found = measure(steps, CPU, torch.float32)
    assert set(found) == set(attention.KERNELS) and list(found)[-1] == "cudnn" and found["cudnn"] == math.inf
    assert all(0 < seconds < math.inf for name, seconds in found.items() if name != "cudnn")


def test_too_little_memory_is_not_taken_for_a_kernel_that_fails(monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(F, "scaled_dot_product_attention", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        measure([Attention((1, 1, 2, 8), 1, True)], CPU, torch.float32)


@pytest.mark.parametrize(
    "seconds, best, line",
    [
        ({"cudnn": 0.061, "flash": 0.118, "efficient": math.inf}, "cudnn", "cudnn 61 ms, flash 118 ms, efficient fails"),
        (dict.fromkeys(attention.KERNELS, math.inf), None, "torch's own choice (flash fails, cudnn fails, efficient fails)"),
    ],
)
def test_the_fastest_is_taken_and_said(monkeypatch, seconds, best, line):
    monkeypatch.setattr(attention, "measure", lambda *_: seconds)
    backbone = make_backbone(primus(), CONFIG.updated(PRIMUS, "test"))
    kernel, said = choose("auto", backbone, 4, CUDA, torch.bfloat16)
    assert kernel == best and line in said


def test_what_is_set_is_not_measured_and_where_there_is_no_choice_nothing_is_said(monkeypatch):
    monkeypatch.setattr(attention, "measure", lambda *_: pytest.fail("measured"))
    backbone = make_backbone(primus(), CONFIG)
    assert choose("flash", backbone, 4, CUDA, torch.bfloat16) == ("flash", "Attention: flash where it can, as set.")
    for options in (
        (backbone, 4, CPU, torch.bfloat16),
        (backbone, 4, CUDA, None),
        (make_backbone(unet(), CONFIG), 4, CUDA, None),
    ):
        assert choose("auto", *options) == (None, None)


@pytest.mark.parametrize("kernel", attention.KERNELS)
def test_gradients_do_not_depend_on_the_kernel(kernel):
    inputs = [torch.randn(2, 3, 7, 8, requires_grad=True) for _ in range(3)]
    run = functools.partial(F.scaled_dot_product_attention, *inputs)
    expected = torch.autograd.grad(run().square().sum(), inputs)
    with preferring(kernel):
        found = torch.autograd.grad(run().square().sum(), inputs)
    torch.testing.assert_close(found, expected)
