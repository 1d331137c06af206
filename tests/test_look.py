"""Points of one image found in others, colours, labels carried over; and the page, in a real browser where there is one."""

import json
import re

import numpy as np
import pytest
import torch
from helpers.browser import browse, browser
from helpers.images import write
from helpers.targets import call, pretraining, target

from nnunetv2_cva.datasets.findings import enclosed
from nnunetv2_cva.demo.anatomy import make_case
from nnunetv2_cva.model.taps import Tap
from nnunetv2_cva.seeing import slices
from nnunetv2_cva.seeing.dense import DenseMap
from nnunetv2_cva.seeing.describe import Described, by_intensity, by_position, cells, coarser, from_maps, nearest
from nnunetv2_cva.seeing.frozen import Frozen
from nnunetv2_cva.seeing.images import Image, body
from nnunetv2_cva.seeing.look import look, reduced
from nnunetv2_cva.seeing.look_page import _to_file, content
from nnunetv2_cva.seeing.matches import centroids, choose_points, colours, errors_mm, match, regions
from nnunetv2_cva.seeing.propagation import INTENSITY, POSITION, carry, dice, from_first, labels_on, means, one_shot

SIZE = (20, 26, 22)
CENTRES = np.array([(6.5, 8.5, 7.5), (13.5, 17.5, 9.5), (8.5, 20.5, 15.5)])


def phantom(shift=(0, 0, 0), size=SIZE, name="a", seed=0, moved=False):
    """Three blobs of different widths and brightness in a bright body, labelled 1 to 3; noise in the air around. ``moved``: the
    body is shifted with them."""
    grid = np.stack(np.meshgrid(*[np.arange(n) + 0.5 for n in size], indexing="ij"), axis=-1)
    volume = np.random.default_rng(seed).normal(0, 0.02, size)
    inside = (np.abs((grid - np.multiply(moved, shift) - np.divide(size, 2)) / np.divide(size, 2)) < 0.75).all(-1)
    volume[inside] += 1
    labels = np.zeros(size, np.int16)
    for n, (centre, width) in enumerate(zip(CENTRES + shift, (1.5, 2.0, 2.5)), 1):
        distance = ((grid - centre) ** 2).sum(-1)
        volume += (1 + n) * np.exp(-distance / (2 * width**2))
        labels[distance < (1.3 * width) ** 2] = n
    return Image(name, torch.from_numpy(volume[None]).float(), (1.0, 1.5, 2.0), {}, labels=labels)


def described_by_anatomy(image, shift):
    """What an ideal network says: sines of the phantom's own coordinates."""
    grid = (
        torch.stack(torch.meshgrid(*[torch.arange(n) + 0.5 for n in image.size], indexing="ij"))
        - torch.tensor(shift)[:, None, None, None]
    )
    waves = torch.cat([f(grid * w) for w in (0.1, 0.25, 0.6) for f in (torch.sin, torch.cos)])
    return from_maps(image, [DenseMap(waves, (1, 1, 1), (0.0, 0.0, 0.0), image.size)], image.size)


def networks(view=(16, 16, 16)):
    """Two small convolutions as networks."""
    found = {}
    for n, name in enumerate(("trained", "untrained")):
        torch.manual_seed(n)
        layer = torch.nn.Conv3d(1, 6, 5, padding=2).requires_grad_(False)
        taps = (Tap(6, (1, 1, 1), (0.0, 0.0, 0.0)),)
        found[name] = Frozen(name, lambda v, f=layer: [f(v)], taps, view, (1.0, 1.5, 2.0), 1, {}, "", torch.device("cpu"))
    return found


# ---- matches


def test_corresponding_points_are_found_where_the_features_say_so():
    shift = (2, -3, 1)
    a, b = phantom(), phantom(shift, name="b", moved=True)
    source, destination = described_by_anatomy(a, (0, 0, 0)), described_by_anatomy(b, shift)
    found = match(source, CENTRES, destination)
    assert np.abs(found.places - (CENTRES + shift)).max() <= 0.5
    assert found.heat.shape == (3, *SIZE) and (found.best > 0.9).all()
    np.testing.assert_allclose(found.heat.reshape(3, -1).max(1), found.best, atol=1e-5)


def test_nearest_against_a_slow_loop():
    queries, rows = torch.randn(13, 4), torch.randn(50, 4)
    allowed = torch.rand(50) > 0.3
    number, distance = nearest(queries, rows, allowed)
    for q in range(13):
        all_of_them = [float(((queries[q] - r) ** 2).sum()) if a else np.inf for r, a in zip(rows, allowed)]
        assert number[q] == int(np.argmin(all_of_them)) and distance[q] == pytest.approx(min(all_of_them), rel=1e-4)


def test_a_description_at_a_cells_centre_is_that_cells():
    d = by_intensity(phantom(), (10, 13, 11))
    torch.testing.assert_close(d.at(d.centres()[[0, 77, 500]]), d.rows[[0, 77, 500]], atol=1e-4, rtol=1e-4)


def test_chosen_points_are_in_the_body_and_apart():
    d = by_intensity(phantom(), cells(SIZE))
    points = choose_points(d, 5)
    low, high = np.multiply(SIZE, 0.05), np.multiply(SIZE, 0.95)
    assert ((points > low) & (points < high)).all()
    apart = np.linalg.norm((points[:, None] - points[None]) * d.spacing, axis=-1)[np.triu_indices(5, 1)]
    assert apart.min() > 4
    with pytest.raises(ValueError, match="expected at most .* found 100000"):
        choose_points(d, 100_000)


def test_errors_in_mm_of_an_ideal_network_and_of_the_same_place():
    shift = (2, -3, 1)
    images = [phantom(), phantom(shift, name="b")]
    rows = {
        "ideal": [described_by_anatomy(images[0], (0, 0, 0)), described_by_anatomy(images[1], shift)],
        "position": [by_position(i, SIZE) for i in images],
    }
    found = errors_mm(images, rows, (1, 2, 3))
    assert max(found["ideal"]) < 1.5 and len(found["ideal"]) == 3
    assert min(found["position"]) > 2, "the blobs have moved and the body has not"
    np.testing.assert_allclose(centroids(images[0], (1, 9))[0], CENTRES[0], atol=0.3)
    assert np.isnan(centroids(images[0], (9,))).all()


def test_one_colour_means_one_thing_in_all_images():
    shift = (2, -3, 1)
    each = [described_by_anatomy(phantom(), (0, 0, 0)), described_by_anatomy(phantom(shift, moved=True), shift)]
    first, second = (c.reshape(*SIZE, 3) for c in colours(each))
    np.testing.assert_allclose(first[4:14, 8:20, 4:14], second[6:16, 5:17, 5:15], atol=0.15)
    kinds = [r.reshape(SIZE) for r in regions(each, 4)]
    same = kinds[0][4:14, 8:20, 4:14] == kinds[1][6:16, 5:17, 5:15]
    assert same.mean() > 0.85 and kinds[0].max() <= 3 and (kinds[0] == -1).any()


def test_the_body_is_what_is_not_air():
    image = phantom()
    inside = body(image.voxels)
    assert inside[10, 13, 11] and not inside[0, 0, 0] and 0.3 < inside.float().mean() < 0.7
    masked = torch.where(inside, image.voxels, torch.zeros(1))  # normalised within the body only, darker values there
    masked = torch.where(inside, masked - 2, masked)
    assert body(masked).float().mean() == pytest.approx(inside.float().mean().item(), abs=0.1)


@pytest.mark.parametrize("number", [40, 42, 49])
def test_noise_in_the_air_is_no_body(number):
    """The demo's images: everything that is labelled is body, what surrounds it is noise."""
    image, labels = make_case(0, number)
    inside = body(torch.from_numpy((image - image.mean()) / image.std())[None].float()).numpy()
    surrounding = ~enclosed(labels > 0)
    assert inside[labels > 0].mean() > 0.97 and inside[surrounding].mean() < 0.2


# ---- labels carried over


def test_carrying_labels_against_a_slow_loop():
    source = Described(torch.randn(30, 3), (2, 3, 5), (2, 3, 5), (1.0, 1.0, 1.0), torch.ones(30, dtype=torch.bool))
    other = Described(torch.randn(24, 3), (2, 3, 4), (2, 3, 4), (1.0, 1.0, 1.0), torch.ones(24, dtype=torch.bool))
    labels = torch.randint(0, 3, (30,))
    expected = [int(labels[((r - source.rows) ** 2).sum(1).argmin()]) for r in other.rows]
    assert carry(source, labels, other).tolist() == expected


def test_dice_of_labels_that_are_there():
    truth, found = np.array([0, 1, 1, 2, 2]), np.array([0, 1, 0, 2, 1])
    assert dice(found, truth, (1, 2, 3))[:2] == pytest.approx((0.5, 2 / 3)) and np.isnan(dice(found, truth, (3,))[0])


def test_labels_on_a_grid_are_those_of_the_cells_centres():
    labels = np.arange(4 * 6 * 4).reshape(4, 6, 4)
    assert labels_on(labels, (4, 6, 4)).tolist() == labels.ravel().tolist()
    assert labels_on(labels, (2, 2, 2)).tolist() == [labels[i, j, k] for i in (1, 3) for j in (1, 4) for k in (1, 3)]


def test_labels_of_the_first_image_are_carried_to_each_of_the_others():
    """Where the blobs are in another place, an ideal network carries their labels and the same relative position does not; Dice
    against a plain loop over cells."""
    shifts = [(0, 0, 0), (2, -4, 2), (-2, -2, 2)]  # whole cells of the coarser grid
    images, bins = [phantom(shift, name=name) for shift, name in zip(shifts, "abc")], (10, 13, 11)
    rows = {
        "ideal": [coarser(described_by_anatomy(i, s), 10 * 13 * 11) for i, s in zip(images, shifts)],
        "position": [by_position(i, bins) for i in images],
    }
    found = {(c.row, c.target): c for c in from_first(images, rows, (1, 2, 3))}
    assert set(found) == {(row, target) for row in rows for target in "bc"}
    assert all(c.source == "a" for c in found.values())
    assert min(min(found["ideal", t].dice) for t in "bc") > 0.8 > 0.6 > max(max(found["position", t].dice) for t in "bc")
    source, target = rows["position"][0], rows["position"][2]
    known, truth = (labels_on(images[n].labels, bins) for n in (0, 2))
    carried = torch.stack([known[((row - source.rows) ** 2).sum(1).argmin()] for row in target.rows])
    hits = ((carried == 2) & (truth == 2)).sum()
    assert found["position", "c"].dice[1] == pytest.approx(float(2 * hits / ((carried == 2).sum() + (truth == 2).sum())))


def test_a_coarser_description_is_the_mean_of_its_cells():
    d = described_by_anatomy(phantom(), (0, 0, 0))
    coarse = coarser(d, 20 * 26 * 22 // 8)
    assert coarse.bins == (10, 13, 11) and coarser(d, 20 * 26 * 22).bins == d.bins
    expected = d.rows.reshape(10, 2, 13, 2, 11, 2, -1).mean((1, 3, 5)).flatten(0, 2)
    torch.testing.assert_close(coarse.rows, torch.nn.functional.normalize(expected, dim=1), atol=1e-5, rtol=1e-4)


def test_one_shot_rows_see_the_same_windows_and_are_repeatable():
    cases = [phantom((n % 2, -n % 3, 0), name=f"case {n}", seed=n) for n in range(4)]
    first = one_shot(cases, networks(), (1, 2, 3), pairs=3)
    again = one_shot(cases, networks(), (1, 2, 3), pairs=3)
    assert str(first) == str(again) and len(first) == 3 * 4
    assert [c.row for c in first[:4]] == [POSITION, INTENSITY, "trained", "untrained"]
    assert all(c.source != c.target for c in first)
    table = means(first)
    assert all(0 <= mean <= 1 for mean, _ in table.values())
    assert table[INTENSITY][0] > table[POSITION][0], "blobs differ in brightness, windows lie anywhere"
    with pytest.raises(ValueError, match="at least two cases with labels"):
        one_shot(cases[:1], networks(), (1,))


def test_windows_of_large_images_show_their_small_structure():
    big = [phantom(size=(60, 50, 44), name=str(n), seed=n) for n in range(2)]
    for case in big:
        case.labels[case.labels != 3] = 0
    found = one_shot(big, networks((12, 12, 12)), (3,), pairs=4)
    assert not any(np.isnan(c.dice[0]) for c in found)


# ---- pictures


def test_slices_mark_the_point_that_they_go_through():
    volume = np.zeros((10, 20, 30), np.uint8)
    volume[2, 15, 24] = 255
    picture, marks = slices.three(volume, (2.5, 15.5, 24.5), volume.shape, (1.0, 1.0, 1.0), 90)
    assert picture.shape == (90, 270)
    for axis, (row, column) in enumerate(marks):
        assert picture[int(row), int(column)] == 255
        assert axis * 90 <= column < (axis + 1) * 90
    head, _ = slices.three(
        np.arange(10, dtype=np.uint8)[:, None, None].repeat(10, 1).repeat(10, 2), (5, 5, 5), (10,) * 3, (1.0,) * 3, 40
    )
    assert head[0, 41] == 9 and head[39, 41] == 0, "the first axis points up"


def test_numbers_of_a_page_give_the_similarities():
    d = described_by_anatomy(phantom(), (0, 0, 0))
    (rows,), scale, kept = reduced([d], 18)
    exact = d.rows[:50] @ d.rows[200:260].T
    np.testing.assert_allclose(rows[:50].astype(float) @ rows[200:260].astype(float).T / scale**2, exact, atol=0.05)
    assert kept == pytest.approx(1, abs=1e-3)


def test_the_voxels_that_are_named_are_the_files():
    """Cropped, its axes exchanged, resampled to half the voxels: on the picture, the page and in the numbers."""
    properties = {"bbox_used_for_cropping": [[3, 23], [5, 31], [4, 26]]}
    image = Image("a", phantom(size=(10, 13, 11)).voxels, (1.0, 1.0, 1.0), properties, (2, 0, 1))
    file = np.array([14, 20, 7])  # in the file; along the network's axes 7, 14, 20
    point = image.from_file(file[None] + 0.5)[0]
    np.testing.assert_allclose(point, (np.array([7, 14, 20]) + 0.5 - (3, 5, 4)) / 2)
    assert image.voxel(point) == "14 20 7"
    begin, step, order = _to_file(image).values()
    assert [int(begin[a] + point[order.index(a)] * step[a]) for a in range(3)] == file.tolist()


def test_points_outside_are_refused():
    images = [phantom(), phantom(name="b")]
    with pytest.raises(ValueError, match="lies outside a of"):
        look(images, networks(), np.array([[3.0, 3.0, 99.0]]))
    with pytest.raises(ValueError, match="at least two images, found 1"):
        look(images[:1], networks())


# ---- the command, and its page in a browser


@pytest.fixture(scope="module")
def looked(tmp_path_factory):
    """The output of ``look`` on three images."""
    folder = tmp_path_factory.mktemp("look")
    pretraining(folder / "checkpoint_final.pth", target())
    for n in range(3):
        volume = phantom((n, 0, 0), name="").voxels[0].numpy()
        write(folder / f"scan_{n}.nii.gz", (100 * volume + 50).astype(np.float32), (1.0, 1.0, 1.0))
    files = [folder / f"scan_{n}.nii.gz" for n in range(3)]
    assert call("look", folder / "checkpoint_final.pth", "-i", *files, "-o", folder / "out", "--count", 2, "-device", "cpu") == 0
    return folder / "out"


def test_the_command_writes_a_picture_and_a_page_that_needs_nothing_else(looked):
    from matplotlib.image import imread

    assert imread(looked / "look.png").shape[1] > 600
    text = (looked / "look.html").read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)|https?://""", text)
    shown = json.loads(re.search(r"const LOOK = (.*);\n", text).group(1))
    assert [i["name"] for i in shown["images"]] == ["scan_0", "scan_1", "scan_2"]
    assert [n["name"] for n in shown["networks"]] == ["trained", "untrained"]


def test_content_of_a_page_is_that_of_the_look():
    images = [phantom(), phantom(name="b")]
    found = look(images, networks(), np.array([[6.5, 8.5, 7.5]]))
    assert content(found)["point"] == [6.5, 8.5, 7.5]


@pytest.mark.skipif(browser() is None, reason="no chromium or chrome here to open the page with")
@pytest.mark.parametrize("width", [1200, 390])
def test_a_click_in_the_first_image_shows_heat_in_the_others(looked, width):
    script = """
      const canvases = [...document.querySelectorAll("canvas")];
      const before = canvases.map(c => c.toDataURL());
      const caption = canvases[1].previousSibling.textContent;
      const box = canvases[0].getBoundingClientRect();
      const at = {clientX: box.left + box.width * 0.14, clientY: box.top + box.height * 0.3};
      canvases[0].dispatchEvent(new PointerEvent("pointerdown", at));
      const changed = canvases.map((c, n) => c.toDataURL() !== before[n]);
      document.title = JSON.stringify({count: canvases.length, changed: changed.filter(Boolean).length, caption,
        wide: document.documentElement.scrollWidth});
    """
    found = browse(looked / "look.html", width, script)
    seen = json.loads(found.title)
    assert found.errors == [] and found.requests == []
    assert seen["count"] == 6 and seen["changed"] == 6, "both networks, three images"
    assert re.search(r"scan_1, similarity \d\.\d\d, voxel \d+ \d+ \d+$", seen["caption"]) and seen["wide"] <= width


def test_a_second_file_is_a_row_of_its_own(looked, tmp_path, capsys):
    """By the same weights the same matches, by others others; a file that expects other images is refused."""
    files, weights = sorted(looked.parent.glob("scan_*.nii.gz"))[:2], looked.parent / "checkpoint_final.pth"
    pretraining(tmp_path / "other.pth", target(view=(16, 16, 16)), seed=5)  # of another view: for whole images that is no matter
    for against in (weights, tmp_path / "other.pth"):
        assert call("look", weights, "-i", *files, "-o", tmp_path, "--against", against, "--count", 3, "-device", "cpu") == 0
        told = {m["network"]: m for m in json.loads((tmp_path / "look.json").read_text())["matches"]}
        assert list(told) == ["trained", "untrained", "against"]
        assert (told["against"]["similarity"] == told["trained"]["similarity"]) == (against == weights)
    assert [n["name"] for n in page_content(tmp_path)["networks"]] == ["trained", "untrained", "against"]
    pretraining(tmp_path / "coarse.pth", target(spacing=(1.0, 1.0, 3.0)))
    assert call("look", weights, "-i", *files, "-o", tmp_path, "--against", tmp_path / "coarse.pth") == 2
    assert re.search(r"coarse.pth expects other images than .*checkpoint_final.pth, .* spacing", capsys.readouterr().err)


def page_content(folder):
    return json.loads(re.search(r"const LOOK = (.*);\n", (folder / "look.html").read_text()).group(1))


def test_labels_of_a_target_give_tables(tmp_path, monkeypatch, capsys):
    raw = tmp_path / "nnUNet_raw"
    monkeypatch.setenv("nnUNet_raw", str(raw))
    pretraining(tmp_path / "w.pth", target(view=(16, 16, 16)))
    for n in range(3):
        p = phantom((n, 0, 0), seed=n)
        write(raw / "Dataset009_Blobs" / "imagesTr" / f"b{n}_0000.nii.gz", (100 * p.voxels[0].numpy() + 50).astype(np.float32))
        write(raw / "Dataset009_Blobs" / "labelsTr" / f"b{n}.nii.gz", p.labels.astype(np.uint8))
    about = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "x": 1, "y": 2, "z": 3}, "file_ending": ".nii.gz"}
    (raw / "Dataset009_Blobs" / "dataset.json").write_text(json.dumps(about))
    arguments = ("look", tmp_path / "w.pth", "--target", 9, "-o", tmp_path / "out", "--pairs", 2, "--count", 1, "-device", "cpu")
    assert call(*arguments) == 0
    out = capsys.readouterr().out
    for row in ("same relative position", "position", "intensity", "trained", "untrained"):
        assert re.search(rf"^  {row} ", out, re.MULTILINE), row
    told = json.loads((tmp_path / "out" / "look.json").read_text())
    titles = [t["title"] for t in told["tables"]]
    assert "Centroids of labels of b0 found in the others" in titles[0]
    assert "Labels of b0 carried to b1, b2 by nearest features, whole images" in titles[1] and "2 pairs" in titles[2]
    rows = [[r[0] for r in t["rows"]] for t in told["tables"]]
    assert rows[0] == rows[1] == ["same relative position", "intensity", "trained", "untrained"]
    assert told["tables"][1]["header"] == ["by", "mean, 95 % interval", "x", "y", "z"]
    page = (tmp_path / "out" / "look.html").read_text()
    assert all(t in out and f"<h2>{t}</h2>" in page for t in titles[1:])
    assert call(*arguments, "-i", "b7", "b1") == 2 and "no labelled case 'b7'" in capsys.readouterr().err


def test_points_of_a_file_are_voxels_of_the_first_image(tmp_path, looked, capsys):
    (tmp_path / "points.csv").write_bytes("i;j;k\r\n6;8;7\r\n13; 17;9\r\n".encode("utf-16"))  # as a spreadsheet saves it
    files = sorted(looked.parent.glob("scan_*.nii.gz"))[:2]
    weights = looked.parent / "checkpoint_final.pth"
    assert call("look", weights, "-i", *files, "-o", tmp_path, "--points", tmp_path / "points.csv", "-device", "cpu") == 0
    shown = page_content(tmp_path)
    assert shown["point"] == pytest.approx([6.5, 8.5, 7.5], abs=0.01)
    told = json.loads((tmp_path / "look.json").read_text())
    assert told["image"] == "scan_0" and told["points"] == [[6, 8, 7], [13, 17, 9]] and told["tables"] == []
    assert [(m["network"], m["image"], len(m["places"])) for m in told["matches"]] == [
        ("trained", "scan_1", 2),
        ("untrained", "scan_1", 2),
    ]
    (tmp_path / "points.csv").write_text("here\n")
    assert call("look", weights, "-i", *files, "-o", tmp_path, "--points", tmp_path / "points.csv") == 2
    assert "expected three numbers i,j,k a line" in capsys.readouterr().err
