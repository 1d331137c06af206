"""Where a demo lies on disk, whom its folder belongs to, and the environment that points nnU-Net there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from nnunetv2_cva.datasets.parallel import THREADS
from nnunetv2_cva.files import read_object, write_json
from nnunetv2_cva.installation.hook import recipes_folder

DATASET_ID, DATASET = 901, "Dataset901_CVADemo"
PLANS, CONFIGURATION, RECIPE = "nnUNetCVADemoPlans", "3d_fullres", "nnUNetTrainerCVA"
FOLD = 0  # whose validation cases are the test cases

RECORD = "nnunetv2_cva_demo.json"  # tells a folder of the demo from anybody else's
FOLDERS = ("demo_raw", "demo_preprocessed", "demo_results", "demo_comparison")
FILES = ("demo.log", "views.png", "look.png", "look.html")


@dataclass(frozen=True)
class Workspace:
    """Where everything of one demo lies."""

    folder: Path

    @property
    def raw(self) -> Path:
        return self.folder / "demo_raw"

    @property
    def preprocessed(self) -> Path:
        return self.folder / "demo_preprocessed"

    @property
    def cases(self) -> Path:
        """The preprocessed cases that the plans lead to."""
        return self.preprocessed / DATASET / f"{PLANS}_{CONFIGURATION}"

    @property
    def log(self) -> Path:
        return self.folder / "demo.log"

    @property
    def results(self) -> Path:
        return self.folder / "demo_results"

    @property
    def comparison(self) -> Path:
        """Trainings from scratch and from the weights, and what came of it."""
        return self.folder / "demo_comparison"

    @property
    def pretraining(self) -> Path:
        return self.results / DATASET / f"{RECIPE}__{PLANS}__{CONFIGURATION}" / f"fold_{FOLD}"

    @property
    def weights(self) -> Path:
        return self.pretraining / "checkpoint_final.pth"

    def short(self, path: Path) -> str:
        """A path below the folder as a command has it that is typed there."""
        return str(path.relative_to(self.folder))

    def plans(self) -> dict[str, Any]:
        return read_object(self.preprocessed / DATASET / f"{PLANS}.json")

    def dataset_json(self) -> dict[str, Any]:
        return read_object(self.raw / DATASET / "dataset.json")

    def claim(self, overwrite: bool) -> None:
        """Make this folder a demo's and remove what an earlier demo left in it. Nobody else's files are touched.

        Raises:
            ValueError: it is no demo's folder, holds something, and ``overwrite`` was not asked for; or it is a file.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file. Choose another `folder`.")
        used = self.folder.is_dir() and any(self.folder.iterdir())
        if used and not (self.folder / RECORD).is_file() and not overwrite:
            raise ValueError(
                f"{self.folder} is not empty and was not made by the demo. Choose another `folder`, or "
                f"`overwrite`: that replaces {', '.join((*FOLDERS, *FILES))} in it and leaves everything else alone."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self.record(state="started")
        for name in FOLDERS:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        for name in FILES:
            (self.folder / name).unlink(missing_ok=True)

    def record(self, **content: Any) -> None:
        """Write the file that says what the folder is, how far the demo came and, in the end, its numbers."""
        about = {"made_by": "nnUNetv2_cva demo", **content}
        write_json(self.folder / RECORD, about)


@contextmanager
def environment(workspace: Workspace) -> Iterator[None]:
    """nnU-Net's variables point into the demo's folder; what the user has set is ignored and comes back afterwards."""
    before = dict(os.environ)
    for name in [n for n in os.environ if n.startswith("nnUNet_")]:
        del os.environ[name]
    os.environ.update(
        nnUNet_raw=str(workspace.raw),
        nnUNet_preprocessed=str(workspace.preprocessed),
        nnUNet_results=str(workspace.results),
        nnUNet_extTrainer=recipes_folder(),
        nnUNet_n_proc_DA="1",
        nnUNet_def_n_proc="2",
        nnUNet_compile="f",  # compiling takes longer than the demo
        **dict.fromkeys(THREADS, "1"),
    )
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def output_to(log: Path) -> Iterator[TextIO]:
    """All output of this process and of those that it starts goes to ``log``; yields what was stdout before.

    File descriptors are redirected, not only Python's streams: nnU-Net prints from processes of its own.
    """
    out, err = os.dup(1), os.dup(2)
    with open(log, "a", buffering=1, errors="replace") as file, os.fdopen(os.dup(out), "w", errors="replace") as terminal:
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            with redirect_stdout(file), redirect_stderr(file):
                yield terminal
        finally:
            os.dup2(out, 1)
            os.dup2(err, 2)
            os.close(out)
            os.close(err)
