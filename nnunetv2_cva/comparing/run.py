"""A comparison from what is asked to what is found. Whatever is finished is kept: the same request goes on after it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2_cva import nnunet
from nnunetv2_cva.comparing.arms import Arm, digest, named
from nnunetv2_cva.comparing.design import SCRATCH, CompareRequest, Design, Job, jobs, settings_hash
from nnunetv2_cva.comparing.job import Result, Task, finished, perform
from nnunetv2_cva.comparing.picture import write_curves
from nnunetv2_cva.comparing.report import as_plain, compare, score, sentences, table
from nnunetv2_cva.comparing.unseen import check, split
from nnunetv2_cva.datasets.parallel import Progress, for_each
from nnunetv2_cva.datasets.targets import FineTuned
from nnunetv2_cva.files import write_json
from nnunetv2_cva.seeding import stream
from nnunetv2_cva.transfer.export import Output, Place, Weights, export
from nnunetv2_cva.transfer.hub import located
from nnunetv2_cva.transfer.read import read
from nnunetv2_cva.transfer.target import Target, find_target

JSON, PICTURE = "compare.json", "curves.png"


@dataclass(frozen=True)
class TimeLeft:
    """``finished`` of ``total`` trainings that were to be done now, and how long the rest will take, in seconds."""

    finished: int
    total: int
    remaining: float


@dataclass(frozen=True)
class Compared:
    """``unfinished``: trainings, of all parts; ``table`` is empty and ``sentences`` are none while no pair is finished."""

    folder: Path
    table: str
    sentences: tuple[str, ...]
    unfinished: int


def run(
    request: CompareRequest, say: Callable[[str], Any], progress: Progress, trained: Callable[[Result, TimeLeft], Any]
) -> Compared:
    """Train what is not trained yet, of this part; write compare.json and the picture of all that is finished.

    ``say``: is told what was found out before; ``progress``: of reading images; ``trained``: of every training.

    Raises:
        ValueError: anything that cannot be compared; test cases that were pretrained on; a training whose process was killed.
    """
    request.check()
    names = named(request.weights)
    target = find_target(request.dataset, request.configuration, request.plans, request.trainer)
    design = _design(request, target)
    folder = Path(request.folder) if request.folder else _usual_folder(target)
    design.keep(folder)
    say(
        f"{target.label}: {len(design.test)} test cases, labelled cases from {len(design.training)} others, "
        f"{len(jobs([SCRATCH, *names], request.labels, request.seeds))} trainings; results go to {folder}"
    )
    arms = [
        Arm(SCRATCH),
        *(_prepared(n, f, design, target, folder, request, say, progress) for n, f in zip(names, request.weights)),
    ]
    by_name = {a.name: a for a in arms}
    every = [_task(job, by_name, design, folder, request.device) for job in jobs([*by_name], request.labels, request.seeds)]
    mine = {job.name for job in jobs([*by_name], request.labels, request.seeds, request.part, request.parts)}
    todo = [task for task in every if task.job.name in mine and finished(task) is None]
    _train(todo, request.processes, trained)
    return _report(every, arms, design, request, folder)


def _usual_folder(target: Target) -> Path:
    """Beside nnU-Net's own results of the dataset."""
    name = f"cva_compare__{target.plans['plans_name']}__{target.configuration}"
    return nnunet.folder(nnunet.RESULTS) / target.plans["dataset_name"] / name


def _fine_tuned(target: Target) -> FineTuned:
    name = target.plans["dataset_name"]
    return FineTuned(name, nnunet.folder(nnunet.PREPROCESSED) / name, target.dataset_json, target.plans)


def _labelled(target: Target) -> list[str]:
    """All preprocessed cases with labels. Raises ValueError where there are none."""
    data = _fine_tuned(target).folder / target.settings["data_identifier"]
    cases = sorted(p.name.removesuffix("_seg.b2nd") for p in data.glob("*_seg.b2nd"))
    if not cases:
        raise ValueError(f"No preprocessed cases with labels in {data}. nnUNetv2_preprocess makes them.")
    return cases


def _design(request: CompareRequest, target: Target) -> Design:
    """Raises ValueError where cases are missing or too few."""
    fine_tuned = _fine_tuned(target)
    training, test = split(request.fold, fine_tuned, _labelled(target))
    if request.test is not None and request.test < len(test):
        test = [test[n] for n in sorted(stream("compared test cases").choice(len(test), request.test, replace=False))]
    if max(request.labels) > len(training):
        raise ValueError(f"`labels`: fold {request.fold} has {len(training)} training cases, found {max(request.labels)}.")
    return Design(
        fine_tuned.name,
        target.configuration,
        target.plans["plans_name"],
        target.trainer.__name__,
        settings_hash(target.settings),
        request.iterations,
        request.points,
        request.fold,
        tuple(training),
        tuple(test),
    )


def _prepared(
    name: str,
    file: str,
    design: Design,
    target: Target,
    folder: Path,
    request: CompareRequest,
    say: Callable[[str], Any],
    tell: Progress,
) -> Arm:
    """The file made for the target by ``export``, as a user would, once."""
    source = read(file)
    seen = check(source, _fine_tuned(target), design, _labelled(target), request.processes, tell)
    of, made = digest(located(file)), folder / "weights"
    weights = made / f"{name}_{of}.pth"
    if not weights.is_file():
        made.mkdir(parents=True, exist_ok=True)
        place = Place(request.dataset, request.configuration, request.plans, request.trainer)
        outcome = export("nnunet", Weights(file), place, Output(str(weights)))
        if outcome.refusal is not None:
            raise ValueError(f"{file}: {outcome.refusal}")
    say(f"{name}: {file} ({source.kind}). {seen}")
    return Arm(name, file, of, weights, seen)


def _task(job: Job, arms: dict[str, Arm], design: Design, folder: Path, device: str) -> Task:
    arm = arms[job.arm]
    return Task(job, design, folder, arm.weights, arm.digest, device)


def _train(todo: Sequence[Task], processes: int, trained: Callable[[Result, TimeLeft], Any]) -> None:
    began, count = time.monotonic(), 0

    def done(result: Result) -> None:
        nonlocal count
        count += 1
        trained(result, TimeLeft(count, len(todo), (time.monotonic() - began) / count * (len(todo) - count)))

    for_each(perform, todo, processes, done, _killed, lambda *_: None, "")


def _killed(task: Task) -> Result:
    raise ValueError(
        f"The training {task.job} was killed, for want of memory perhaps: fewer `processes` need less. The same command goes on "
        f"after what is finished; what nnU-Net printed is in {task.log}."
    )


def _report(every: Sequence[Task], arms: Sequence[Arm], design: Design, request: CompareRequest, folder: Path) -> Compared:
    results = [r for task in every if (r := finished(task)) is not None]
    scores = {r.task.job: score(r.points) for r in results}
    names, labels = [a.name for a in arms], request.labels
    found = compare(scores, names, labels, request.seeds)
    said = sentences(found, scores, labels)
    unfinished = len(every) - len(results)
    about = [{"name": a.name, "file": a.given, "sha256": a.digest, "test_cases": a.seen} for a in arms]
    write_json(folder / JSON, as_plain(design, about, scores, found, said, unfinished))
    if scores:
        write_curves(folder / PICTURE, scores, found, names, labels)
    return Compared(folder, table(found, scores, names, labels) if scores else "", said, unfinished)
