"""What a number of a pretraining would be if nothing about anatomy had been learned: the null beside each.

alignment       student's prediction of view 0 against the teacher's bins of view 1. Nulls: the teacher's bins at the same place
                in the view of *another case*; of white noise; at another place of the *same case*; a regression that is told the
                bin's place in view 1 and nothing else
retrieval       top-1 among the bins of the other view. Null: a regression that is told the bin's place in view 0, nothing else
contrastive     the loss. Null: log(4B - 3)
reconstruction  the loss. Null: the mean of the visible voxels
features        the encoder's standardised features, what fine-tuning gets, on views mirrored and scaled independently whatever
                the recipe does. Nulls: the same place in another case, another place in the same case
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from light import CPU, Recipe, autocast, network, swapped
from torch import Tensor
from torch.nn.functional import normalize

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.model.branches import Student, Teacher, make_backbone
from nnunetv2_cva.training.metrics import pair_metrics, standardised
from nnunetv2_cva.training.objective import Prepared, by_view, objective, prepare
from nnunetv2_cva.views.loader import Cases, PairDataset

FIT, SEED = 32, 11  # cases of the regression on places; of everything drawn here


@torch.no_grad()
def nulls(
    recipe: Recipe, states: dict[str, dict[str, Tensor]], cases: Cases, seen: list[str], test: list[str]
) -> dict[str, float]:
    """Every number and its null, on cases that were not pretrained on. ``seen``: where the regressions are fitted."""
    config = recipe.config(0)
    student = Student(make_backbone(network(recipe.widths, 1, 0), config), config).eval()
    student.load_state_dict(states["student"])
    pairs = replace(config, consistency_weight=1.0, mask_ratio=0.0)  # two views also for recipes that train on one
    batch = _views(recipe, config, cases, test, student)
    with autocast():
        found = _features(recipe, replace(pairs, spatial="independent"), cases, test, student)
        teacher = None
        if config.needs_heads:
            teacher = Teacher(student).eval()
            teacher.load_state_dict(states["teacher"])
        losses = _losses(student, teacher, batch, config)
        if teacher is not None and config.consistency_weight > 0:
            views = [_views(recipe, pairs, cases, keys, student) for keys in (test, seen[:FIT])]
            found.update(_bins(student, teacher, *views))
    return {name: round(value, 4) for name, value in {**found, **losses}.items()}


def _views(recipe: Recipe, config: CVAConfig, cases: Cases, keys: list[str], student: Student) -> Prepared:
    batch = PairDataset(cases, keys, recipe.view, config, len(keys), (0, len(keys)), SEED)[0]
    return prepare(swapped(batch) if recipe.misaligned else batch, config, student.backbone.block, CPU, SEED)


def _bins(student: Student, teacher: Teacher, test: Prepared, fit: Prepared) -> dict[str, float]:
    mine = by_view(student(test.views, None, test.rois)["bins"]).float()[0]
    theirs = by_view(teacher(test.views, test.rois)["bins"]).float()[1]
    found = pair_metrics(mine, theirs)
    for name, views in (("another case", _other_cases(test.views)), ("noise", torch.randn_like(test.views))):
        found[f"alignment, {name}"] = _cosine(mine, by_view(teacher(views, test.rois)["bins"]).float()[1])
    found["alignment, same case"] = _cosine(mine, theirs[:, torch.randperm(theirs.shape[1])])
    targets = by_view(teacher(fit.views, fit.rois)["bins"]).float()[1]
    told = [_regression(by_view(fit.rois)[v], targets, by_view(test.rois)[v], student.bins) for v in (0, 1)]
    return {**found, "alignment, place": _cosine(told[1], theirs), "retrieval, place": pair_metrics(told[0], theirs)["retrieval"]}


def _features(recipe: Recipe, config: CVAConfig, cases: Cases, keys: list[str], student: Student) -> dict[str, float]:
    batch = _views(replace(recipe, misaligned=False), config, cases, keys, student)
    first, second = by_view(student.features(batch.views, batch.rois))
    other = by_view(student.features(_other_cases(batch.views), batch.rois))[1]
    both = standardised(torch.cat([first, second, other]))
    first, second, other = both.unflatten(0, (3, -1))
    found = {f"features {name}": value for name, value in pair_metrics(first, second).items()}
    found["features alignment, another case"] = _cosine(first, other)
    return {**found, "features alignment, same case": _cosine(first, second[:, torch.randperm(second.shape[1])])}


def _losses(student: Student, teacher: Teacher | None, batch: Prepared, config: CVAConfig) -> dict[str, float]:
    said = student(batch.visible, batch.mask, batch.rois)
    taught = {} if teacher is None else teacher(batch.views, batch.rois)
    found = {name: value.item() for name, value in objective(said, taught, batch, config).items() if name != "total"}
    if "reconstruction" in found:
        seen = batch.inside & ~batch.hidden  # type: ignore[operator]
        mean = (batch.views * seen).flatten(2).sum(2) / seen.flatten(2).sum(2).clamp_min(1)
        constant = mean[..., None, None, None].expand_as(batch.views)
        alone = replace(config, consistency_weight=0.0, contrastive_weight=0.0)
        found["reconstruction, mean"] = objective({"reconstruction": constant}, {}, batch, alone)["reconstruction"].item()
    if "contrastive" in found:
        found["contrastive, chance"] = math.log(4 * (len(batch.views) // 2) - 3)
    return found


def _other_cases(views: Tensor) -> Tensor:
    """View-major views with every case's in the place of the next one's."""
    return by_view(views).roll(1, dims=1).flatten(0, 1)


def _cosine(first: Tensor, second: Tensor) -> float:
    return (normalize(first, dim=-1) * normalize(second, dim=-1)).sum(-1).mean().item()


def _regression(fit: Tensor, targets: Tensor, test: Tensor, bins: tuple[int, int, int], waves: int = 400) -> Tensor:
    """Ridge regression of unit vectors on places in the view, by random waves. ``fit``, ``test``: rois (B, 2, 3)."""
    generator = torch.Generator().manual_seed(SEED)
    direction = torch.randn(3, waves, generator=generator) * 4
    phase = torch.rand(waves, generator=generator) * 2 * math.pi

    def waved(rois: Tensor) -> Tensor:
        steps = [(torch.arange(n) + 0.5) / n for n in bins]
        grid = torch.stack(torch.meshgrid(*steps, indexing="ij"), -1).flatten(0, 2)
        place = rois[:, None, 0] + grid * (rois[:, None, 1] - rois[:, None, 0])
        return torch.cat([torch.cos(place.float() @ direction + phase), torch.ones(*place.shape[:2], 1)], -1)

    x, y = waved(fit).flatten(0, 1), normalize(targets, dim=-1).flatten(0, 1)
    weights = torch.linalg.solve(x.T @ x + 1e-2 * len(x) / waves * torch.eye(waves + 1), x.T @ y)
    return waved(test) @ weights


def with_nulls(found: dict[str, float], name: str) -> str:
    """A number and, in brackets, its nulls."""
    nulls = [f"{key.split(', ')[1]} {value:.2f}" for key, value in found.items() if key.startswith(f"{name}, ")]
    return f"{found[name]:.2f} ({', '.join(nulls)})"
