import pytest
import torch
from helpers.networks import unet
from torch import nn

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.model.branches import Student, Teacher, align, make_backbone
from nnunetv2_cva.model.checkpointing import recompute_in_backward

SIZE = (8, 12, 16)
SMALL = CVAConfig(head_width=16, predictor_width=8, roi_size=(2, 3, 3))


def student(config=SMALL, kind="residual"):
    return Student(make_backbone(unet(kind), config), config)


def batch(n=4):
    torch.manual_seed(1)
    rois = torch.rand(n, 2, 3)
    return torch.randn(n, 1, *SIZE), rois


@pytest.mark.parametrize("kind", ["plain", "residual"])
@pytest.mark.parametrize(
    "change, outputs",
    [
        ({}, {"bins", "image", "reconstruction"}),
        ({"contrastive_weight": 0.0}, {"bins", "reconstruction"}),
        ({"consistency_weight": 0.0}, {"image", "reconstruction"}),
        ({"reconstruction_weight": 0.0}, {"bins", "image"}),
        ({"consistency_weight": 0.0, "contrastive_weight": 0.0}, {"reconstruction"}),
        ({"consistency_weight": 0.0, "reconstruction_weight": 0.0}, {"image"}),
    ],
)
def test_a_recipe_builds_what_its_losses_read_and_trains_nothing_else(kind, change, outputs):
    config = SMALL.updated(change, "test")
    network = student(config, kind)
    views, rois = batch()
    found = network(views, None, rois)
    assert set(found) == outputs
    sum((v**2).sum() for v in found.values()).backward()
    for name, parameter in network.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert (network.projector is not None) == config.needs_heads


def test_shapes_of_the_outputs():
    views, rois = batch()
    found = student()(views, None, rois)
    assert found["bins"].shape == (4, 18, 16)
    assert found["image"].shape == (4, 16)
    assert found["reconstruction"].shape == views.shape


def test_the_network_stays_nnunets_own():
    network = unet()
    before = network.state_dict().keys()
    wrapped = Student(make_backbone(network, SMALL), SMALL)
    assert wrapped.backbone.network is network and network.state_dict().keys() == before


def test_the_teacher_is_a_copy_that_shares_nothing_and_trains_nothing():
    pupil = student()
    teacher = Teacher(pupil)
    storages = {p.data_ptr() for p in pupil.parameters()}
    assert all(p.data_ptr() not in storages and not p.requires_grad for p in teacher.parameters())
    views, rois = batch()
    maps, image = pupil.backbone.encode(pupil.backbone.averaged(), views)
    torch.testing.assert_close(teacher(views, rois)["image"], pupil.projector(image))
    assert not teacher(views, rois)["bins"].requires_grad


def test_the_teacher_has_no_decoder_and_no_predictor():
    names = {name.split(".")[0] for name, _ in Teacher(student()).named_parameters()}
    assert names == {"encoder", "projector"}


def test_following_equals_the_slow_average():
    pupil = student()
    teacher = Teacher(pupil)
    with torch.no_grad():
        for p in pupil.parameters():
            p.add_(torch.randn_like(p))
    expected = {
        name: 0.9 * dict(teacher.encoder["encoder"].named_parameters())[name] + 0.1 * p.detach()
        for name, p in pupil.backbone.network.encoder.named_parameters()
    }
    expected_projector = [
        0.9 * t + 0.1 * s.detach() for t, s in zip(teacher.projector.parameters(), pupil.projector.parameters())
    ]
    teacher.follow(pupil, 0.9)
    for name, p in teacher.encoder["encoder"].named_parameters():
        torch.testing.assert_close(p, expected[name])
    for p, e in zip(teacher.projector.parameters(), expected_projector):
        torch.testing.assert_close(p, e)


def test_momentum_zero_makes_the_teacher_the_student():
    pupil = student()
    teacher = Teacher(pupil)
    with torch.no_grad():
        next(pupil.projector.parameters()).add_(1)
    teacher.follow(pupil, 0.0)
    assert torch.equal(next(teacher.projector.parameters()), next(pupil.projector.parameters()))


def test_running_statistics_of_a_backbone_follow_too():
    """The published code's teacher normalises with statistics that nobody updates."""
    pupil = Student(make_backbone(unet("plain", norm=nn.BatchNorm3d), SMALL), SMALL)
    teacher = Teacher(pupil).eval()
    views, rois = batch()
    for _ in range(3):
        pupil.train()(views + 5, None, rois)
        teacher.follow(pupil, 0.0)
    mine, theirs = (dict(m.named_buffers()) for m in (teacher.encoder["encoder"], pupil.backbone.network.encoder))
    followed = [name for name in mine if "running" in name]
    assert followed and all(torch.equal(mine[name], theirs[name]) for name in followed)
    maps, image = pupil.eval().backbone.encode(pupil.backbone.averaged(), views)
    torch.testing.assert_close(teacher(views, rois)["image"], pupil.projector(image))


def test_features_do_not_depend_on_train_or_eval():
    pupil = student()
    views, rois = batch()
    assert torch.equal(pupil.train().features(views, rois), pupil.eval().features(views, rois))


def test_checkpointing_changes_memory_and_nothing_else():
    views, rois = batch()
    gradients = []
    for how in (False, True, "selective"):
        config = SMALL.updated({"gradient_checkpointing": how}, "test")
        torch.manual_seed(3)
        pupil = student(config)
        assert Teacher(pupil)(views, rois)["bins"].shape[0] == 4
        sum((v**2).sum() for v in pupil(views, None, rois).values()).backward()
        gradients.append([p.grad for p in pupil.parameters() if p.requires_grad])
    for plain, *others in zip(*gradients, strict=True):
        for other in others:
            torch.testing.assert_close(other, plain)


def test_selective_checkpointing_bears_an_activation_right_behind_a_convolution():
    torch.manual_seed(0)
    modules = [nn.Sequential(nn.Conv3d(1, 3, 3), nn.LeakyReLU(inplace=True), nn.Conv3d(3, 2, 1)) for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    recompute_in_backward(modules[1:], "selective")
    for module in modules:
        (module(batch()[0]) ** 2).sum().backward()
    for a, b in zip(*(m.parameters() for m in modules), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("how", [True, "selective"])
def test_checkpointing_refuses_running_statistics_which_would_move_twice(how):
    config = SMALL.updated({"gradient_checkpointing": how}, "test")
    with pytest.raises(ValueError, match="gradient_checkpointing: the network has BatchNorm3d.*Set it to false"):
        make_backbone(unet(norm=nn.BatchNorm3d), config)


def test_aligned_taps_are_concatenated_in_order():
    pupil = student()
    views, rois = batch()
    maps, _ = pupil.backbone.encode(pupil.backbone.averaged(), views)
    both = align(maps, pupil.backbone.taps, rois, (2, 3, 3), views.shape[2:])
    first = align(maps[:1], pupil.backbone.taps[:1], rois, (2, 3, 3), views.shape[2:])
    assert both.shape == (4, 18, 6 + 12 + 18)
    assert torch.equal(both[..., :6], first)


def test_a_view_that_the_strides_do_not_divide_is_refused_with_the_nearest_sizes():
    with pytest.raises(ValueError, match=r"8x13x16 .* strides 4x4x4.*8, 12 or 16, 16"):
        student().backbone.check_view((8, 13, 16))


@pytest.mark.parametrize("size", [(16, 16, 16), (16, 32, 16), (8, 16, 32)])
def test_a_view_that_masking_would_hide_whole_is_refused(size):
    config = SMALL.updated({"mask_block": 16}, "test")
    with pytest.raises(ValueError, match=r"has [12] blocks \(mask_block\) of 16x16x16 voxels.*hides all.*smaller mask_block"):
        student(config).backbone.check_view(size)
    student(config.updated({"mask_block": 8}, "test")).backbone.check_view((16, 16, 16))


def test_a_network_without_encoder_and_decoder_is_refused():
    with pytest.raises(ValueError, match="Sequential is not supported.*taps"):
        make_backbone(nn.Sequential(nn.Conv3d(1, 1, 1)), SMALL)
