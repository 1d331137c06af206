"""Images into nnU-Net's preprocessed layout, by nnU-Net's preprocessor, without segmentations.

Every case is a file of its own that appears when it is whole, so a run can be killed, repeated and split over machines.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import SimpleITK as sitk
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_cva.datasets.destination import FAILED, NOTE, Destination, Storage, writable
from nnunetv2_cva.datasets.findings import Finding, content_hash
from nnunetv2_cva.datasets.formats import Unusable, one_line
from nnunetv2_cva.datasets.parallel import Progress, for_each
from nnunetv2_cva.datasets.reading import MIN_AXIS, read_images
from nnunetv2_cva.files import write_text, written_whole
from nnunetv2_cva.sizes import by


@dataclass(frozen=True)
class CaseJob:
    """One case to preprocess."""

    case: Finding
    to: Destination

    @property
    def final(self) -> Path:
        return self.to.folder / f"{self.case.key}.b2nd"

    @property
    def failed(self) -> Path:
        return self.to.folder / f"{self.case.key}{FAILED}"


def preprocess(to: Destination, todo: Sequence[Finding], processes: int, progress: Progress, what: str) -> None:
    """Preprocess these cases. A case that fails is noted and the rest goes on.

    Raises:
        ValueError: what is finished cannot be written.
    """
    for_each(preprocess_case, [CaseJob(c, to) for c in todo], processes, lambda _: None, _killed, progress, what)


def preprocess_case(job: CaseJob) -> None:
    """One case, by nnU-Net's preprocessor. A case that cannot be preprocessed is noted.

    Raises:
        ValueError: it cannot be written: then no other case can be, either.
    """
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    with writable(job.to.folder):
        job.failed.unlink(missing_ok=True)  # else another part, ending now, would take the case for settled
    try:
        data, properties = _preprocessed(job)
    except Unusable as e:
        _note_failure(job, str(e))
    except MemoryError:
        _note_failure(job, "does not fit into memory; run again with fewer processes")
    except Exception as e:  # noqa: BLE001  whatever is odd about one case, the others go on
        _note_failure(job, f"{type(e).__name__}: {one_line(e)}")
    else:
        with writable(job.to.folder):
            _write(data, properties, job)


def _preprocessed(job: CaseJob) -> tuple[np.ndarray, dict[str, Any]]:
    read = read_images(job.case.files)
    images, properties = read.images, read.properties
    if content_hash(images) != job.case.content:
        raise Unusable("its images have changed since plan looked at them: run plan again")
    manager = _without_mask_resampling(job.to)
    preprocessor = manager.preprocessor_class(verbose=False)
    data, _, properties = preprocessor.run_case_npy(images, None, properties, PlansManager(job.to.plans), manager, {})
    return _stored(data, job.to.storage), properties


def _killed(job: CaseJob) -> None:
    _note_failure(job, "its process was killed, most often because memory ran out; run again where there is more")


def _note_failure(job: CaseJob, reason: str) -> None:
    with writable(job.to.folder):
        write_text(job.failed, reason)


def _without_mask_resampling(to: Destination) -> ConfigurationManager:
    """nnU-Net makes a mask of what is not zero, normalises with it and then resamples it, for nobody: leave that out."""
    return _configuration(json.dumps(to.plans), to.configuration)


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
    if min(data.shape[1:]) < MIN_AXIS:
        raise Unusable(f"{by(data.shape[1:])} voxels after resampling, at least {MIN_AXIS} each expected")
    if any(channel.min() == channel.max() for channel in data):
        raise Unusable("all voxels of a channel are the same after normalisation and resampling")
    return data


def _write(data: np.ndarray, properties: dict[str, Any], job: CaseJob) -> None:
    """nnU-Net's blosc2 file, in blocks that suit the view, and its ``.pkl``; named so only when whole, ``.b2nd`` last.

    The blosc2 file notes which images it was made of.
    """
    blosc2.set_nthreads(1)
    blocks, chunks = comp_blosc2_params(data.shape, tuple(job.to.manager.patch_size), data.itemsize)
    codec, level = blosc2.Codec.LZ4HC, 5  # nnU-Net's
    chosen = nnUNetDatasetBlosc2._select_filter(data, blocks, chunks, codec, level)
    final, notes = job.final, job.final.with_suffix(".pkl")
    cparams = {"codec": codec, "clevel": level, "filters": [chosen], "nthreads": 1}
    with written_whole(final) as partial:
        partial.unlink(missing_ok=True)
        blosc2.asarray(data, urlpath=str(partial), chunks=chunks, blocks=blocks, cparams=cparams, meta={NOTE: job.case.content})
        with written_whole(notes) as partial_notes:
            partial_notes.write_bytes(pickle.dumps(properties))
