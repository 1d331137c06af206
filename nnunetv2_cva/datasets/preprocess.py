"""Images into nnU-Net's preprocessed layout, by nnU-Net's preprocessor, without segmentations.

Every case is a file of its own that appears when it is whole, so a run can be killed, repeated and split over machines.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import SimpleITK as sitk
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_cva.datasets.formats import Unusable, one_line
from nnunetv2_cva.datasets.inspect import Finding, content_hash
from nnunetv2_cva.datasets.parallel import for_each
from nnunetv2_cva.datasets.preprocessed import FAILED, HOST, NOTE, Storage, Target, writable
from nnunetv2_cva.datasets.reading import read_images


@dataclass(frozen=True)
class Job:
    """One case to preprocess."""

    case: Finding
    target: Target

    @property
    def final(self) -> Path:
        return self.target.folder / f"{self.case.key}.b2nd"

    @property
    def failed(self) -> Path:
        return self.target.folder / f"{self.case.key}{FAILED}"


def preprocess(target: Target, todo: Sequence[Finding], processes: int, tick: Callable[[], Any]) -> None:
    """Preprocess these cases; ``tick()`` after each. A case that fails is noted and the rest goes on.

    Raises:
        ValueError: what is finished cannot be written.
    """
    for_each(preprocess_case, [Job(c, target) for c in todo], processes, lambda _: tick(), _killed)


def preprocess_case(job: Job) -> None:
    """One case, by nnU-Net's preprocessor. A case that cannot be preprocessed is noted.

    Raises:
        ValueError: it cannot be written: then no other case can be, either.
    """
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    with writable(job.target.folder):
        job.failed.unlink(missing_ok=True)  # else another part, ending now, would take the case for settled
    try:
        data, properties = _preprocessed(job)
    except Unusable as e:
        _note_failure(job, str(e))
    except MemoryError:
        _note_failure(job, "does not fit into memory; run again with fewer processes (-np)")
    except Exception as e:  # noqa: BLE001  whatever is odd about one case, the others go on
        _note_failure(job, f"{type(e).__name__}: {one_line(e)}")
    else:
        with writable(job.target.folder):
            _write(data, properties, job)


def _preprocessed(job: Job) -> tuple[np.ndarray, dict[str, Any]]:
    images, properties = read_images(job.case.files)
    if content_hash(images) != job.case.content:
        raise Unusable("its images have changed since plan looked at them: run plan again")
    manager = _without_mask_resampling(job.target)
    preprocessor = manager.preprocessor_class(verbose=False)
    data, _, properties = preprocessor.run_case_npy(images, None, properties, PlansManager(job.target.plans), manager, {})
    return _stored(data, job.target.storage), properties


def _killed(job: Job) -> None:
    _note_failure(job, "its process was killed, most often because memory ran out; run again where there is more")


def _note_failure(job: Job, reason: str) -> None:
    with writable(job.target.folder):
        job.failed.write_text(reason, encoding="utf-8")


def _without_mask_resampling(target: Target) -> ConfigurationManager:
    """nnU-Net makes a mask of what is not zero, normalises with it and then resamples it, for nobody: leave that out."""
    return _configuration(json.dumps(target.plans), target.configuration)


@lru_cache(maxsize=1)
def _configuration(plans: str, name: str) -> ConfigurationManager:
    content = json.loads(plans)
    configuration = dict(PlansManager(content).get_configuration(name).configuration)
    configuration.update(resampling_fn_seg="no_resampling_hack", resampling_fn_seg_kwargs={})
    return ConfigurationManager(configuration)


def _stored(data: np.ndarray, storage: Storage) -> np.ndarray:
    if storage == "float16":
        data = np.clip(data, -65504, 65504)
    data = np.ascontiguousarray(data, dtype=storage)
    if not np.isfinite(data).all():
        raise Unusable("NaN or Inf after normalisation and resampling")
    return data


def _write(data: np.ndarray, properties: dict[str, Any], job: Job) -> None:
    """nnU-Net's blosc2 file, in blocks that suit the view, and its ``.pkl``; named so only when whole, ``.b2nd`` last.

    The blosc2 file notes which images it was made of.
    """
    blosc2.set_nthreads(1)
    blocks, chunks = comp_blosc2_params(data.shape, tuple(job.target.manager.patch_size), data.itemsize)
    codec, level = blosc2.Codec.LZ4HC, 5  # nnU-Net's
    chosen = nnUNetDatasetBlosc2._select_filter(data, blocks, chunks, codec, level)
    final, notes = job.final, job.final.with_suffix(".pkl")
    partial, partial_notes = (p.with_name(f"{p.name}.{HOST}.{os.getpid()}.partial") for p in (final, notes))
    partial.unlink(missing_ok=True)
    cparams = {"codec": codec, "clevel": level, "filters": [chosen], "nthreads": 1}
    try:
        blosc2.asarray(data, urlpath=str(partial), chunks=chunks, blocks=blocks, cparams=cparams, meta={NOTE: job.case.content})
        partial_notes.write_bytes(pickle.dumps(properties))
    except Exception:
        for path in (partial, partial_notes):
            path.unlink(missing_ok=True)
        raise
    os.replace(partial_notes, notes)
    os.replace(partial, final)
