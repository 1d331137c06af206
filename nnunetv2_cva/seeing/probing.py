"""What a simple classifier finds in frozen features: of voxels of few labelled cases, or of whole images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nnunetv2_cva.seeing.describe import cells
from nnunetv2_cva.seeing.frozen import Frozen
from nnunetv2_cva.seeing.images import Image
from nnunetv2_cva.seeing.propagation import DRAWS, INTENSITY, POSITION, describe_window, dice, labels_on, random_window

NEIGHBOURS = 5
PER_WINDOW = 1500  # cells of a labelled window that a classifier is fitted to
MOST_CELLS = 3000
IMAGE_SCORES = ("balanced accuracy", "AUROC", "average precision")


def classifiers(seed: int) -> dict[str, Any]:
    """Logistic regression and k nearest neighbours, both on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return {
        "linear": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, random_state=seed)),
        "k-NN": make_pipeline(StandardScaler(), KNeighborsClassifier(NEIGHBOURS)),
    }


def probe_voxels(
    cases: Sequence[Image],
    networks: Mapping[str, Frozen],
    labels: Sequence[int],
    labelled: int,
    seed: int,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Mean Dice by row and classifier: fitted to random windows of ``labelled`` cases, scored on random windows of all others.

    Rows: position in the window, intensity, every network; all see the same windows. ``seed`` draws cases and windows.

    Raises:
        ValueError: no case is left to be scored.
    """
    if not 0 < labelled < len(cases):
        raise ValueError(f"Labelled cases: expected 1 to {len(cases) - 1}, as the dataset has {len(cases)}, found {labelled}.")
    rng = np.random.default_rng(seed)
    view = next(iter(networks.values())).view
    bins = cells(view, MOST_CELLS)
    order = rng.permutation(len(cases))
    windows = [random_window(cases[n], view, labels, DRAWS if i < labelled else 1, rng) for i, n in enumerate(order)]
    truth = [labels_on(w.labels, bins).numpy() for w in windows]  # type: ignore[arg-type]
    truth = [np.where(np.isin(t, labels), t, 0) for t in truth]
    chosen = [rng.permutation(len(t))[:PER_WINDOW] for t in truth[:labelled]]
    found: dict[str, dict[str, float]] = {}
    for row in (POSITION, INTENSITY, *networks):
        rows = [describe_window(w, row, networks.get(row), bins).rows.numpy() for w in windows]
        fit = np.concatenate([rows[i][c] for i, c in enumerate(chosen)])
        targets = np.concatenate([truth[i][c] for i, c in enumerate(chosen)])
        found[row] = {}
        for name, classifier in classifiers(seed).items():
            classifier.fit(fit, targets)
            each = [dice(classifier.predict(r), t, labels) for r, t in zip(rows[labelled:], truth[labelled:])]
            values = np.array(each)
            found[row][name] = float(values[~np.isnan(values)].mean())
        tick()
    return found


def probe_images(
    vectors: np.ndarray, targets: Sequence[str], subjects: Sequence[str], folds: int, seed: int
) -> list[dict[str, float]]:
    """For every fold the scores of a logistic regression on image vectors (M, D); a subject is in one fold only. AUROC and
    average precision are means over the classes, each against the rest.

    Raises:
        ValueError: fewer than two classes, or a class of fewer subjects than folds.
    """
    from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold

    names, y = np.unique(np.asarray(targets), return_inverse=True)
    fewest = min(len({s for s, t in zip(subjects, y) if t == c}) for c in range(len(names)))
    if len(names) < 2 or fewest < folds:
        counts = ", ".join(f"{n}: {int((y == c).sum())}" for c, n in enumerate(names))
        raise ValueError(f"Expected two or more classes of at least {folds} subjects each, as many as folds, found {counts}.")
    found = []
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for train, test in splitter.split(vectors, y, subjects):
        model = classifiers(seed)["linear"].fit(vectors[train], y[train])
        chances = model.predict_proba(vectors[test])
        shown = [c for c in range(len(names)) if 0 < (y[test] == c).sum() < len(test) and c in model.classes_]
        columns = {c: chances[:, list(model.classes_).index(c)] for c in shown}
        found.append(
            {
                "balanced accuracy": float(balanced_accuracy_score(y[test], model.predict(vectors[test]))),
                "AUROC": float(np.mean([roc_auc_score(y[test] == c, p) for c, p in columns.items()])),
                "average precision": float(np.mean([average_precision_score(y[test] == c, p) for c, p in columns.items()])),
            }
        )
    return found
