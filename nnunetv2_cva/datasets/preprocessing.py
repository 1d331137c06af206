"""The planned images into nnU-Net's preprocessed format."""

from __future__ import annotations

from dataclasses import dataclass

from nnunetv2_cva.datasets import destination
from nnunetv2_cva.datasets.destination import Destination, Storage
from nnunetv2_cva.datasets.inventory import CASES, REJECTED, read_accepted
from nnunetv2_cva.datasets.next_steps import CONFIGURATION, PLANS
from nnunetv2_cva.datasets.nnunet_plans import volume_configuration
from nnunetv2_cva.datasets.parallel import Progress
from nnunetv2_cva.datasets.planning import planned
from nnunetv2_cva.datasets.preprocess_case import preprocess
from nnunetv2_cva.datasets.user_changes import replaced
from nnunetv2_cva.nnunet import PRETRAINING
from nnunetv2_cva.views.index import INDEX


@dataclass(frozen=True)
class PreprocessRequest:
    """What to preprocess: of the cases of ``dataset`` part ``part`` of ``parts`` (for jobs that share the work)."""

    dataset: str
    plans: str = PLANS
    configuration: str = CONFIGURATION + PRETRAINING
    part: int = 0
    parts: int = 1
    storage: Storage = "float32"
    processes: int = 8


@dataclass(frozen=True)
class Preprocessed:
    """What there is to say, line by line, and how many cases ``failed``."""

    said: tuple[str, ...]
    failed: int = 0


def preprocess_dataset(request: PreprocessRequest, progress: Progress) -> Preprocessed:
    """Preprocess what is missing. Can be killed and repeated.

    Raises:
        ValueError: nothing planned, no such part, cases made with other settings, no room or no way to write.
    """
    r = request
    if not 0 <= r.part < r.parts:
        expected = f"a part from 0 to {r.parts - 1}" if r.parts > 0 else "`parts=1` or more"
        raise ValueError(f"`part={r.part}` `parts={r.parts}`: expected {expected}.")
    folder, plans = planned(r.dataset, r.plans)
    volume_configuration(plans, r.configuration)
    to = Destination(folder, plans, r.configuration, r.storage)
    if not (folder / CASES).is_file() and (to.folder / INDEX).is_file():
        return Preprocessed((f"{folder.name} uses preprocessed data where it lies: nothing to do.",))
    cases = read_accepted(folder)
    part = cases[r.part :: r.parts]
    destination.prepare(to, cases)
    todo = destination.missing(to, part)
    size = destination.needed_bytes(to, todo) / 2**30
    preprocess(to, todo, r.processes, progress, f"Preprocessing {len(todo)} of {len(part)} cases, about {size:.2g} GB")
    done = destination.finish(to)
    if done is None:
        missing = len(destination.missing(to, cases))
        return Preprocessed((f"{missing} of {len(cases)} cases are still missing: those of the other parts.",))
    said = [f"{done.ready} cases are ready in {to.folder}."]
    if done.splits_kept:
        said.append(replaced(done.splits_kept))
    if done.failed:
        said.append(f"{done.failed} cases could not be preprocessed; {folder / REJECTED} has the reasons.")
    return Preprocessed(tuple(said), done.failed)
