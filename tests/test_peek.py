"""What is in a pretraining dataset: the table and the pictures."""

import json
from types import SimpleNamespace

import blosc2
import numpy as np
import pytest
from helpers.images import labelled_dataset, nnunet_folders, voxels, write
from helpers.projects import plans as tiny_plans
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from nnunetv2_cva.commands import main
from nnunetv2_cva.config import CVAConfig
from nnunetv2_cva.datasets import pictures

NAME = "Dataset500_Images"


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """``(raw, preprocessed)``: six images from two places, one of them broken, planned with small views."""
    raw, preprocessed = nnunet_folders(tmp_path, monkeypatch)
    for i in range(4):
        write(raw / NAME / "imagesTr" / f"case_{i}_0000.nii.gz", voxels(i, (30 + i, 38, 33)), (2.0, 1.0, 1.0))
    for i in range(2):
        write(tmp_path / "pile" / f"scan_{i}.nrrd", voxels(10 + i, (36, 40, 34)))
    write(tmp_path / "pile" / "bad.nrrd", np.zeros((20, 20, 20), np.int16))
    plan = tiny_plans(view=(16, 24, 16))
    plan["foreground_intensity_properties_per_channel"] = {"0": {"mean": 0.0}}
    labelled_dataset(raw, preprocessed, "Dataset004_Target", plan)
    images = ("--images", raw / NAME, tmp_path / "pile")
    assert call("plan", *images, "--target", "4", "--view", "16", "24", "16", "-np", "1") == 0
    return raw, preprocessed


def call(command, *arguments):
    return main.main([command, "-d", NAME, *map(str, arguments)])


def test_before_preprocessing_the_images_themselves_are_shown(folders, capsys):
    _, preprocessed = folders
    capsys.readouterr()
    assert call("peek") == 0
    out = capsys.readouterr().out
    row = next(line.split() for line in out.splitlines() if line.startswith(NAME))
    assert row[1:3] == ["4", "1"] and "30x38x33," in row and "33x38x33" in row and "2x1x1" in row
    assert "pile" in out and "rejected: 1\n       1  all voxels are 0\n" in out
    assert "pile/bad.nrrd\n" in out
    assert "6 images as they are" in out and "no views.png" in out
    assert imread(preprocessed / NAME / "contact_sheet.png").std() > 0.05
    assert not (preprocessed / NAME / "views.png").exists()


def test_after_preprocessing_cases_and_views_are_shown(folders, tmp_path, capsys):
    _, preprocessed = folders
    call("preprocess", "-np", "1")
    capsys.readouterr()
    assert call("peek", "-o", tmp_path / "out", "--cases", 3, "--pairs", 4) == 0
    out = capsys.readouterr().out
    assert "3 preprocessed cases" in out and "4 pairs of views of 16x24x16 voxels" in out
    assert all(imread(tmp_path / "out" / name).std() > 0.05 for name in ("contact_sheet.png", "views.png"))
    assert not list((preprocessed / NAME).glob("*.png"))


def test_a_dataset_that_nnunet_has_preprocessed_can_be_looked_at(folders, capsys):
    _, preprocessed = folders
    folder = preprocessed / "Dataset004_Target" / "nnUNetPlans_3d_fullres"
    folder.mkdir()
    for i in range(3):
        case = np.random.default_rng(i).normal(size=(1, 30, 32, 28)).astype(np.float32)
        blosc2.asarray(case, urlpath=str(folder / f"t_{i}.b2nd"))
        blosc2.asarray(np.zeros(case.shape, np.int8), urlpath=str(folder / f"t_{i}_seg.b2nd"))
    assert main.main(["peek", "-d", "4", "-p", "nnUNetPlans", "-c", "3d_fullres"]) == 0
    assert "3 pairs of views" in capsys.readouterr().out
    assert main.main(["peek", "-d", "4"]) == 2 and "plans there: nnUNetPlans" in capsys.readouterr().err


def test_the_settings_of_the_plans_are_those_of_the_views(folders, monkeypatch):
    """Hidden blocks are the configuration's: with blocks of 4 voxels there are many small ones."""
    _, preprocessed = folders
    call("preprocess", "-np", "1")
    path = preprocessed / NAME / "nnUNetPlansCVA.json"
    plans = json.loads(path.read_text())
    plans["configurations"]["3d_fullres_cva"]["cva"] = {"mask_block": 4, "mask_ratio": 0.5, "mirror_p": 0.0}
    path.write_text(json.dumps(plans))
    shown = []
    monkeypatch.setattr(pictures, "view_pairs", lambda pairs, _: shown.extend(pairs))
    assert call("peek", "--pairs", 2) == 0
    for pair in shown:
        blocks = pair.hidden.reshape(2, 4, 4, 6, 4, 4, 4)
        assert pair.views.shape == pair.inside.shape == (2, 16, 24, 16) and pair.inside.any()
        assert blocks.any(axis=(2, 4, 6)).mean() == blocks.all(axis=(2, 4, 6)).mean() == 0.5
        assert (pair.rois[:, 1] > pair.rois[:, 0]).all()


def test_a_primus_hides_tokens(folders, monkeypatch):
    """Whatever blocks a U-Net would hide; the recipe is the one that the preset was planned for."""
    _, preprocessed = folders
    assert call("plan", "--preset", "primusm_96", "--view", "16", "24", "16", "-p", "nnUNetPrimus", "-np", "1") == 0
    assert call("preprocess", "-p", "nnUNetPrimus", "-np", "1") == 0
    asked, shown = [], []

    def found(name):
        asked.append(name)
        return SimpleNamespace(config=CVAConfig(mask_ratio=0.5, mirror_p=0.0))

    monkeypatch.setattr("nnunetv2_cva.transfer.target.trainer_class", found)
    monkeypatch.setattr(pictures, "view_pairs", lambda pairs, _: shown.extend(pairs))
    assert call("peek", "-p", "nnUNetPrimus", "--pairs", 3) == 0
    assert asked == ["nnUNetTrainerCVA_PrimusM"] and len(shown) == 3
    for pair in shown:
        tokens = pair.hidden.reshape(2, 2, 8, 3, 8, 2, 8)
        assert (tokens.any(axis=(2, 4, 6)).sum(axis=(1, 2, 3)) == 6).all() and (pair.rois[:, 1] > pair.rois[:, 0]).all()
        assert (tokens.any(axis=(2, 4, 6)) == tokens.all(axis=(2, 4, 6))).all()


def test_damaged_cases_are_left_out(folders, tmp_path, capsys):
    _, preprocessed = folders
    call("preprocess", "-np", "1")
    data = preprocessed / NAME / "nnUNetPlansCVA_3d_fullres_images_only"
    keys = sorted(p.stem for p in data.glob("*.b2nd"))
    (data / f"{keys[1]}.b2nd").write_bytes(b"no blosc2")
    nan = blosc2.open(str(data / f"{keys[2]}.b2nd"), mode="a")
    nan[:] = np.full(nan.shape, np.nan, np.float32)
    capsys.readouterr()
    assert call("peek") == 0
    out = capsys.readouterr().out
    assert f"WARNING: left out: {data / keys[1]}.b2nd: cannot be read" in out
    assert f"WARNING: left out: {data / keys[2]}.b2nd: holds NaN" in out
    assert "5 preprocessed cases" in out and "4 pairs of views" in out


def test_an_image_that_has_been_damaged_since_is_left_out(folders, tmp_path, capsys):
    (tmp_path / "pile" / "scan_0.nrrd").write_bytes(b"")
    assert call("peek") == 0
    out = capsys.readouterr().out
    assert f"WARNING: left out: {tmp_path / 'pile' / 'scan_0.nrrd'}: empty file" in out and "5 images as they are" in out


@pytest.mark.parametrize("option", ["--cases", "--pairs"])
@pytest.mark.parametrize("number", ["0", "-1"])
def test_no_cases_or_pairs_is_one_line(folders, capsys, option, number):
    with pytest.raises(SystemExit, match="2"):
        call("peek", option, number)
    assert f"argument {option}: expected a whole number from 1 on" in capsys.readouterr().err


# ---- drawing


def test_of_a_case_only_three_slices_are_read():
    class Watched:
        shape, read = (1, 30, 40, 50), 0

        def __getitem__(self, where):
            found = np.zeros(self.shape)[where]
            self.read += found.size
            return found

    case = Watched()
    pictures.three_slices(case, (1, 1, 1))
    assert case.read == 40 * 50 + 30 * 50 + 30 * 40


def test_slices_are_shown_in_millimetres():
    """A bright ball of 20 mm in a case of 40 x 60 x 30 mm stays a ball, at the place where it is."""
    spacing = (4.0, 1.0, 0.5)
    i, j, k = np.meshgrid(*(np.arange(n) * s for n, s in zip((10, 60, 60), spacing)), indexing="ij")
    ball = ((i - 20) ** 2 + (j - 34) ** 2 + (k - 15) ** 2 < 100).astype(np.float32)
    sheet = pictures.three_slices(ball[None], spacing)
    tile, scale = pictures.TILE, (pictures.TILE - 4) / 60
    assert sheet.shape == (tile, 3 * tile)
    for n, (extent, centre) in enumerate((((60, 30), (34, 15)), ((40, 30), (20, 15)), ((40, 60), (20, 34)))):
        bright = np.argwhere(sheet[:, n * tile : (n + 1) * tile] > 0.5)
        assert np.allclose(bright.mean(0), tile / 2 + scale * (np.array(centre) - np.array(extent) / 2), atol=2.5 * scale)
        assert np.allclose(np.ptp(bright, axis=0), 20 * scale, atol=4.5 * scale)


@pytest.mark.parametrize("mirrored", [False, True])
def test_the_frame_is_around_what_the_roi_says(mirrored):
    roi = np.array([[0.1, 0.25, 0.5], [0.9, 0.75, 1.0]])
    if mirrored:
        roi[:, 1] = roi[::-1, 1].copy()
    axes = Figure().add_subplot()
    pictures._frame(axes, roi, (40, 20))
    (frame,), (dot,) = axes.patches, axes.lines
    # Rows 10 to 29 and columns 10 to 19 are shared; imshow draws pixel n from n - 0.5 to n + 0.5.
    assert (frame.get_y(), frame.get_height()) == (9.5, 20) and (frame.get_x(), frame.get_width()) == (9.5, 10)
    y = float(dot.get_ydata()[0])
    assert abs(y - (29.5 if mirrored else 9.5)) < 2 and (y < 29.5 if mirrored else y > 9.5)
    assert pictures.middle(roi, 30) == 15


def test_a_tile_tells_hidden_and_outside_from_dark(tmp_path):
    plane = np.linspace(0, 1, 12 * 8).reshape(12, 8)
    hidden, inside = np.zeros((12, 8), bool), np.ones((12, 8), bool)
    hidden[:4], inside[:, 6:] = True, False
    tile = pictures.Tile("view 0, slice 2 of 9", plane, None, hidden, inside)
    image = pictures._coloured(tile, (0, 1))
    assert np.allclose(image[:4, :6], to_rgb(pictures.HIDDEN)) and np.allclose(image[:, 6:], to_rgb(pictures.OUTSIDE))
    assert np.allclose(image[4:, :6], plane[4:, :6, None])
    assert [h.get_label() for h in pictures._legend([tile])] == ["hidden from the student", "outside of the case"]
    assert pictures._legend([pictures.Tile("", plane)]) == []


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_rows_of_tiles_fill_the_picture(tmp_path, shape):
    """No bands between rows of wide or of tall tiles: what is no tile is titles, gaps and a legend."""
    plane = np.full(shape, 0.5)
    rows = [(f"case {n}", [pictures.Tile("view 0", plane + n, np.array([[0, 0, 0], [1, 1, 0.5]]))] * 3) for n in range(2)]
    pictures.tiles(rows, tmp_path / "views.png")
    image = imread(tmp_path / "views.png")[..., :3]
    assert image.dtype.kind == "f" and tuple(image[0, 0]) == (1, 1, 1)
    covered = (image < 0.999).any(axis=2)  # the tiles: one value everywhere
    wide, high = 3 * pictures.TILE_INCHES * 100, 2 * pictures.TILE_INCHES * 100 * shape[0] / shape[1]
    assert covered.mean() == pytest.approx(wide * high / covered.size, abs=0.03)
    assert covered.mean() > 0.6


def test_a_window_does_not_depend_on_a_few_bright_voxels():
    image = np.random.default_rng(0).uniform(0, 1, (40, 50))
    image[0, 0] = 1e6
    shown = pictures.windowed(image)
    assert shown.min() == 0 and shown.max() == 1 and 0.4 < np.median(shown) < 0.6
    assert (pictures.windowed(np.zeros((3, 4))) == 0).all()
