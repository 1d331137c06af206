"""Features as files: vectors, windows and maps of images, resumable, and maps in the space of their image."""

import csv
import re

import blosc2
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from helpers.images import voxels, write
from helpers.targets import call, pretraining, randomised, stock_checkpoint, target
from test_nnssl_format import open_mind

from nnunetv2_cva import embed_image, load_network
from nnunetv2_cva.seeing import embedding
from nnunetv2_cva.seeing.dense import DenseMap, on_grid
from nnunetv2_cva.seeing.frozen import load_frozen, untrained
from nnunetv2_cva.seeing.images import Image, find_images, preprocess

CHANNELS = 4 + 6 + 8


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A pretraining's checkpoint, never trained."""
    path = tmp_path_factory.mktemp("weights") / "checkpoint_final.pth"
    pretraining(path, target(spacing=(1.0, 1.0, 1.0)))
    return path


@pytest.fixture
def images(tmp_path):
    """Larger than the view of 16x24x32, smaller, and not divisible."""
    for i, shape in enumerate([(40, 30, 36), (14, 18, 16), (21, 33, 29)]):
        write(tmp_path / "images" / f"scan_{i}_0000.nii.gz", voxels(i, shape), (1.0, 1.5, 1.0))
    return tmp_path / "images"


def run(weights, images, out, *more):
    return call("embed", weights, "-i", images, "-o", out, "-device", "cpu", *more)


def test_a_vector_for_every_image_and_a_table_of_all(weights, images, tmp_path):
    assert run(weights, images, tmp_path / "out") == 0
    with np.load(tmp_path / "out" / embedding.VECTORS) as content:
        names, vectors = content["names"], content["vectors"]
    assert list(names) == ["scan_0", "scan_1", "scan_2"] and vectors.shape == (3, CHANNELS)
    rows = list(csv.reader((tmp_path / "out" / embedding.TABLE).read_text().splitlines()))
    assert rows[0] == ["image", *(f"f{i}" for i in range(CHANNELS))] and rows[2][0] == "scan_1"
    np.testing.assert_allclose(np.array(rows[3][1:], float), vectors[2], rtol=1e-4)


def test_an_image_of_one_window_has_the_means_of_the_networks_own_maps(weights, tmp_path):
    write(tmp_path / "one.nii.gz", voxels(0, (16, 24, 32), air=0))
    network = load_frozen(weights)
    (found,) = find_images([str(tmp_path / "one.nii.gz")], 1)
    embedding.embed(found, network, embedding.Wanted("image", tmp_path))
    image = preprocess(found, network)
    with torch.inference_mode():
        expected = torch.cat([m.mean(dim=(0, 2, 3, 4)) for m in network.encode(image.voxels[None])])
    np.testing.assert_allclose(np.load(tmp_path / "one.npz")["vector"], expected, rtol=1e-3, atol=1e-5)


def test_parts_and_a_second_run_do_only_what_is_missing(weights, images, tmp_path, monkeypatch, capsys):
    done = []
    real = embedding.embed
    monkeypatch.setattr(embedding, "embed", lambda found, *a, **k: done.append(found.name) or real(found, *a, **k))
    assert run(weights, images, tmp_path / "out", "-part", 1, "-parts", 2) == 0
    assert done == ["scan_1"] and "2 of 3 images are still missing" in capsys.readouterr().out
    assert run(weights, images, tmp_path / "out") == 0
    assert done == ["scan_1", "scan_0", "scan_2"] and (tmp_path / "out" / embedding.TABLE).is_file()
    assert run(weights, images, tmp_path / "out") == 0 and len(done) == 3


def test_a_folder_of_other_features_is_refused(weights, images, tmp_path, capsys):
    assert run(weights, images, tmp_path / "out") == 0
    assert run(weights, images, tmp_path / "out", "--taps", -1) == 2
    assert "computed otherwise (taps: None, now [-1])" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["scan_0", "scan_1", "scan_2"])
def test_python_gives_what_the_command_writes(weights, images, tmp_path, name):
    """Of images larger and smaller than the view, and not divisible: maps, their place, the vector, and the map on the voxels."""
    file = images / f"{name}_0000.nii.gz"
    loaded = load_network(weights)
    found = embed_image(loaded, file, taps=[0, -1])
    assert run(weights, file, tmp_path / "npz", "--level", "dense", "--taps", 0, -1) == 0
    assert run(weights, file, tmp_path / "image", "--taps", 0, -1) == 0
    assert run(weights, file, tmp_path / "nifti", "--level", "dense", "--taps", -1, "--format", "nifti") == 0
    with np.load(tmp_path / "npz" / f"{name}.npz") as content:
        for m, tap in zip(found.maps, (0, 2), strict=True):
            np.testing.assert_array_equal(m.values, content[f"tap{tap}"])
            assert list(m.stride) == content[f"tap{tap}_stride"].tolist()
            np.testing.assert_array_equal(m.offset, content[f"tap{tap}_offset"])
    with np.load(tmp_path / "image" / f"{name}.npz") as content:
        np.testing.assert_array_equal(found.vector, content["vector"])
    written = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "nifti" / f"{name}_tap2.nii.gz")))
    np.testing.assert_array_equal(found.on_image(1), written)
    assert all(p.requires_grad for p in loaded.network.parameters()), "the network is as it was"


def test_the_place_of_a_cell_is_that_of_its_voxel():
    """Cropped, its axes exchanged, of half the spacing: at a centre the map on the image's voxels has the cell's value."""
    properties = {"bbox_used_for_cropping": [[3, 15], [5, 29], [2, 22]], "shape_before_cropping": (20, 32, 25)}
    image = Image("a", torch.zeros(1, 24, 48, 40), (1.0, 1.0, 1.0), properties, (2, 0, 1))
    axes = torch.meshgrid(torch.arange(6.0), torch.arange(12.0), torch.arange(10.0), indexing="ij")
    found = embedding.Embedded((DenseMap(torch.stack(axes), (4, 4, 4), (1.0, 1.0, -1.0), image.size),), image)
    centres = found.centres(0)
    assert centres.shape == (6, 12, 10, 3)
    at = centres[3, 7, 5]  # 12 + 2 + 1, 28 + 2 + 1, 20 + 2 - 1 of the preprocessed image; half of it, and the crop, in the file
    np.testing.assert_allclose(at, [31 / 2 + 5, 21 / 2 + 2, 15 / 2 + 3])
    values = found.on_image(0)
    assert values.shape == (32, 25, 20, 3)
    corners = [values[tuple(np.floor(at - 0.5).astype(int) + (i, j, k))] for i in (0, 1) for j in (0, 1) for k in (0, 1)]
    np.testing.assert_allclose(np.mean(corners, 0), [3, 7, 5], atol=0.26)  # voxels of half a cell around it


def test_python_takes_any_channel_of_an_image(tmp_path):
    pretraining(tmp_path / "w.pth", target(channels=2))
    for c in range(2):
        write(tmp_path / f"a_{c:04d}.nii.gz", voxels(c, (21, 33, 29)))
    loaded = load_network(tmp_path / "w.pth")
    first, second = (embed_image(loaded, tmp_path / f"a_{c:04d}.nii.gz", taps=[-1]).vector for c in range(2))
    np.testing.assert_array_equal(first, second)
    (tmp_path / "a_0001.nii.gz").unlink()
    with pytest.raises(ValueError, match="Image a: expected 2 files a_0000"):
        embed_image(loaded, tmp_path / "a_0000.nii.gz")
    with pytest.raises(ValueError, match=r"Taps: expected numbers from 0 to 2 .*, found \[7\]"):
        write(tmp_path / "a_0001.nii.gz", voxels(1, (21, 33, 29)))
        embed_image(loaded, tmp_path / "a_0000.nii.gz", taps=[7])


def test_windows_and_chosen_taps(weights, images, tmp_path):
    assert run(weights, images, tmp_path / "out", "--level", "windows", "--taps", 0, -1) == 0
    with np.load(tmp_path / "out" / "scan_0.npz") as content:
        assert content["vectors"].shape == (len(content["starts"]), 4 + 8) and content["taps"].tolist() == [0, 2]
        assert len(content["starts"]) > 1


def test_maps_as_arrays_say_where_their_cells_are(weights, images, tmp_path):
    for form in ("npz", "b2nd"):
        assert run(weights, images, tmp_path / form, "--level", "dense", "--taps", 1, "--format", form) == 0
    with np.load(tmp_path / "npz" / "scan_2.npz") as content:
        values, stride, offset = content["tap1"], content["tap1_stride"], content["tap1_offset"]
    stored = blosc2.open(str(tmp_path / "b2nd" / "scan_2_tap1.b2nd"))
    np.testing.assert_array_equal(stored[:], values)
    place = stored.schunk.vlmeta["cva"]
    assert place["stride"] == stride.tolist() == [2, 2, 2] and place["offset"] == offset.tolist()
    assert values.shape[0] == 6


def lps_of(array_index, image):
    """Where in the world a voxel of the array is: the laws of the format itself."""
    return image.TransformContinuousIndexToPhysicalPoint([float(v) for v in array_index[::-1]])


@pytest.mark.parametrize(
    "direction",
    [
        pytest.param((-1, 0, 0, 0, -1, 0, 0, 0, 1), id="flipped"),
        pytest.param((0, 0, -1, 1, 0, 0, 0, 1, 0), id="permuted and flipped"),
        pytest.param((0.8, -0.6, 0, 0.6, 0.8, 0, 0, 0, 1), id="oblique"),
    ],
)
def test_a_map_of_an_image_with_other_axes_lies_on_it(weights, tmp_path, direction):
    """The features of a bright ball stand out where in the world the ball is, to 3 mm; an axis flipped or exchanged would be
    8 mm or more."""
    shape, ball = (22, 30, 26), (15, 9, 17)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), axis=-1)
    volume = np.random.default_rng(0).normal(100, 1, shape) + 1000 * (((grid - ball) ** 2).sum(-1) < 16)
    image = sitk.GetImageFromArray(volume.astype(np.float32))
    image.SetDirection(direction)
    image.SetSpacing((1.2, 0.9, 1.0))
    image.SetOrigin((-30, 12, 7))
    sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))
    assert run(weights, tmp_path / "a.nii.gz", tmp_path / "out", "--level", "dense", "--taps", 0, "--format", "nifti") == 0
    found = sitk.ReadImage(str(tmp_path / "out" / "a_tap0.nii.gz"))
    values = sitk.GetArrayFromImage(found)
    assert values.shape == (*shape, 4)
    far = np.abs(values - np.median(values, axis=(0, 1, 2))).sum(-1)
    place = np.argwhere(far > 0.5 * far.max()).mean(0)
    np.testing.assert_allclose(lps_of(place, found), lps_of(ball, image), atol=3)
    corner = [n - 1 for n in shape]
    np.testing.assert_allclose(lps_of(corner, found), lps_of(corner, image), atol=1e-3)


def test_a_map_of_an_image_with_skewed_axes_lies_on_it(weights, tmp_path):
    """SimpleITK refuses such a file and nnU-Net's other reader takes it: the map has that file's affine, and a value of its own
    for each of its voxels."""
    affine = np.array([[1, 0.3, 0, 5], [0, 1, 0, -7], [0, 0, 1.5, 2], [0, 0, 0, 1.0]])
    nib.save(nib.Nifti1Image(voxels(0, (26, 30, 22), air=0).astype(np.float32), affine), tmp_path / "a.nii.gz")
    assert run(weights, tmp_path / "a.nii.gz", tmp_path / "out", "--level", "dense", "--taps", 0, "--format", "nifti") == 0
    found = nib.load(tmp_path / "out" / "a_tap0.nii.gz")
    assert found.shape == (26, 30, 22, 1, 4) and found.header.get_intent()[0] == "vector"
    np.testing.assert_allclose(found.affine, affine, atol=1e-5)


def nnssl_unet(path):
    """In nnssl's layout, encoder only."""
    return open_mind(path, target(), randomised(target().build()), "ResidualEncoderUNet", drop=["decoder."])


def stock_primus(path):
    """As nnU-Net's trainer of a Primus saves it."""
    made = target("primus")
    return stock_checkpoint(path, made, randomised(made.build()))


def pretrained_primus(path):
    """A pretraining's."""
    pretraining(path, target("primus"))
    return path


@pytest.mark.parametrize("make, channels, grid", [(nnssl_unet, 18, 1), (stock_primus, 48, 8), (pretrained_primus, 48, 8)])
def test_any_weights_that_info_reads_are_a_source(make, channels, grid, images, tmp_path, monkeypatch):
    monkeypatch.setattr("nnunetv2_cva.transfer.target.trainer_class", lambda name: target("primus").trainer)
    file = make(tmp_path / "foreign.pth")
    assert run(file, images, tmp_path / "image") == 0
    with np.load(tmp_path / "image" / embedding.VECTORS) as content:
        assert content["vectors"].shape == (3, channels) and np.isfinite(content["vectors"]).all()
        assert np.ptp(content["vectors"], axis=0).max() > 1e-3, "images differ"
    assert run(file, images, tmp_path / "dense", "--level", "dense", "--taps", 0) == 0
    with np.load(tmp_path / "dense" / "scan_2.npz") as content:
        assert content["tap0_stride"].tolist() == [grid] * 3
        cells = [len([c for c in range(99) if 0 <= s * (c + 0.5) + o < n]) for s, o, n in zip(*place(content))]
        assert list(content["tap0"].shape[1:]) == cells, "the cells whose centre lies in the image"


def not_resampled(path):
    """As nnFoundation's files say it: the spacing of the plans is null."""
    nnssl_unet(path)
    content = torch.load(path, weights_only=True)
    plan = content["nnssl_adaptation_plan"]["pretrain_plan"]
    plan["configurations"] = {"noresample": {**plan["configurations"]["onemmiso"], "spacing": None}}
    torch.save(content, path)
    return path


def test_images_of_a_network_that_was_not_resampled_stay_as_they_are(tmp_path, capsys):
    """Law: the voxels alone decide, whatever spacing a file has; millimetres are those of the file."""
    weights, shape = not_resampled(tmp_path / "f.pth"), (15, 22, 30)
    spacings = {"fine": (0.5, 0.5, 0.5), "thick": (4.0, 0.7, 0.9)}
    for name, spacing in spacings.items():
        write(tmp_path / "images" / f"{name}.nii.gz", voxels(0, shape, air=0), spacing)
        (found,) = find_images([str(tmp_path / "images" / f"{name}.nii.gz")], 1)
        image = preprocess(found, load_frozen(weights))
        assert image.size == shape and image.spacing == pytest.approx(spacing)
        expected = voxels(0, shape, air=0)
        np.testing.assert_allclose(image.voxels[0], (expected - expected.mean()) / expected.std(), atol=1e-4)
    assert run(weights, tmp_path / "images", tmp_path / "out") == 0
    with np.load(tmp_path / "out" / embedding.VECTORS) as content:
        np.testing.assert_array_equal(*content["vectors"])
    files = [str(tmp_path / "images" / f"{name}.nii.gz") for name in spacings]
    assert call("look", weights, "-i", *files, "-o", tmp_path / "look", "-device", "cpu") == 0
    page = (tmp_path / "look" / "look.html").read_text()
    assert [float(s) for s in re.findall(r'"spacing": ?\[([\d.]+)', page)] == [0.5, 4.0]
    for n, name in enumerate(spacings):  # images enough for two folds
        write(tmp_path / "images" / f"{name}_again.nii.gz", voxels(n, shape, air=0), spacings[name])
    rows = [f"images/{name}{again}.nii.gz,{name}" for name in spacings for again in ("", "_again")]
    (tmp_path / "labels.csv").write_text("\n".join(["path,label", *rows]))
    arguments = ("probe", weights, "--csv", tmp_path / "labels.csv", "--folds", 2, "-o", tmp_path / "probe", "-device", "cpu")
    assert call(*arguments) == 0 and (tmp_path / "probe" / "probe.csv").is_file()
    other = nnssl_unet(tmp_path / "resampled.pth")
    assert call("look", weights, "--against", other, "-i", *files, "-o", tmp_path / "both", "-device", "cpu") == 2
    assert "expected spacing of the image, found (1.0, 1.0, 1.0)" in capsys.readouterr().err


def place(content):
    """Of tap 0: stride, offset, and the size of the image."""
    return content["tap0_stride"], content["tap0_offset"], content["size"]


def test_a_map_in_nifti_lies_on_its_image(weights, images, tmp_path):
    assert (
        run(weights, images / "scan_2_0000.nii.gz", tmp_path / "out", "--level", "dense", "--taps", 0, "--format", "nifti") == 0
    )
    image = sitk.ReadImage(str(images / "scan_2_0000.nii.gz"))
    found = sitk.ReadImage(str(tmp_path / "out" / "scan_2_tap0.nii.gz"))
    assert found.GetSize() == image.GetSize() and found.GetNumberOfComponentsPerPixel() == 4
    np.testing.assert_allclose(found.GetSpacing(), image.GetSpacing(), rtol=1e-6)
    values = sitk.GetArrayFromImage(found)
    assert (values[0] == 0).all() and (values[10, 15, 12] != 0).any(), "cropped voxels are 0, others not"


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_a_ramp_in_the_space_of_the_file_is_a_ramp_to_a_tenth_of_a_voxel(order):
    """Cropped, its axes exchanged, resampled, mapped with stride 4 and an offset, and back."""
    shape = [30, 44, 38]
    box = [[3, 27], [5, 41], [0, 38]]  # in network order
    size = (48, 30, 50)
    properties = {"bbox_used_for_cropping": box, "shape_before_cropping": tuple(shape)}
    image = Image("a", torch.zeros(1, *size), (1.0, 1.0, 1.0), properties, order)
    cells, stride, offset = (14, 9, 14), (4, 4, 4), (-3.25, -1.0, 0.5)
    centres = [s * (torch.arange(n) + 0.5) + o for n, s, o in zip(cells, stride, offset)]
    values = torch.stack(torch.meshgrid(*centres, indexing="ij"))  # every cell knows where in the preprocessed image it is
    found = embedding.in_file_space(DenseMap(values, stride, offset, size), image)
    assert found.shape[:3] == tuple(np.array(shape)[np.argsort(order)])
    rng = np.random.default_rng(0)
    inside = np.stack([rng.integers(a, b, 200) for a, b in box], axis=1)
    voxel = np.empty_like(inside)
    voxel[:, list(order)] = inside  # axes of the file
    expected = image.from_file(voxel + 0.5)
    assert np.abs(found[tuple(voxel.T)] - expected).max() < 0.1
    np.testing.assert_allclose(image.to_file(expected), voxel + 0.5)


def test_nnunets_resampling_puts_voxels_where_from_file_says(weights, tmp_path):
    """A bright blob in a file of another spacing: its centre of mass, before and after."""
    grid = np.stack(np.meshgrid(*[np.arange(n) + 0.5 for n in (30, 40, 36)], indexing="ij"), axis=-1)
    centre = np.array([12.2, 22.7, 17.9])
    blob = 10 + 1000 * np.exp(-(((grid - centre) / 3) ** 2).sum(-1))
    write(tmp_path / "blob.nii.gz", blob.astype(np.float32), (1.0, 0.8, 1.7))
    image = preprocess(find_images([str(tmp_path / "blob.nii.gz")], 1)[0], load_frozen(weights))
    weight = (image.voxels[0] - image.voxels.min()).clamp_min(0).double() ** 2
    axes = [torch.arange(n, dtype=torch.float64) + 0.5 for n in image.size]
    found = [float((weight.sum([b for b in range(3) if b != a]) * axes[a]).sum() / weight.sum()) for a in range(3)]
    np.testing.assert_allclose(found, image.from_file(centre[None])[0], atol=0.1)


def test_teacher_and_untrained_are_other_networks(weights):
    views = torch.randn(1, 1, 16, 24, 32)
    with torch.inference_mode():
        maps = [n.encode(views)[0] for n in (load_frozen(weights), load_frozen(weights, "teacher"), untrained(weights))]
        assert torch.equal(maps[2], untrained(weights).encode(views)[0])
    assert all(not torch.allclose(maps[a], maps[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_networks_of_several_channels_want_nnunets_names(tmp_path):
    for c in range(2):
        write(tmp_path / f"a_{c:04d}.nii.gz", voxels(c))
    (found,) = find_images([str(tmp_path)], 2)
    assert found.name == "a" and [f[-11:-7] for f in found.files] == ["0000", "0001"]
    with pytest.raises(ValueError, match=r"Image a: expected 3 files a_0000, \.\.\., as the network has 3 channel"):
        find_images([str(tmp_path)], 3)
    with pytest.raises(ValueError, match="expected an image or a folder of images, found neither"):
        find_images([str(tmp_path / "none")], 1)


def test_a_checkpoint_that_does_not_say_how_images_are_preprocessed(weights, tmp_path):
    content = torch.load(weights, weights_only=False)
    content["init_args"]["plans"]["configurations"]["3d_fullres"].pop("normalization_schemes")
    torch.save(content, tmp_path / "less.pth")
    with pytest.raises(ValueError):
        load_frozen(tmp_path / "less.pth")


def test_a_grid_and_a_map_agree_where_every_voxel_is_a_cell():
    m = DenseMap(torch.randn(2, 4, 6, 5), (1, 1, 1), (0.0, 0.0, 0.0), (4, 6, 5))
    torch.testing.assert_close(on_grid([m], (4, 6, 5), exactly=True), m.values, atol=1e-5, rtol=1e-5)
