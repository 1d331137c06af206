"""Whether a pretraining, or one that it was started from, has seen the test cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nnunetv2_cva import nnunet
from nnunetv2_cva.comparing.design import Design
from nnunetv2_cva.datasets.inventory import CASES, read_accepted
from nnunetv2_cva.datasets.leakage import Unknown, by_voxels, folds_of
from nnunetv2_cva.datasets.parallel import Progress
from nnunetv2_cva.datasets.targets import FineTuned
from nnunetv2_cva.transfer.card import entry
from nnunetv2_cva.transfer.read import Source


def split(design_fold: int, target: FineTuned, cases: Sequence[str]) -> tuple[list[str], list[str]]:
    """From which cases labelled ones are drawn, and the test cases: nnU-Net's split of this fold, of ``cases``.

    Raises:
        ValueError: no such fold; or a case of it is not preprocessed.
    """
    try:
        folds = folds_of(target, cases)
    except Unknown as e:
        raise ValueError(f"{target.name} cannot be split into labelled and test cases: {e}") from None
    if not 0 <= design_fold < len(folds):
        raise ValueError(f"`fold={design_fold}`: {target.name} has the folds 0 to {len(folds) - 1}.")
    training, test = folds[design_fold]
    missing = sorted({*training, *test} - set(cases))
    if missing:
        raise ValueError(
            f"{len(missing)} cases of fold {design_fold} of {target.name} are not preprocessed, {missing[0]} is one."
        )
    return sorted(training), sorted(test)


def check(source: Source, target: FineTuned, design: Design, cases: Sequence[str], processes: int, progress: Progress) -> str:
    """What is known about the pretraining of ``source``, and of whatever it was started from, and the test cases, in words.

    ``cases``: all of the target that are preprocessed with labels, from which ``split`` has made folds.

    Raises:
        ValueError: it has seen some of them.
    """
    clean: list[str] = []
    unknown: list[str] = []
    for stage in _stages(source):
        try:
            seen, how = _seen(stage, target, design, cases, processes, progress)
        except Unknown as e:
            unknown.append(f"WARNING: could not check whether {stage.name} was pretrained on test cases: {e}")
            continue
        if seen:
            raise ValueError(
                f"{source.path}: {stage.name} was pretrained on {len(seen)} of {len(design.test)} test cases "
                f"({', '.join(seen[:3])}{', ...' if len(seen) > 3 else ''}; {how}): results on them would not be ones on "
                f"unseen images. Pretrain without the validation cases of fold {design.fold}, or choose a `fold` whose cases "
                "it has not seen."
            )
        clean.append(f"by {stage.name} {how}" if clean else how)
    return " ".join(unknown) if unknown else f"No test case was pretrained on, {'; nor '.join(clean)}."


@dataclass(frozen=True)
class _Stage:
    """A training that the weights come from, by ``name``; the dataset and the fold of which are not always recorded."""

    name: str
    dataset: Any
    fold: Any


def _stages(source: Source) -> list[_Stage]:
    """The training that wrote the file, what it was started from, what that was started from, as far as it is recorded."""
    card = source.card
    stages = [_Stage(source.path.name, entry(card, "dataset").get("name"), card.get("fold"))]
    while card.get("started_from"):
        card = entry(card, "started_from")
        trainer = f" of {card['trainer']}" if card.get("trainer") else ""  # most files have one name
        name = f"{card.get('file', 'a file without a name')}{trainer}, a start of {source.path.name},"
        stages.append(_Stage(name, card.get("dataset"), card.get("fold")))
    return stages


def _seen(
    stage: _Stage, target: FineTuned, design: Design, cases: Sequence[str], processes: int, progress: Progress
) -> tuple[list[str], str]:
    """The test cases that a training has seen, and how that was found. Raises Unknown."""
    folder = nnunet.folder(nnunet.PREPROCESSED) / str(stage.dataset)
    listed = isinstance(stage.dataset, str) and (folder / CASES).is_file()
    if listed:
        folds = by_voxels(target, read_accepted(folder), folder, processes, progress)
        there = {case for fold in folds for case in fold.cases}  # without splits_final.json folds of raw images may be others
        seen, held_out = sorted(there & set(design.test)), folds[design.fold]
        if held_out.missing and not seen:
            raise Unknown(f"{held_out.missing} of {held_out.total} of their images were not found in nnUNet_raw.")
        return seen, f"voxel by voxel with the cases of {stage.dataset}"
    if stage.dataset == design.dataset:
        return _by_split(stage.fold, target, design, cases), "by the split of its own training"
    raise Unknown("the cases that it was made of are not listed here.")


def _by_split(fold: Any, target: FineTuned, design: Design, cases: Sequence[str]) -> list[str]:
    """Test cases among those that a training on ``fold`` of the same dataset had. Raises Unknown."""
    if fold == "all":
        return sorted(design.test)
    if not str(fold).isdigit():
        raise Unknown("its file does not say on which fold of this dataset it was trained.")
    folds = folds_of(target, cases)
    if int(str(fold)) >= len(folds):
        raise Unknown(f"it was trained on fold {fold}, which this dataset no longer has.")
    return sorted(set(folds[int(str(fold))][0]) & set(design.test))
