"""The losses against loops over their formulas, hand-computed cases, and two processes against one."""

import math

import pytest
import torch
import torch.distributed as dist

from nnunetv2_cva import losses
from nnunetv2_cva.losses import consistency_cosine, consistency_gram, consistency_loss, nt_xent, nt_xent_bins, reconstruction_loss


def pair(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


def gradient(loss, student, *rest):
    student = student.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(student, *rest), student)
    return found


# --- reconstruction


def slow_reconstruction(prediction, target, voxel_mask, inside):
    terms = []
    for n, i, j, k in torch.cartesian_prod(*map(torch.arange, inside[:, 0].shape)).tolist():
        if inside[n, 0, i, j, k] and (voxel_mask is None or voxel_mask[n, 0, i, j, k]):
            for a, b in zip(prediction[n, :, i, j, k].tolist(), target[n, :, i, j, k].tolist(), strict=True):
                d = abs(a - b)
                terms.append(d * d / 2 if d <= 1 else d - 0.5)
    return sum(terms) / len(terms)


@pytest.mark.parametrize("masked", [True, False])
def test_reconstruction_equals_slow_loops(masked):
    prediction, target = pair(2, 3, 2, 4, 3)
    voxel_mask, inside = torch.rand(2, 1, 2, 4, 3) < 0.6, torch.rand(2, 1, 2, 4, 3) < 0.8
    mask = voxel_mask if masked else None
    found = reconstruction_loss(2 * prediction, target, mask, inside)
    assert found.item() == pytest.approx(slow_reconstruction(2 * prediction, target, mask, inside), abs=1e-12)


def test_reconstruction_by_hand():
    prediction, target = torch.zeros(1, 1, 1, 2, 2), torch.tensor([[[[[0.5, 3.0], [100.0, 100.0]]]]])
    voxel_mask = torch.tensor([[[[[True, True], [False, True]]]]])
    inside = torch.tensor([[[[[True, True], [True, False]]]]])
    found = reconstruction_loss(prediction, target, voxel_mask, inside)
    assert found.item() == pytest.approx((0.125 + 2.5) / 2)


def test_reconstruction_of_no_voxel_is_0_with_a_gradient():
    prediction, target = pair(2, 1, 2, 4, 3)
    nothing = torch.zeros(2, 1, 2, 4, 3, dtype=torch.bool)
    prediction.requires_grad_()
    loss = reconstruction_loss(prediction, target, None, nothing)
    loss.backward()
    assert loss.item() == 0 and not prediction.grad.any()


def test_reconstruction_ignores_whatever_is_left_out():
    prediction, target = pair(2, 3, 2, 4, 3)
    inside = torch.rand(2, 1, 2, 4, 3) < 0.7
    poisoned = prediction.masked_fill(~inside, torch.nan).requires_grad_()
    loss = reconstruction_loss(poisoned, target, None, inside)
    loss.backward()
    assert torch.equal(loss, reconstruction_loss(prediction, target, None, inside))
    assert not poisoned.grad.masked_select(~inside.expand_as(target)).any()


# --- consistency


def slow_cosine(student, teacher):
    terms = []
    for view in range(2):
        for case in range(student.shape[1]):
            for r in range(student.shape[2]):
                a, b = student[view, case, r], teacher[1 - view, case, r]
                terms.append(2 - 2 * (a @ b) / (a.norm() * b.norm()))
    return sum(terms) / len(terms)


def slow_gram(student, teacher):
    terms = []
    for view in range(2):
        for case in range(student.shape[1]):
            grams = []
            for vectors in (student[view, case], teacher[1 - view, case]):
                grams.append(sum(torch.outer(v / v.norm(), v / v.norm()) for v in vectors))
            terms.append(((grams[0] - grams[1]) ** 2).mean())
    return sum(terms) / len(terms)


@pytest.mark.parametrize(("loss", "slow"), [(consistency_cosine, slow_cosine), (consistency_gram, slow_gram)])
@pytest.mark.parametrize("shape", [(2, 3, 4, 7), (2, 2, 6, 5), (2, 1, 3, 3)])
def test_consistency_equals_slow_loops(loss, slow, shape):
    student, teacher = pair(*shape)
    torch.testing.assert_close(loss(student, teacher), slow(student, teacher))
    torch.testing.assert_close(gradient(loss, student, teacher), gradient(slow, student, teacher))


def test_cosine_bounds():
    student, _ = pair(2, 3, 4, 7)
    assert consistency_cosine(student, 3 * student.flip(0)).item() == pytest.approx(0, abs=1e-12)
    assert consistency_cosine(student, -student.flip(0)).item() == pytest.approx(4)


def test_gram_by_hand():
    """One bin per view, along different axes: the Gram matrices differ by 1 and -1 in two of the 9 entries."""
    student, teacher = torch.zeros(2, 1, 1, 3), torch.zeros(2, 1, 1, 3)
    student[..., 0], teacher[..., 2] = 5.0, 0.1
    assert consistency_gram(student, teacher).item() == pytest.approx(2 / 9)


def test_gram_sees_channels_not_places():
    student, _ = pair(2, 2, 5, 9)
    assert consistency_gram(student, student.flip(0)[:, :, [3, 0, 4, 1, 2]]).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("shape", [(2, 2, 40, 96), (2, 2, 96, 40)])
@pytest.mark.parametrize("closeness", [1.0, 1e-2, 1e-4])
def test_gram_keeps_its_precision_when_the_branches_agree(shape, closeness):
    """In float32 the difference of squared norms would be off by 100 % at 1e-4."""
    student, noise = pair(*shape, dtype=torch.float32)
    teacher = (student + closeness * noise).flip(0)
    expected = slow_gram(student.double(), teacher.double())
    # At 1e-4 what remains is the rounding of the normalised vectors themselves.
    found = consistency_gram(student, teacher).double()
    torch.testing.assert_close(found, expected, rtol=1e-5 + 1e-7 / closeness, atol=0)


# --- NT-Xent


def slow_nt_xent(student, teacher, temperature):
    """Vectors are named (branch, view, item)."""
    vectors = {}
    for branch, tensor in enumerate((student, teacher.detach())):
        for view in range(2):
            for item in range(tensor.shape[1]):
                vectors[branch, view, item] = tensor[view, item] / tensor[view, item].norm()
    terms = []
    for (branch, view, item), anchor in vectors.items():
        positive = torch.exp(anchor @ vectors[1 - branch, 1 - view, item] / temperature)
        negatives = [torch.exp(anchor @ v / temperature) for (_, _, other), v in vectors.items() if other != item]
        assert len(negatives) == 2 * student.shape[1] + 2 * teacher.shape[1] - 4
        terms.append(-torch.log(positive / (positive + sum(negatives))))
    assert len(terms) == 4 * student.shape[1]
    return sum(terms) / len(terms)


def slow_nt_xent_bins(student, teacher, temperature):
    width = student.shape[-1]
    return slow_nt_xent(student.reshape(2, -1, width), teacher.reshape(2, -1, width), temperature)


NT_XENT = [
    (nt_xent, slow_nt_xent, (2, 4, 6)),
    (nt_xent_bins, slow_nt_xent_bins, (2, 2, 3, 5)),
    (nt_xent_bins, slow_nt_xent_bins, (2, 1, 4, 3)),
]


@pytest.mark.parametrize(("loss", "slow", "shape"), NT_XENT)
@pytest.mark.parametrize("temperature", [0.5, 0.1])
@pytest.mark.parametrize("block", [2**23, 1, 17])
def test_nt_xent_equals_slow_loops(loss, slow, shape, temperature, block, monkeypatch):
    monkeypatch.setattr(losses, "_BLOCK", block)
    student, teacher = pair(*shape)
    torch.testing.assert_close(loss(student, teacher, temperature), slow(student, teacher, temperature))
    expected = gradient(slow, student, teacher, temperature)
    torch.testing.assert_close(gradient(loss, student, teacher, temperature), expected)


def test_nt_xent_by_hand():
    """Two cases at right angles, every case's vectors equal: each anchor has its positive at 1, four negatives at 0."""
    student = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]] * 2)
    assert nt_xent(student, student, 0.5).item() == pytest.approx(math.log(1 + 4 * math.exp(-2)))
    apart = torch.tensor([[[2.0, 0.0], [-3.0, 0.0]]] * 2)  # as far apart as cases can be: the lower bound
    assert nt_xent(apart, apart, 0.5).item() == pytest.approx(math.log(1 + 4 * math.exp(-4)))
    assert nt_xent_bins(apart[:, None], apart[:, None], 0.5).item() == pytest.approx(math.log(1 + 4 * math.exp(-4)))


@pytest.mark.parametrize("angle", [0.3, 2.0])
def test_nt_xent_leaves_the_other_two_vectors_of_a_case_out(angle):
    """Cases in planes at right angles: negatives are 0 whatever happens within a plane. Turning one positive pair
    against the other changes only similarities that are left out."""
    student, teacher = torch.zeros(2, 2, 4, dtype=torch.float64), torch.zeros(2, 2, 4, dtype=torch.float64)
    for case in range(2):
        student[:, case, 2 * case : 2 * case + 2], teacher[:, case, 2 * case : 2 * case + 2] = pair(2, 2, seed=case)
    turn = torch.eye(4, dtype=torch.float64)
    turn[:2, :2] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    turned_student, turned_teacher = student.clone(), teacher.clone()
    turned_student[0, 0], turned_teacher[1, 0] = turn @ student[0, 0], turn @ teacher[1, 0]
    expected = nt_xent(student, teacher, 0.5)
    torch.testing.assert_close(nt_xent(turned_student, turned_teacher, 0.5), expected)
    broken = teacher.clone()
    broken[1, 0] = turned_teacher[1, 0]  # turning a positive alone does change it
    assert not torch.isclose(nt_xent(student, broken, 0.5), expected, rtol=1e-3)


def test_nt_xent_wants_two_cases():
    with pytest.raises(ValueError, match="nt_xent: expected at least 2 cases over all ranks, found 1"):
        nt_xent(*pair(2, 1, 4), 0.5)
    with pytest.raises(ValueError, match="nt_xent_bins: expected at least 2 bins over all ranks, found 1"):
        nt_xent_bins(*pair(2, 1, 1, 4), 0.5)


# --- what holds for all that compare views

VIEWS = {
    "cosine": (consistency_cosine, (2, 3, 4, 6), ()),
    "gram": (consistency_gram, (2, 3, 4, 6), ()),
    "nt_xent": (nt_xent_bins, (2, 3, 4, 6), (0.5,)),
    "image": (nt_xent, (2, 3, 6), (0.5,)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_gradient_only_for_the_student(name):
    loss, shape, rest = VIEWS[name]
    student, teacher = (x.requires_grad_() for x in pair(*shape))
    loss(student, teacher, *rest).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


@pytest.mark.parametrize("name", VIEWS)
def test_swapping_the_views_changes_nothing(name):
    loss, shape, rest = VIEWS[name]
    student, teacher = pair(*shape)
    torch.testing.assert_close(loss(student.flip(0), teacher.flip(0), *rest), loss(student, teacher, *rest))


@pytest.mark.parametrize("name", VIEWS)
def test_compares_a_view_with_the_other_one(name):
    """Agreement of the student's view with the teacher's other view is better than with the teacher's same view."""
    loss, shape, rest = VIEWS[name]
    student, _ = pair(*shape)
    assert loss(student, student.flip(0), *rest) < loss(student, student, *rest)


@pytest.mark.parametrize("name", VIEWS)
def test_length_of_vectors_does_not_matter(name):
    loss, shape, rest = VIEWS[name]
    student, teacher = pair(*shape)
    torch.testing.assert_close(loss(100 * student, teacher / 100, *rest), loss(student, teacher, *rest))


@pytest.mark.parametrize("name", VIEWS)
def test_float32_whatever_autocast_says(name):
    loss, shape, rest = VIEWS[name]
    student, teacher = pair(*shape, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, low = loss(student, teacher, *rest), loss(student.bfloat16(), teacher.bfloat16(), *rest)
    assert low.dtype == torch.float32
    assert torch.equal(found, loss(student, teacher, *rest))
    assert torch.equal(low, loss(student.bfloat16().float(), teacher.bfloat16().float(), *rest))


def test_reconstruction_is_float32_whatever_autocast_says():
    prediction, target = pair(2, 3, 2, 4, 3, dtype=torch.float32)
    inside = torch.ones(2, 1, 2, 4, 3, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = reconstruction_loss(prediction.bfloat16(), target, None, inside)
    assert torch.equal(found, reconstruction_loss(prediction.bfloat16().float(), target, None, inside))


@pytest.mark.parametrize("name", ["cosine", "gram", "nt_xent"])
def test_consistency_by_name(name):
    loss, shape, rest = VIEWS[name]
    student, teacher = pair(*shape)
    assert torch.equal(consistency_loss(name, student, teacher, 0.5), loss(student, teacher, *rest))


@pytest.mark.parametrize("name", VIEWS)
def test_refuses_other_shapes(name):
    loss, shape, rest = VIEWS[name]
    student, teacher = pair(*shape)
    with pytest.raises(AssertionError, match="expected student and teacher of one shape, view-major"):
        loss(student, teacher[:, :-1], *rest)
    with pytest.raises(AssertionError, match="view-major"):
        loss(student.transpose(0, 1), teacher.transpose(0, 1), *rest)


# --- several processes

CASES = (1, 3)  # of rank 0 and 1


def _distributed_cases():
    """(block of similarities, loss of student and teacher, both of all cases along axis 1)."""
    for block in (2**23, 5):
        for loss, shape in ((nt_xent, (2, sum(CASES), 6)), (nt_xent_bins, (2, sum(CASES), 3, 5))):
            yield block, lambda s, t, loss=loss: loss(s, t, 0.5), pair(*shape)
            yield block, lambda s, t, loss=loss: loss(s, t, 0.5, _cases()), pair(*shape)
    for loss, bins in ((consistency_cosine, 3), (consistency_gram, 3), (consistency_gram, 9)):
        yield 2**23, loss, pair(2, sum(CASES), bins, 5)
    yield 2**23, _reconstruction, pair(2, sum(CASES), 1, 4, 3, 5)


def _cases():
    """What a training knows without asking the ranks."""
    return CASES if dist.is_initialized() else None


def _reconstruction(prediction, target):
    """Of views; what is hidden follows from the target, so that ranks hide different numbers of voxels."""
    prediction, target = prediction.flatten(0, 1), target.flatten(0, 1)
    return reconstruction_loss(prediction, target, target > 0.3, target < 2)


def _rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    mine = slice(sum(CASES[:rank]), sum(CASES[: rank + 1]))
    found = []
    for block, loss, vectors in _distributed_cases():
        losses._BLOCK = block
        student, teacher = (v[:, mine].clone() for v in vectors)
        student.requires_grad_()
        value = loss(student, teacher)
        value.backward()
        found.append((value.detach(), student.grad))
    message = ""
    try:
        nt_xent(*pair(2, 1 - rank, 4), 0.5)  # one case in all
    except ValueError as e:
        message = str(e)
    torch.save({"found": found, "message": message}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    """The mean over ranks of the losses, and DDP's mean of the gradients, are those of one process with all cases."""
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for n, (_, loss, (student, teacher)) in enumerate(_distributed_cases()):
        values, gradients = zip(*(r["found"][n] for r in ranks), strict=True)
        torch.testing.assert_close(torch.stack(values).mean(), loss(student, teacher))
        expected = gradient(loss, student, teacher)
        torch.testing.assert_close(torch.cat(gradients, dim=1) / 2, expected)
    for r in ranks:
        assert "nt_xent: expected at least 2 cases over all ranks, found 1" in r["message"]
