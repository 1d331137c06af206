"""Whether a pretraining has seen the test cases."""

from __future__ import annotations

from collections.abc import Sequence

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


def check(source: Source, target: FineTuned, design: Design, processes: int, progress: Progress) -> str:
    """What is known about the pretraining of ``source`` and the test cases, in words.

    Raises:
        ValueError: it has seen some of them.
    """
    name = entry(source.card, "dataset").get("name")
    folder = nnunet.folder(nnunet.PREPROCESSED) / str(name)
    try:
        if name == design.dataset and not (folder / CASES).is_file():
            seen, how = _by_split(source, target, design), "by the split of its own training"
        elif isinstance(name, str) and (folder / CASES).is_file():
            held_out = by_voxels(target, read_accepted(folder), folder, processes, progress)[design.fold]
            if held_out.missing:
                raise Unknown(f"{held_out.missing} of {held_out.total} of their images were not found in nnUNet_raw.")
            seen, how = list(held_out.cases), f"voxel by voxel with the cases of {name}"
        else:
            raise Unknown("the cases that it was made of are not listed here.")
    except Unknown as e:
        return f"WARNING: could not check whether {source.path.name} was pretrained on test cases: {e}"
    if seen:
        raise ValueError(
            f"{source.path} was pretrained on {len(seen)} of {len(design.test)} test cases ({', '.join(seen[:3])}"
            f"{', ...' if len(seen) > 3 else ''}; {how}): results on them would not be ones on unseen images. Pretrain without "
            f"the validation cases of fold {design.fold}, or choose a `fold` whose cases it has not seen."
        )
    return f"No test case was pretrained on, {how}."


def _by_split(source: Source, target: FineTuned, design: Design) -> list[str]:
    """Test cases among those that a training on the same dataset had."""
    fold = source.card.get("fold")
    if fold == "all":
        return sorted(design.test)
    if not str(fold).isdigit():
        raise Unknown("its file does not say on which fold of this dataset it was trained.")
    folds = folds_of(target, [*design.training, *design.test])
    if int(str(fold)) >= len(folds):
        raise Unknown(f"it was trained on fold {fold}, which this dataset no longer has.")
    return sorted(set(folds[int(str(fold))][0]) & set(design.test))
