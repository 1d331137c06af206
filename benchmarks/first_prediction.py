"""docs/first_prediction.png: validation cases of a fine-tuning, the best, the middle one and the worst, beside their labels.

    python benchmarks/first_prediction.py FOLD_FOLDER RAW_DATASET [--picture FILE]

FOLD_FOLDER: nnU-Net's of the training (.../fold_0), with validation/summary.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = {1: "#ff9a1f", 2: "#38a8ff"}


def voxels(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fold", type=Path)
    parser.add_argument("raw", type=Path)
    parser.add_argument("--picture", type=Path, default=Path("first_prediction.png"))
    args = parser.parse_args()
    scored = json.loads((args.fold / "validation" / "summary.json").read_text())["metric_per_case"]
    mean = {Path(c["prediction_file"]).name: np.mean([m["Dice"] for m in c["metrics"].values()]) for c in scored}
    names = sorted(mean, key=lambda name: -mean[name])
    chosen = {"best": names[0], "middle": names[len(names) // 2], "worst": names[-1]}
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    columns = figure.subplots(2, 3).T
    for (which, name), column in zip(chosen.items(), columns):
        image = voxels(args.raw / "imagesTr" / name.replace(".nii.gz", "_0000.nii.gz"))
        reference, predicted = voxels(args.raw / "labelsTr" / name), voxels(args.fold / "validation" / name)
        middle = int(np.argmax((reference > 0).sum((1, 2))))  # the slice with most of it
        for axes, labels, title in zip(column, (reference, predicted), ("labels", "prediction")):
            axes.imshow(image[middle], cmap="gray", vmin=0, vmax=np.quantile(image, 0.995))
            for value, colour in COLOURS.items():
                if (labels[middle] == value).any():
                    axes.contour(labels[middle] == value, levels=[0.5], colors=colour, linewidths=2)
            axes.set(xticks=[], yticks=[], title=f"{which}, Dice {mean[name]:.2f}: {title}")
            axes.title.set_fontsize(9)
    figure.savefig(args.picture, dpi=80)


if __name__ == "__main__":
    main()
