"""The trainer's data: which cases are trained on, which are kept back, whether they allow what is asked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.seeding import stream
from nnunetv2_cva.training.device import Share
from nnunetv2_cva.views.geometry import check_feasible, feasibility
from nnunetv2_cva.views.index import read_index, sampling_weights
from nnunetv2_cva.views.loader import Batches, Cases, PairDataset, check_cases, make_loader, worker_count


def open_cases(folder: str | Path) -> Cases:
    """The preprocessed cases in ``folder``.

    Raises:
        ValueError: there are none, or not in nnU-Net's blosc2 format.
    """
    folder = Path(folder)
    remedy = "Run nnUNetv2_cva preprocess (images alone) or nnUNetv2_plan_and_preprocess (labelled datasets) first."
    if not folder.is_dir():
        raise ValueError(f"No preprocessed data: {folder} does not exist. {remedy}")
    index = read_index(folder)
    if index is not None:
        return Cases(index.root, index.keys)
    keys = sorted(e.name[:-5] for e in os.scandir(folder) if e.name.endswith(".b2nd") and not e.name.endswith("_seg.b2nd"))
    if not keys:
        other = "It holds .npz files of an older nnU-Net: preprocess again. " if any(folder.glob("*.npz")) else ""
        raise ValueError(f"No preprocessed data: {folder} holds no .b2nd case. {other}{remedy}")
    return Cases(folder, keys)


class IndexedDataset(nnUNetDatasetBlosc2):
    """nnU-Net's dataset class for folders that may have an index: tells nnU-Net's splits which cases there are."""

    @staticmethod
    def get_identifiers(folder: str) -> list[str]:
        """From the index, else from the folder's listing."""
        return [str(key) for key in open_cases(folder).keys]


def evenly(keys: list[str], count: int) -> list[str]:
    """``count`` of the keys, evenly spread over the list: of several datasets not all from the first."""
    return [keys[i] for i in np.linspace(0, len(keys) - 1, min(count, len(keys))).astype(int)]


def keep_back(keys: list[str], count: int) -> tuple[list[str], list[str]]:
    """Training cases and up to ``count`` watched cases, at most a tenth of all: none of fewer than 10."""
    ordered = sorted(keys)
    watched = evenly(ordered, min(count, len(ordered) // 10))
    return [k for k in ordered if k not in set(watched)], watched


def check_folds(fold: int | str, dataset: str | Path, folder: str | Path) -> None:
    """That nnU-Net can cut the cases into five folds, which it does where there is no ``splits_final.json``.

    Raises:
        ValueError: too few cases.
    """
    cases = len(open_cases(folder))
    if cases < 5 and not (Path(dataset) / "splits_final.json").is_file():
        raise ValueError(
            f"Fold {fold}: expected at least 5 cases to make nnU-Net's five folds of, found {cases} in {folder}. "
            "Train on fold all."
        )


class TrainingData:
    """Batches of training cases and the watched pairs, which are always the same.

    ``training``, ``watched``: case names; without any to watch, pairs of training cases are watched, and ``say`` is told so.
    """

    def __init__(
        self,
        folder: str | Path,
        training: list[str],
        watched: list[str],
        channels: int,
        size: tuple[int, int, int],
        config: CVAConfig,
        share: Share,
        device_type: str,
        say: Callable[[str], None],
    ) -> None:
        self.size, self.config, self.share, self.device_type, self.say = size, config, share, device_type, say
        if share.total > len(training):
            raise ValueError(
                f"batch_size {share.total} of the plans, but only {len(training)} training cases: the cases of a step are "
                "different cases. Lower batch_size or add cases."
            )
        self.index = read_index(folder)
        self.cases = Cases(folder if self.index is None else self.index.root, sorted(set(training) | set(watched)))
        self.training = training
        self._check(channels)
        self.watched = evenly(sorted(watched or training), config.watched_cases)
        if watched:
            say(f"Watched pairs come from {len(self.watched)} cases that are not trained on: {', '.join(self.watched)}.")
        else:
            say(f"Too few cases to keep any back: the watched pairs come from {len(self.watched)} training cases.")

    def _check(self, channels: int) -> None:
        """Read headers and, as far as time allows, voxels; see how much overlap the cases allow."""
        checked = check_cases(self.cases, channels, self.config.check_seconds)
        self.say(str(checked))
        spread = checked.shapes[:: max(1, len(checked.shapes) // 512)]
        found = feasibility(spread, self.size, self.config, stream("feasibility", self.config.seed))
        if self.config.needs_second_view:
            self.say(str(found))
        warning = check_feasible(found, self.size, self.config)
        if warning:
            self.say(warning)

    def batches(self, first_step: int, last_step: int) -> Batches:
        """The training batches of these steps, prepared by worker processes."""
        workers = worker_count(self.config.workers, self.device_type, os.environ, len(self.share.per_rank))
        share = (self.share.begin, self.share.end)
        dataset = PairDataset(
            self.cases, self.training, self.size, self.config, self.share.total, share, self.config.seed, self._weights()
        )
        loader, note = make_loader(
            dataset,
            first_step,
            last_step,
            workers,
            self.config.prefetch,
            self.device_type == "cuda",
            processes=len(self.share.per_rank),
        )
        self.say(f"{len(self.training)} training cases, {loader.num_workers} loader processes.{' ' + note if note else ''}")
        return Batches(loader)

    def cases_of(self, steps: Iterable[int]) -> list[str]:
        """Names of the cases of these steps, of all ranks."""
        total, weights = self.share.total, self._weights()
        drawn = [stream("cases", self.config.seed, s).choice(len(self.training), total, replace=False, p=weights) for s in steps]
        return sorted({self.training[c] for choice in drawn for c in choice})

    def _weights(self) -> np.ndarray | None:
        """How likely each training case is drawn."""
        if self.config.sampling == "cases":
            return None
        if self.index is None:
            raise ValueError(
                f"sampling {self.config.sampling!r} draws from several datasets, but there is no index that names them: the data "
                "was not made by `nnUNetv2_cva preprocess` or adopted by `nnUNetv2_cva plan`."
            )
        return sampling_weights(self.index.dataset_of_keys(self.training), self.config.sampling)

    def watched_batches(self) -> list[dict[str, Any]]:
        """The watched pairs, in batches as large as a training step; always the same."""
        per_step = max(1, self.share.total)
        groups = [self.watched[i : i + per_step] for i in range(0, len(self.watched), per_step)]
        if len(groups) > 1 and len(groups[-1]) < 2:  # batch statistics of a single case say little
            groups[-2:] = [groups[-2] + groups[-1]]
        return [
            PairDataset(self.cases, group, self.size, self.config, len(group), (0, len(group)), self.config.seed)[0]
            for group in groups
        ]
