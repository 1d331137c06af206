"""The demo: its images, whose folder it may write to, and the whole of it in small."""

import argparse
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_cva.commands import demo
from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.demo import anatomy
from nnunetv2_cva.demo.pictures import draw_pair_figure
from nnunetv2_cva.demo.pipeline import Size
from nnunetv2_cva.demo.results import carried_table, compared
from nnunetv2_cva.demo.workspace import FILES, FOLDERS, Workspace, environment, output_to
from nnunetv2_cva.views.geometry import draw_pair

SMALL = """
import sys
from pathlib import Path
from nnunetv2_cva.commands.demo import StepsShown
from nnunetv2_cva.demo.flow import Size, play

if __name__ == "__main__":
    size = Size(images=6, test=3, pretraining=(2, 2), labels=1, splits=2, fine_tuning=10, scored=1, pairs=2)
    sys.exit(play(Path(sys.argv[1]), 0, "cpu", False, StepsShown, size))
"""


def arguments(**given):
    return argparse.Namespace(**{"folder": "demo", "seed": 0, "device": "cpu", "overwrite": False, **given})


# ---- images


def test_a_case_follows_from_seed_and_number():
    image, labels = anatomy.make_case(3, 1)
    again_image, again_labels = anatomy.make_case(3, 1)
    assert np.array_equal(image, again_image) and np.array_equal(labels, again_labels)
    for seed, number in ((4, 1), (3, 2)):
        other = anatomy.make_case(seed, number)[0]
        assert other.shape != image.shape or not np.array_equal(other, image)


def test_every_structure_is_in_every_case_and_sizes_differ():
    cases = [anatomy.make_case(0, n) for n in range(8)]
    for image, labels in cases:
        assert image.shape == labels.shape and all(48 <= n <= 64 for n in image.shape)
        assert image.dtype == np.int16 and labels.dtype == np.uint8
        assert set(np.unique(labels)) == set(anatomy.LABELS.values())
    assert len({image.shape for image, _ in cases}) > 4
    assert any(len(set(image.shape)) == 3 for image, _ in cases)


def test_cases_are_deformed_differently():
    """Moved onto each other, the livers of two cases still differ."""
    livers = []
    for number in range(4):
        where = np.argwhere(anatomy.make_case(0, number)[1] == anatomy.LABELS["liver"])
        livers.append({tuple(point) for point in np.rint(where - where.mean(0)).astype(int)})
    for n, one in enumerate(livers):
        for other in livers[:n]:
            assert 0.4 < 2 * len(one & other) / (len(one) + len(other)) < 0.95


def test_brightness_alone_does_not_tell_the_structures():
    """Labelled liver and unlabelled body overlap in brightness: at best, a threshold gets some of both wrong."""
    image, labels = anatomy.make_case(0, 0)
    low, high = np.quantile(image[labels == anatomy.LABELS["liver"]], (0.05, 0.95))
    other = image[labels == anatomy.LABELS["body"]]
    assert ((low < other) & (other < high)).mean() > 0.1


def test_the_dataset_is_in_nnunets_raw_layout(tmp_path):
    ticks = []
    names = anatomy.write_dataset(tmp_path, 0, 3, lambda: ticks.append(1))
    assert (names, len(ticks)) == (["case_000", "case_001", "case_002"], 3)
    image = sitk.ReadImage(str(tmp_path / "imagesTr" / "case_002_0000.nii.gz"))
    assert image.GetSpacing() == pytest.approx(anatomy.SPACING[::-1])
    assert np.array_equal(sitk.GetArrayFromImage(image), anatomy.make_case(0, 2)[0])
    assert sorted(p.name for p in (tmp_path / "labelsTr").iterdir()) == [f"{name}.nii.gz" for name in names]
    description = json.loads((tmp_path / "dataset.json").read_text())
    assert description["numTraining"] == 3 and description["labels"] == anatomy.LABELS


# ---- folder, environment, output


def test_somebody_elses_folder_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and was not made by the demo.*`folder`.*`overwrite`"):
        demo.run(arguments(folder=str(tmp_path)))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file"):
        Workspace(tmp_path / "file").claim(overwrite=True)


def test_overwriting_touches_only_what_the_demo_writes(tmp_path):
    for name in ("nnUNet_raw", *FOLDERS):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text("")
    for name in ("thesis.txt", *FILES):
        (tmp_path / name).write_text("")
    Workspace(tmp_path).claim(overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["nnUNet_raw", "nnunetv2_cva_demo.json", "thesis.txt"]
    assert (tmp_path / "nnUNet_raw" / "x").is_file()


def test_an_earlier_demo_is_replaced(tmp_path):
    workspace = Workspace(tmp_path / "new")
    workspace.claim(overwrite=False)
    workspace.log.write_text("old")
    workspace.claim(overwrite=False)
    assert not workspace.log.exists()


@pytest.mark.parametrize(
    ("given", "match"),
    [({"device": "mps"}, "`device` mps: torch .* finds no such device"), ({"seed": -1}, "`seed`: expected a number >= 0")],
)
def test_arguments_that_cannot_be_met_leave_no_folder(given, match, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(ValueError, match=match):
        demo.run(arguments(folder=str(tmp_path / "demo"), **given))
    assert not (tmp_path / "demo").exists()


def test_nnunets_variables_are_the_demos_inside_and_the_users_outside(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", "/mine")
    monkeypatch.setenv("nnUNet_cva", '{"epochs": 7}')
    with environment(Workspace(tmp_path)):
        assert os.environ["nnUNet_raw"] == str(tmp_path / "demo_raw")
        assert "nnUNet_cva" not in os.environ
        assert os.path.isfile(os.path.join(os.environ["nnUNet_extTrainer"], "nnUNetTrainerCVA.py"))
    assert os.environ["nnUNet_raw"] == "/mine" and os.environ["nnUNet_cva"] == '{"epochs": 7}'
    assert "nnUNet_extTrainer" not in os.environ


def test_output_of_this_and_other_processes_goes_to_the_log(tmp_path, capfd):
    with output_to(tmp_path / "log") as terminal:
        print("from Python")
        subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
        print("for the user", file=terminal, flush=True)
    print("afterwards")
    assert (tmp_path / "log").read_text().splitlines() == ["from Python", "from a child"]
    assert capfd.readouterr().out.splitlines() == ["for the user", "afterwards"]


# ---- what is shown


def test_what_was_found_is_said_with_its_interval():
    rows = {"position": (0.2, 0.05), "intensity": (0.3, 0.04), "untrained": (0.31, 0.03), "pretrained": (0.45, 0.02)}
    lines = carried_table(rows, 30).splitlines()
    assert "30 random windows" in lines[0] and [line.split()[:4] for line in lines[1:]] == [
        [row, f"{mean:.3f}", "+-", f"{half:.3f}"] for row, (mean, half) in rows.items()
    ]
    table = "At the end\nlabels  arm\n\nAlong the way"
    said = compared(table, ("No gain shown of a over scratch.",), Size(labels=2, splits=4, fine_tuning=250))
    assert "\n  At the end\n  labels  arm\n\n  Along the way\n" in said
    assert "for 250 iterations on 2 labelled cases, 4 splits" in said and said.endswith("No gain shown of a over scratch.")


def test_the_time_that_remains_follows_from_the_shares_of_the_steps(tmp_path):
    with open(tmp_path / "terminal", "w") as terminal:
        steps = demo.StepsShown(terminal, {"first": 0.25, "second": 0.5, "third": 0.25})
        assert steps.clock() == ""
        steps.seconds["first"] = 60.0
        assert steps.clock() == " (1.0 min so far, about 3 to go)"
        steps.seconds["second"] = 240.0
        assert steps.clock() == " (5.0 min so far, about 2 to go)"


@pytest.mark.parametrize("rotation_p", [0.0, 1.0])
def test_the_same_bins_are_at_the_same_place_of_the_case(rotation_p):
    """In the figure, a bin's number stands where the case shows it, whichever view it is computed from."""
    rng = np.random.default_rng(0)
    config = CVAConfig(spatial="independent", rotation_p=rotation_p)
    for _ in range(5):
        pair = draw_pair((50, 58, 64), (32, 40, 24), config, rng)
        figure = draw_pair_figure(np.zeros((50, 58, 64)), pair, np.zeros((2, 32, 40, 24)), (5, 6, 7))
        case, *views = figure.axes
        numbers = [{t.get_text(): t.get_position() for t in axes.texts} for axes in (case, *views)]
        assert numbers[0].keys() == numbers[1].keys() == numbers[2].keys()
        for v in (0, 1):
            matrix, shift = pair.to_case(v)
            depth = (pair.rois[v, 0, 0] * 0.5 + pair.rois[v, 1, 0] * 0.5) * 32
            for number, (x, y) in numbers[1 + v].items():
                place = matrix @ (depth, y, x) + shift
                assert place[[2, 1]] == pytest.approx(numbers[0][number], abs=1e-3)


# ---- all of it


@pytest.mark.timeout(900)  # a minute of work; trainer look-ups and pools of processes crawl on a busy machine
def test_the_whole_demo_in_small(tmp_path):
    folder = tmp_path / "demo"
    done = subprocess.run([sys.executable, "-c", SMALL, folder], capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in ("[6/6]", "to go)", "untrained", "position", "scratch", str(folder / "look.html"), "hook install"):
        assert expected in done.stdout
    assert "Epoch" not in done.stdout and "Epoch" in (folder / "demo.log").read_text()
    record = json.loads((folder / "nnunetv2_cva_demo.json").read_text())
    assert record["state"] == "complete" and record["carried"].keys() == {"position", "intensity", "untrained", "pretrained"}
    assert 1 <= len(record["sentences"]) <= 2 and len(record["test_cases"]) == 3
    assert all(s in " ".join(done.stdout.split()) for s in record["sentences"]), "they are printed, in lines"
    trained = [p.name for p in (folder / "demo_comparison" / "jobs").iterdir()]
    assert len(trained) == 4, "from scratch and from the weights, two splits"
    for picture in folder.glob("views.png"), folder.glob("look.png"), folder.rglob("curves.png"), folder.rglob("progress.png"):
        assert next(picture).stat().st_size > 10_000
    assert "canvas" in (folder / "look.html").read_text("utf-8")
    config = json.loads(next(folder.rglob("cva_config.json")).read_text())
    assert config["mask_block"] == 8, "as a view of 32x40x32 asks for"


def test_a_step_that_fails_shows_the_log_and_where_it_is(tmp_path, monkeypatch, capfd):
    def fail(*_):
        print("something that nnU-Net said")
        raise RuntimeError("no luck")

    monkeypatch.setattr("nnunetv2_cva.demo.flow.prepare", fail)
    assert demo.run(arguments(folder=str(tmp_path / "demo"))) == 1
    out = capfd.readouterr().out
    for expected in ("no luck", "something that nnU-Net said", str(tmp_path / "demo" / "demo.log")):
        assert expected in out
    assert "failed" in (tmp_path / "demo" / "nnunetv2_cva_demo.json").read_text()


def test_an_interrupted_demo_says_so_and_starts_over(tmp_path, monkeypatch, capfd):
    def interrupt(workspace, size, seed, device, screen):
        with screen.step("data", 2, "Images") as tick:
            tick()
            raise KeyboardInterrupt

    monkeypatch.setattr("nnunetv2_cva.demo.flow.all_steps", interrupt)
    assert demo.run(arguments(folder=str(tmp_path / "demo"))) == 130
    assert "Interrupted in step 1 of 6 (data)" in capfd.readouterr().out
    assert demo.run(arguments(folder=str(tmp_path / "demo"))) == 130
