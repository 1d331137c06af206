"""Batch normalisation and the MLPs; over two processes they equal one."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from nnunetv2_cva.model.heads import BatchNormalise, Predictor, Projector


@pytest.mark.parametrize("training", [True, False])
def test_columns_have_mean_0_and_variance_1_in_training_and_evaluation(training):
    rows = torch.randn(50, 7) * torch.logspace(-1, 3, 7) + torch.logspace(4, -2, 7)
    found = BatchNormalise().train(training)(rows)
    # float32 at 1e4 has steps of 1e-3, and the mean is off by a few of them: a few hundredths of the spread, 0.1.
    torch.testing.assert_close(found.mean(0), torch.zeros(7), rtol=0, atol=5e-2)
    torch.testing.assert_close(found.var(0, unbiased=False), torch.ones(7), rtol=1e-2, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_equals_torch_without_affine_and_running_statistics(training):
    theirs = nn.BatchNorm1d(5, affine=False, track_running_stats=False).double().train(training)
    ours = BatchNormalise().train(training)
    rows, weights = torch.randn(2, 6, 5, dtype=torch.float64)
    a, b = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    found, expected = ours(a), theirs(b)
    torch.testing.assert_close(found, expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    assert torch.autograd.gradcheck(ours, rows.clone().requires_grad_())


def test_holds_nothing():
    assert not BatchNormalise().state_dict() and not list(BatchNormalise().buffers())


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_float32_under_autocast(low):
    rows = torch.randn(64, 6).add(100)
    with torch.autocast("cpu", dtype=low):
        found, rounded = BatchNormalise()(rows), BatchNormalise()(rows.to(low))
    assert found.dtype == rounded.dtype == torch.float32
    assert torch.equal(found, BatchNormalise()(rows))
    assert torch.equal(rounded, BatchNormalise()(rows.to(low).float()))


def test_one_row_has_no_statistics():
    with pytest.raises(ValueError, match="at least 2 rows over all ranks, found 1"):
        BatchNormalise()(torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"expected rows \(M, D\), found \(2, 3, 4\)"):
        BatchNormalise()(torch.zeros(2, 3, 4))


def test_projector_and_predictor_are_as_published():
    projector, predictor = Projector(11, 24), Predictor(24, 6)
    kinds = [type(m).__name__ for m in projector.layers]
    assert kinds == ["Linear", "BatchNormalise", "SiLU"] * 2 + ["Linear", "BatchNormalise"]
    assert [type(m).__name__ for m in predictor.layers] == ["Linear", "BatchNormalise", "SiLU", "Linear"]
    assert [tuple(p.shape) for p in projector.parameters()] == [(24, 11), (24, 24), (24, 24)]
    assert [tuple(p.shape) for p in predictor.parameters()] == [(6, 24), (24, 6), (24,)]
    widths = [m.out_features for m in (*Projector(9).layers, *Predictor().layers) if isinstance(m, nn.Linear)]
    assert widths == [2048, 2048, 2048, 512, 2048]


def test_equals_the_layers_written_out():
    projector, predictor = Projector(5, 8).double(), Predictor(8, 3).double()
    rows = torch.randn(7, 5, dtype=torch.float64)

    def normalise(x):
        return (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()

    first, second, third = projector.parameters()
    x = normalise(rows @ first.T)
    x = normalise((x * x.sigmoid()) @ second.T)
    x = normalise((x * x.sigmoid()) @ third.T)
    torch.testing.assert_close(projector(rows), x)
    first, second, bias = predictor.parameters()
    y = normalise(x @ first.T)
    torch.testing.assert_close(predictor(x), (y * y.sigmoid()) @ second.T + bias)


def test_linear_weights_start_with_deviation_002():
    for module in (Projector(300, 256), Predictor(512, 256)):
        for name, p in module.named_parameters():
            if name.endswith("bias"):
                assert not p.any()
            else:
                assert abs(p.std().item() - 0.02) < 4e-4 and abs(p.mean().item()) < 4e-4


def test_autocast_gives_gradients_and_float32_embeddings():
    projector, predictor, rows = Projector(12, 16), Predictor(16, 8), torch.randn(10, 12, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embedded = projector(rows)
        guess = predictor(embedded)
    assert embedded.dtype == torch.float32
    guess.float().square().sum().backward()
    for p in (*projector.parameters(), *predictor.parameters(), rows):
        assert p.grad.isfinite().all() and p.grad.any()


def test_traces_without_a_break():
    projector, rows = Projector(5, 8), torch.randn(6, 5)
    traced = torch.compile(projector, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(rows), projector(rows))


ROWS = (3, 1)  # of rank 0 and 1


def _model():
    torch.manual_seed(0)
    return nn.Sequential(Projector(4, 6), Predictor(6, 5)).double(), torch.randn(2, sum(ROWS), 6, dtype=torch.float64)


def _step(model, rows, weights):
    """Outputs, gradient of the rows and of the parameters of a loss that is a sum over rows."""
    rows = rows[:, :4].clone().requires_grad_()
    out = model(rows)
    (out * weights).sum().backward()
    return [out.detach(), rows.grad, *[p.grad for p in model.parameters()]]


def _rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    model, (rows, weights) = _model()
    mine = slice(sum(ROWS[:rank]), sum(ROWS[: rank + 1]))
    found = _step(model, rows[mine], weights[mine])
    far = BatchNormalise()(rows[mine].float() + 1e4)
    message = ""
    try:
        BatchNormalise()(rows[: 1 - rank])  # one row in all
    except ValueError as e:
        message = str(e)
    torch.save({"found": found, "far": far, "message": message}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    model, (rows, weights) = _model()
    out, rows_gradient, *gradients = _step(model, rows, weights)
    torch.testing.assert_close(torch.cat((first["found"][0], second["found"][0])), out)
    torch.testing.assert_close(torch.cat((first["found"][1], second["found"][1])), rows_gradient)
    for a, b, expected in zip(first["found"][2:], second["found"][2:], gradients, strict=True):
        torch.testing.assert_close(a + b, expected)
    torch.testing.assert_close(torch.cat((first["far"], second["far"])), BatchNormalise()(rows.float() + 1e4))
    for found in (first, second):
        assert "at least 2 rows over all ranks, found 1" in found["message"]
