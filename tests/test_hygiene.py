"""Broken files are found, each with its reason, and the rest goes on."""

import bz2
import csv
import gzip
import json
import os
import re
import signal

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from helpers.images import SHAPE, voxels, write, write_several
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

from nnunetv2_cva.datasets import findings, inventory, parallel, reading
from nnunetv2_cva.datasets.inventory import read_accepted, read_rejected, save_lists, take_inventory
from nnunetv2_cva.datasets.sources import Candidate, Sources, candidates


def nothing(*_):
    pass


def look(folder, *images, own="Dataset500_Test", processes=1, **options):
    sources = Sources(tuple(map(str, images)), **options)
    found = take_inventory(folder, sources, own, processes, nothing)
    save_lists(folder, sources, found)
    return found


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    return path


def damaged(path):
    """One byte flipped in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))
    return path


def write_packed(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(image), str(path), True)
    return path


def make_zoo(folder):
    """Writes broken files; returns the reason that each must get, by case name."""
    image = voxels()
    write(folder / "good.nii.gz", voxels(1))
    reasons = {}

    def broken(name, reason, file=None):
        reasons["zoo__" + name.partition(".")[0]] = reason
        return folder / name if file is None else file

    for ending in ("nii.gz", "nii", "nrrd", "mha", "gipl"):
        short = ending.replace(".", "")
        broken(f"empty_{short}", "empty file", (folder / f"empty_{short}.{ending}").write_bytes(b""))
        (folder / f"garbage_{short}.{ending}").write_bytes(os.urandom(4000))
        broken(f"garbage_{short}", "unreadable header")
    truncated(write(broken("short_gz.nii.gz", "truncated: the compressed data ends early"), image))
    truncated(write(broken("short_nii.nii", "truncated: .* expected"), image))
    truncated(write(broken("short_gipl.gipl", "truncated: .* expected"), image))
    truncated(write(broken("short_nrrd.nrrd", "truncated: .* expected"), image))
    truncated(write(broken("short_mha.mha", "truncated: .* expected"), image))
    for ending in ("mha", "nrrd"):
        truncated(write_packed(broken(f"short_packed_{ending}.{ending}", "truncated: the compressed data ends early"), image))
        damaged(write_packed(broken(f"flipped_{ending}.{ending}", "damaged: "), image))
    whole = gzip.decompress(write(folder / "x.nii.gz", image).read_bytes())
    (folder / "x.nii.gz").unlink()
    broken("short_inside.nii.gz", "truncated: .* expected").write_bytes(gzip.compress(whole[:-100]))
    damaged(write(broken("flipped.nii.gz", "damaged|unreadable"), image))
    write(broken("four_d.nii.gz", "4D: shape 16x18x14x3"), np.stack([image] * 3))
    write(broken("slice.nii.gz", "not a volume"), image[:1])
    sitk.WriteImage(sitk.GetImageFromArray(image[5].astype(np.float32)), str(broken("flat.nii.gz", "not a volume")))
    sitk.WriteImage(sitk.GetImageFromArray(np.stack([image] * 3, -1), isVector=True), str(broken("rgb.mha", "4D")))
    write(broken("zeros.nii.gz", "all voxels are 0"), np.zeros(SHAPE, np.int16))
    write(broken("constant.nrrd", "all voxels are 7"), np.full(SHAPE, 7, np.int16))
    for name, value, type_ in (
        ("nan.nii.gz", np.nan, "f4"),
        ("inf.nii.gz", np.inf, "f8"),
        ("nan_n.nrrd", np.nan, "f4"),
        ("inf_u.nii", -np.inf, "f4"),
    ):
        bad = voxels(3).astype(type_)
        bad[5, 6, 7] = value
        write(broken(name, "NaN or Inf in 1 voxels"), bad)
    write(broken("coarse.nii.gz", "absurd spacing: 1x1x200 mm"), voxels(4), (200, 1, 1))
    write(broken("fine.nrrd", "absurd spacing"), voxels(5), (1, 1, 1e-5))
    write(broken("long.nrrd", "absurd size: shape 8200x6x5"), voxels(6, (5, 6, 8200)))
    write(
        broken("labels.nii.gz", "looks like a segmentation: only 3 different values"),
        (image > 0).astype(np.uint8) + (image > 220),
    )
    spot = np.zeros(SHAPE, np.float32)
    spot[3, 4, 5] = 0.5
    write(broken("spot.nii.gz", "next to nothing in it: what is not zero takes 1x1x1 voxels"), spot)
    spot[3:9, 4:10, 5:11] = 0.5
    write(broken("box.nii.gz", "all or nearly all voxels that are not air are 0.5"), spot)
    speckles = np.zeros((140, 140, 140), np.float32)  # the coarse grid that statistics are taken from misses all of them
    speckles[[1, 2, 2, 136], [2, 1, 2, 136], [2, 2, 1, 136]] = (3.5, 4, 5, 6)
    write(broken("speckles.nii.gz", "all or nearly all voxels that are not air are 0"), speckles)
    odd = bytearray(write(broken("no_spacing.nii", "absurd spacing: 0x1x1 mm"), voxels(8)).read_bytes())
    odd[80:84] = bytes(4)  # pixdim[1]; nibabel and SimpleITK make 1 mm of it
    (folder / "no_spacing.nii").write_bytes(bytes(odd))
    nibabel.save(nibabel.Nifti1Image(voxels(9) * (1 + 2j), np.eye(4)), broken("complex.nii.gz", "its voxels are complex numbers"))
    tifffile.imwrite(broken("beside_0000.tif", "spacing beside it cannot be read: .* in beside.json"), voxels(10))
    (folder / "beside.json").write_text("")
    (folder / os.fsdecode(b"M\xfcller.nii.gz")).write_bytes((folder / "good.nii.gz").read_bytes())
    reasons["zoo__M_ller"] = "its name is not UTF-8"
    write(broken("twin.nrrd", "duplicate of zoo__good"), voxels(1))
    write(folder / "deep" / "er" / "good.mha", voxels(7))
    return reasons


def test_every_broken_file_is_rejected_with_its_reason_and_the_others_are_used(tmp_path):
    reasons = make_zoo(tmp_path / "zoo")
    out = tmp_path / "out"
    found = look(out, tmp_path / "zoo")
    assert [f.key for f in found.accepted] == ["zoo__deep__er__good", "zoo__good"]
    assert {f.key for f in found.rejected} == set(reasons)
    for finding in found.rejected:
        assert re.search(reasons[finding.key], finding.reason), (finding.key, finding.reason)
    listed = read_rejected(out)
    assert [(key, reason) for key, reason, _ in listed] == [(f.key, f.reason) for f in found.rejected]
    assert all(os.path.isfile(path) for _, _, path in listed)  # also names that are not UTF-8
    assert [f.key for f in read_accepted(out)] == [f.key for f in found.accepted]


def test_simpleitk_reads_a_truncated_file_without_an_error(tmp_path):
    """Why files are measured before they are read. When this fails, ITK has been mended."""
    path = truncated(write(tmp_path / "a.nii.gz", voxels()))
    read, _ = SimpleITKIO().read_images((str(path),))
    assert read.shape == (1, *SHAPE)
    with pytest.raises(reading.Unusable, match="truncated"):
        reading.read_images((str(path),))


def test_simpleitk_reads_nan_as_zero(tmp_path):
    bad = voxels().astype(np.float32)
    bad[5, 6, 7] = np.nan
    path = write(tmp_path / "a.nii.gz", bad)
    read, _ = SimpleITKIO().read_images((str(path),))
    assert read[0, 5, 6, 7] == 0
    with pytest.raises(reading.Unusable, match="NaN or Inf in 1 voxels"):
        reading.read_images((str(path),))


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha", ".gipl"])
def test_good_files_are_read_by_nnunets_readers(tmp_path, ending):
    path = write(tmp_path / f"a{ending}", voxels(), (3.0, 1.5, 0.75))
    read = reading.read_images((str(path),))
    images, properties = read.images, read.properties
    assert images.shape == (1, *SHAPE) and images.dtype == np.float32
    assert (images[0] == voxels()).all()
    assert np.allclose(properties["spacing"], (3.0, 1.5, 0.75))


def test_tif_is_read_as_a_volume_with_the_spacing_beside_it(tmp_path):
    tifffile.imwrite(tmp_path / "a_0000.tif", voxels())
    (tmp_path / "a.json").write_text(json.dumps({"spacing": [2.0, 1.0, 1.0]}))
    read = reading.read_images((str(tmp_path / "a_0000.tif"),))
    images, properties = read.images, read.properties
    assert images.shape == (1, *SHAPE) and list(properties["spacing"]) == [2.0, 1.0, 1.0]


def test_skewed_directions_are_read_as_nnunet_does(tmp_path):
    """SimpleITK refuses them; nnU-Net's next reader does not."""
    affine = np.array([[1, 0.2, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    nibabel.save(nibabel.Nifti1Image(voxels().transpose(2, 1, 0), affine), tmp_path / "a.nii.gz")
    with pytest.raises(RuntimeError, match="orthonormal"):
        SimpleITKIO().read_images((str(tmp_path / "a.nii.gz"),))
    images = reading.read_images((str(tmp_path / "a.nii.gz"),)).images
    assert (images[0] == voxels()).all()


def test_channels_that_differ_in_shape_are_rejected(tmp_path):
    write(tmp_path / "a" / "x_0000.nii.gz", voxels(1))
    write(tmp_path / "a" / "x_0001.nii.gz", voxels(2, (14, 18, 17)))
    write(tmp_path / "a" / "y_0000.nii.gz", voxels(3))
    write(tmp_path / "a" / "y_0001.nii.gz", voxels(4))
    write(tmp_path / "a" / "z_0000.nii.gz", voxels(5))
    write(tmp_path / "a" / "z_0001.nii.gz", voxels(6))
    write(tmp_path / "a" / "lone_0000.nii.gz", voxels(7))
    found = look(tmp_path / "out", tmp_path / "a", channels="stack")
    assert [f.key for f in found.accepted] == ["a__y", "a__z"] and found.accepted[0].files[1].endswith("y_0001.nii.gz")
    assert {f.key: f.reason for f in found.rejected} == {
        "a__x": "channels differ in shape or spacing",
        "a__lone": "channels 0, most cases have channels 0, 1",
    }


def test_channels_are_compared_by_their_numbers(tmp_path):
    """A channel that is missing, and one that is there twice, would put one modality in the place of another."""
    names = ("a_0000.mha", "a_0001.mha", "b_0000.mha", "b_0001.mha", "c_0000.mha", "c_0002.mha", "d_0000.mha", "d_0000.nrrd")
    for seed, name in enumerate(names):
        write(tmp_path / "a" / name, voxels(seed))
    found = look(tmp_path / "out", tmp_path / "a", channels="stack")
    assert [f.key for f in found.accepted] == ["a__a", "a__b"]
    assert {f.key: f.reason for f in found.rejected} == {
        "a__c": "channels 0, 2, most cases have channels 0, 1",
        "a__d": "several files for one channel: 0, 0",
    }
    assert len(look(tmp_path / "out2", tmp_path / "a").accepted) == 8  # split, each is a case


@pytest.mark.parametrize("ending", ["mha", "nrrd", "nii.gz"])
def test_one_flipped_byte_anywhere_in_compressed_voxels_is_noticed(tmp_path, ending):
    """ITK itself gives out whatever came before it, and after it zeros."""
    path = write_packed(tmp_path / f"a.{ending}", voxels())
    whole = path.read_bytes()
    reading.read_images((str(path),))
    for place in np.linspace(len(whole) // 4, len(whole) - 9, 8).astype(int):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        path.write_bytes(bytes(flipped))
        with pytest.raises(reading.Unusable, match="damaged|truncated|unreadable header"):
            reading.read_images((str(path),))


@pytest.mark.parametrize("encoding", ["raw", "gzip", "bzip2", "text"])
def test_every_encoding_of_nrrd_is_read(tmp_path, encoding):
    image = voxels()
    packed = {"raw": bytes, "gzip": gzip.compress, "bzip2": bz2.compress, "text": lambda _: image_as_text.encode()}
    image_as_text = " ".join(map(str, image.ravel().tolist()))
    header = f"NRRD0004\ntype: short\ndimension: 3\nsizes: 16 18 14\nspacings: 1 1 1\nendian: little\nencoding: {encoding}\n\n"
    (tmp_path / "a.nrrd").write_bytes(header.encode() + packed[encoding](image.tobytes()))
    if encoding == "bzip2":  # looked at to the end, though this ITK is built without it
        with pytest.raises(reading.Unusable, match="SimpleITKIO cannot read it"):
            reading.read_images((str(tmp_path / "a.nrrd"),))
    else:
        assert (reading.read_images((str(tmp_path / "a.nrrd"),)).images[0] == image).all()


def test_whatever_happens_to_one_file_the_others_go_on(tmp_path, monkeypatch):
    write_several(tmp_path / "a", 3)
    real = findings.content_hash

    def odd(images):
        if images.shape[1] == SHAPE[0] + 1:  # case_1's
            raise ZeroDivisionError("nobody thought of this")
        return real(images)

    monkeypatch.setattr(findings, "content_hash", odd)
    found = look(tmp_path / "out", tmp_path / "a")
    assert [f.key for f in found.accepted] == ["a__case_0", "a__case_2"]
    assert found.rejected[0].reason == "ZeroDivisionError: nobody thought of this"


def test_what_memory_was_too_small_for_is_looked_at_again(tmp_path, monkeypatch):
    write_several(tmp_path / "a", 3)

    def full(images):
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(ValueError, match="None of 3 cases"):
        patch.setattr(findings, "content_hash", full)
        look(tmp_path / "out", tmp_path / "a")
    assert {reason for _, reason, _ in read_rejected(tmp_path / "out")} == {"does not fit into memory"}
    assert len(look(tmp_path / "out", tmp_path / "a").accepted) == 3


def test_an_item_that_ends_its_process_is_named_and_the_others_are_done():
    done = []
    items = [0] * 9 + [signal.SIGABRT.value] + [0] * 9
    told = []
    parallel.for_each(
        signal.raise_signal, items, 2, done.append, lambda item: f"killed by {item}", lambda *now: told.append(now), "raising"
    )
    assert told == [("raising", n, 19) for n in range(20)]
    assert done.count(None) == 18 and done.count("killed by 6") == 1


def test_a_file_that_vanishes_is_rejected(tmp_path):
    gone = Candidate("a", (str(tmp_path / "a.nii.gz"),), "", "a")
    assert findings.inspect_case(gone).reason == "cannot be opened: No such file or directory"


# ---- statistics


@pytest.mark.parametrize("channels", [1, 2])
def test_box_is_nnunets(channels):
    images = np.stack([np.roll(voxels(c), c, axis=1) for c in range(channels)]).astype(np.float32)
    cropped, _, box = crop_to_nonzero(images.copy())
    assert findings.nonzero_box(images) == [tuple(b) for b in box]
    assert tuple(b - a for a, b in box) == cropped.shape[1:]


def test_otsu_separates_two_classes_as_its_definition_says():
    rng = np.random.default_rng(0)
    image = np.concatenate([rng.normal(0, 5, 3000), rng.normal(100, 15, 1000)])
    threshold = findings.otsu(image)

    def between(t):
        a, b = image[image <= t], image[image > t]
        return len(a) * len(b) * (a.mean() - b.mean()) ** 2 if len(a) and len(b) else 0

    best = max(np.linspace(image.min(), image.max(), 400), key=between)
    assert between(threshold) > 0.999 * between(best)


def test_the_body_holds_what_it_encloses_but_not_the_air_around():
    """A thorax that the field of view cuts at the top: lungs belong to the body."""
    image = np.full((20, 30, 40), -1000.0)
    image[:, 5:25, 5:35] = 40
    image[:, 10:20, 10:18] = -850
    inside = findings.enclosed(image > -400)
    assert inside[:, 5:25, 5:35].all() and inside.sum() == 20 * 20 * 30


def test_content_does_not_depend_on_format_or_compression(tmp_path):
    files = [write(tmp_path / f"a{e}", voxels()) for e in (".nii.gz", ".nii", ".nrrd", ".mha")]
    looked = [findings.inspect_case(Candidate("a", (str(f),), "", "a")) for f in files]
    assert len({f.content for f in looked}) == 1
    other = findings.inspect_case(Candidate("b", (str(write(tmp_path / "b.nii", voxels(1))),), "", "b"))
    assert other.content != looked[0].content


# ---- remembering


def test_what_was_looked_at_is_not_read_again_unless_it_changed(tmp_path, monkeypatch):
    write_several(tmp_path / "a", 4)
    first = look(tmp_path / "out", tmp_path / "a")
    read = []
    monkeypatch.setattr(inventory, "inspect_case", lambda c: read.append(c.key) or findings.inspect_case(c))
    assert look(tmp_path / "out", tmp_path / "a") == first and read == []
    write(tmp_path / "a" / "case_2.nii.gz", voxels(42))
    os.utime(tmp_path / "a" / "case_2.nii.gz", ns=(1, 1))
    changed = look(tmp_path / "out", tmp_path / "a")
    assert read == ["a__case_2"] and changed.accepted[2].content != first.accepted[2].content


def test_a_torn_last_line_of_a_killed_run_is_dropped(tmp_path):
    write_several(tmp_path / "a", 3)
    first = look(tmp_path / "out", tmp_path / "a")
    log = tmp_path / "out" / inventory.INSPECTION
    whole = log.read_bytes()
    log.write_bytes(whole[:-40])
    assert look(tmp_path / "out", tmp_path / "a") == first
    assert sorted(log.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_a_line_deleted_from_the_list_of_cases_stays_deleted(tmp_path):
    write_several(tmp_path / "a", 3)
    look(tmp_path / "out", tmp_path / "a")
    path = tmp_path / "out" / inventory.CASES
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if "case_1" not in line))
    assert [f.key for f in read_accepted(tmp_path / "out")] == ["a__case_0", "a__case_2"]


def test_several_processes_find_the_same(tmp_path):
    make_zoo(tmp_path / "zoo")
    one = look(tmp_path / "one", tmp_path / "zoo")
    two = look(tmp_path / "two", tmp_path / "zoo", processes=2)
    assert one == two
    for name in (inventory.CASES, inventory.REJECTED):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_any_name_can_be_looked_up_in_the_list_of_cases(tmp_path):
    for name in ("a;b.nii.gz", 'q"u,o.nii.gz', "new\nline.nii.gz", "ü.nii.gz"):
        write(tmp_path / "a" / name, voxels(len(name)), (1, 1, 1))
    found = look(tmp_path / "out", tmp_path / "a")
    assert len(found.accepted) == 4 and read_accepted(tmp_path / "out") == list(found.accepted)


def test_of_duplicates_the_one_that_was_used_before_stays(tmp_path):
    write_several(tmp_path / "a", 2)
    look(tmp_path / "out", tmp_path / "a")
    write(tmp_path / "a" / "another.nii.gz", voxels(0))
    found = look(tmp_path / "out", tmp_path / "a")
    assert [f.key for f in found.accepted] == ["a__case_0", "a__case_1"]
    assert [f.reason for f in found.rejected] == ["duplicate of a__case_0"]


def test_nothing_usable_is_an_error(tmp_path):
    write(tmp_path / "a" / "x.nii.gz", np.zeros(SHAPE, np.int16))
    with pytest.raises(ValueError, match="None of 1 cases can be used; .*rejected.csv"):
        look(tmp_path / "out", tmp_path / "a")


# ---- which files, and their names


def keys(*images, own="Dataset500_Test", known=None, **options):
    return [c.key for c in candidates(Sources(tuple(map(str, images)), **options), own, known or {}).cases]


def test_only_images_of_nnunets_layout_are_read(tmp_path):
    raw = tmp_path / "Dataset004_A"
    for name in ("imagesTr/a_0000", "imagesTs/b_0000", "imagesTr/c_0001", "labelsTr/a", "predictions/a"):
        write(raw / f"{name}.nii.gz", voxels())
    (raw / "dataset.json").write_text(json.dumps({"channel_names": {"0": "T1", "1": "T2"}}))
    assert keys(raw, own="Dataset004_A") == ["a", "b", "c_0001"]
    assert keys(raw) == ["Dataset004_A__a", "Dataset004_A__b", "Dataset004_A__c_0001"]
    found = candidates(Sources((str(raw),)), "Dataset500_Test", {}).cases
    assert [(c.subject, c.modality) for c in found] == [
        ("Dataset004_A__a", "T1"),
        ("Dataset004_A__b", "T1"),
        ("Dataset004_A__c", "T2"),
    ]


def test_names_follow_from_the_place_and_stay_when_folders_are_added(tmp_path):
    for name in ("x/sub-01/anat/T1.nii.gz", "x/sub-02/anat/T1.nii.gz", "y/T1.nii.gz", "y/.hidden/T1.nii.gz", "y/._T1.nii.gz"):
        write(tmp_path / name, voxels())
    mine = keys(tmp_path / "x")
    assert mine == ["x__sub-01__anat__T1", "x__sub-02__anat__T1"]
    assert keys(tmp_path / "y", tmp_path / "x") == [*mine, "y__T1"]
    found = candidates(Sources((str(tmp_path / "x"),)), "D", {}).cases
    assert [c.subject for c in found] == ["x__sub-01", "x__sub-02"] and {c.dataset for c in found} == {"x"}


def test_names_are_unique_and_legal(tmp_path):
    for name in ("a/d/T 1.nii.gz", "a/d/T_1.nii.gz", "b/d/T_1.nii.gz", "a/d/mask_seg.nii.gz", f"a/d/{'n' * 230}.nii"):
        write(tmp_path / name, voxels())
    found = keys(tmp_path / "a" / "d", tmp_path / "b" / "d")
    assert len(set(found)) == 5 and all(len(k) < 200 and not k.endswith("_seg") and " " not in k for k in found)
    files = {c.files: c.key for c in candidates(Sources((str(tmp_path / "b" / "d"),)), "D", {}).cases}
    (path,) = files
    assert "d__old" in keys(tmp_path / "a" / "d", tmp_path / "b" / "d", known={path: "d__old"})


def test_a_folder_that_contains_itself_is_searched_once(tmp_path):
    write(tmp_path / "x" / "a.nii.gz", voxels())
    write(tmp_path / "y" / "b.nii.gz", voxels())
    (tmp_path / "x" / "self").symlink_to(".")
    (tmp_path / "x" / "other").symlink_to(tmp_path / "y")  # other links are followed
    assert keys(tmp_path / "x") == ["x__a", "x__other__b"]


def test_folders_of_one_name_are_several_datasets(tmp_path):
    for name in ("a/images/x", "b/images/x", "c/imagesTr/x_0000", "c/imagesTs/y_0000"):
        write(tmp_path / f"{name}.nii.gz", voxels())
    folders = [tmp_path / n for n in ("a/images", "b/images", "c/imagesTr", "c/imagesTs")]
    found = candidates(Sources(tuple(map(str, folders))), "D", {}).cases
    assert {c.key: c.dataset for c in found} == {"images__x": "images", "b_images__x": "b_images", "c__x": "c", "c__y": "c"}


def test_a_row_that_names_no_image_is_rejected_and_the_others_are_used(tmp_path):
    write(tmp_path / "a.nii.gz", voxels())
    (tmp_path / "list.csv").write_text("path\na.nii.gz\nscan.dcm\nREADME\n")
    found = look(tmp_path / "out", table=str(tmp_path / "list.csv"))
    assert [f.key for f in found.accepted] == ["list__a"] and [f.key for f in found.rejected] == ["list__README", "list__scan"]
    assert all(f.reason.startswith("not a format that nnU-Net reads as a volume (.nii.gz, ") for f in found.rejected)


def test_a_table_names_dataset_subject_and_modality(tmp_path):
    write(tmp_path / "p" / "1" / "T1.nii.gz", voxels(1))
    write(tmp_path / "p" / "2" / "T1.nii.gz", voxels(2))
    with open(tmp_path / "list.csv", "w", newline="") as f:
        csv.writer(f).writerows(
            [("path", "dataset", "subject", "modality"), ("p/1/T1.nii.gz", "A", "s1", "CT"), ("p/2/T1.nii.gz", "A", "s2", "CT")]
        )
    found = candidates(Sources(table=str(tmp_path / "list.csv")), "D", {}).cases
    assert [(c.key, c.dataset, c.subject, c.modality) for c in found] == [
        ("A__s1__T1", "A", "A__s1", "CT"),
        ("A__s2__T1", "A", "A__s2", "CT"),
    ]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("file\na.nii.gz\n", "list.csv: expected the columns path, found file"),
        ("path,subject\na.nii.gz,1\n,2\n", "line 3: expected a path in column path"),
        ("subject,path\n1,a.nii.gz\n2\n", "line 3: expected a path in column path"),
    ],
)
def test_a_bad_table_is_an_error(tmp_path, text, match):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(ValueError, match=match):
        candidates(Sources(table=str(tmp_path / "list.csv")), "D", {})


def test_excluded_files_are_left_out(tmp_path):
    for name in ("x/a.nii.gz", "x/a_seg.nii.gz", "x/derivatives/b.nii.gz"):
        write(tmp_path / name, voxels())
    assert keys(tmp_path / "x", exclude=("*_seg.nii.gz", "derivatives/*")) == ["x__a"]


@pytest.mark.parametrize(("name", "match"), [("missing", "expected a folder"), ("empty", "expected files that nnU-Net reads")])
def test_a_folder_without_images_is_an_error(tmp_path, name, match):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=match):
        keys(tmp_path / name)
