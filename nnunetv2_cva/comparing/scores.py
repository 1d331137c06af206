"""How well a network segments the test cases, by nnU-Net's predictor and counts, on the preprocessed grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nnunetv2.evaluation.evaluate_predictions import compute_tp_fp_fn_tn, region_or_label_to_mask
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian

FOREGROUND = "foreground"


@dataclass(frozen=True)
class Segmented:
    """Dice of a case, by structure and of all foreground as one; None where neither truth nor segmentation has any."""

    structures: dict[str, float | None]
    foreground: float | None


def segment(trainer: Any, cases: Sequence[str]) -> dict[str, Segmented]:
    """Scores of ``cases`` by the trainer's network as it is now. Without mirroring, which takes eight times as long."""
    trainer.set_deep_supervision_enabled(False)
    training = trainer.network.training
    trainer.network.eval()
    on_device = trainer.device.type == "cuda"
    predictor = nnUNetPredictor(
        use_mirroring=False, perform_everything_on_device=on_device, device=trainer.device, allow_tqdm=False
    )
    arguments = trainer.plans_manager, trainer.configuration_manager, None, trainer.dataset_json
    predictor.manual_initialization(trainer.network, *arguments, type(trainer).__name__, None)
    data = trainer.dataset_class(trainer.preprocessed_dataset_folder, list(cases))
    found = {}
    for case in cases:
        image, truth, _, _ = data.load_case(case)
        logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(np.array(image[:]))).cpu()
        guess = trainer.label_manager.convert_logits_to_segmentation(logits).numpy()
        found[case] = dice(np.array(truth[0]), guess, trainer.label_manager, trainer.dataset_json["labels"])
    compute_gaussian.cache_clear()
    trainer.network.train(training)
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    return found


def dice(truth: np.ndarray, guess: np.ndarray, label_manager: Any, labels: dict[str, Any]) -> Segmented:
    """``truth``, ``guess``: (I, J, K) labels; a voxel of nnU-Net's preprocessing without a label, -1, counts as background."""
    regions = label_manager.foreground_regions if label_manager.has_regions else label_manager.foreground_labels
    names = {_key(value): name for name, value in labels.items()}
    ignored = truth == label_manager.ignore_label if label_manager.has_ignore_label else None
    structures = {names.get(_key(r), str(r)): _dice(truth, guess, r, ignored) for r in regions}
    return Segmented(structures, _dice(truth > 0, guess > 0, True, ignored))


def _key(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (int(value),)


def _dice(truth: np.ndarray, guess: np.ndarray, region: Any, ignored: np.ndarray | None) -> float | None:
    masks = [region_or_label_to_mask(volume, region) for volume in (truth, guess)]
    tp, fp, fn, _ = compute_tp_fp_fn_tn(*masks, ignored)
    return float(2 * tp / (2 * tp + fp + fn)) if tp + fp + fn else None
