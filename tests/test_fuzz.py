"""Files that hold anything: tables, lists, the index, cases and headers of images are read, or refused in one sentence that names
the file. Bounded: as many inputs as below, the same every time. Every input that was found to break something is an example."""

import json

import blosc2
import numpy as np
import pytest
from helpers.images import voxels, write
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nnunetv2_cva.datasets import inventory
from nnunetv2_cva.datasets.reading import Unusable, read_images
from nnunetv2_cva.datasets.tables import read_table
from nnunetv2_cva.training.data import open_cases
from nnunetv2_cva.views.cases import Case
from nnunetv2_cva.views.index import INDEX, read_index

BOUNDED = settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
CELLS = st.text(st.sampled_from("a1x,;\t\"'\n\r\x00é-."), max_size=12)
LINES = st.lists(st.lists(CELLS, max_size=5).map("\t".join), max_size=5).map("\n".join)
BYTES = st.binary(max_size=60) | LINES.map(str.encode)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def read_or_refused(path, function, *arguments):
    """What the function gives; None where it refuses in one sentence with the file's name."""
    try:
        return function(*arguments)
    except ValueError as e:
        assert path.name in str(e) and "codec can't" not in str(e), f"{type(e).__name__}: {e}"
        return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@BOUNDED
@given(BYTES)
@example(b"\xff\xfe\x00")
@example(b'case,files\n"a,b')
@example(b"sep=\na")
@example(b"sep=\r\n")
@example(b"case\n" + b"x" * 200_000)
def test_any_table(folder, content):
    path = folder / "cases.csv"
    path.write_bytes(content)
    rows = read_or_refused(path, read_table, path, ("case",))
    assert rows is None or all(isinstance(row["case"], str) for _, row in rows)
    read_or_refused(path, inventory.read_accepted, folder)
    path.unlink()


@BOUNDED
@given(BYTES | LINES.map(lambda text: f"root\t\n{text}".encode()))
@example(b"")
@example(b"\xff")
@example(b"root\t\na\t99999999999x1x1x1\td")
@example(b"root\t\na\t1x0x1x-1\td")
@example(b"root\t\na\t1x1x1\td\nb\t1x1x1x1x1\td")
def test_any_index(folder, content):
    path = folder / INDEX
    path.write_bytes(content)
    found = read_or_refused(path, read_index, folder)
    assert found is None or found.shapes.shape == (len(found.keys), 4)
    path.unlink()


@BOUNDED
@given(BYTES | JSON.map(lambda value: json.dumps(value).encode()))
@example(b"[]")
@example(b'{"images": 1}')
@example(b"null\n{}")
@example(b'{"stamp": [1]}\n')
@example(b"[" * 5000 + b"\n")
def test_any_lists_of_a_dataset(folder, content):
    for name, function in ((inventory.SOURCES, inventory.read_sources), (inventory.INSPECTION, inventory.read_findings)):
        path = folder / name
        path.write_bytes(content)
        read_or_refused(path, function, folder)
        path.unlink()


@pytest.fixture(scope="module")
def case(folder):
    path = folder / "data" / "case_00.b2nd"
    path.parent.mkdir()
    blosc2.asarray(np.random.default_rng(0).normal(size=(1, 9, 11, 7)).astype(np.float32), urlpath=str(path), mode="w")
    return path, path.read_bytes()


@BOUNDED
@given(st.binary(max_size=40) | st.integers(0, 400))
@example(b"")
@example(0)
def test_any_content_of_a_case(case, content):
    """Bytes of any kind, and cases that end too early."""
    path, whole = case
    path.write_bytes(content if isinstance(content, bytes) else whole[: content * len(whole) // 401])
    assert len(open_cases(path.parent)) == 1
    found = read_or_refused(path, Case, str(path))
    if found is not None:
        read_or_refused(path, lambda: list(found.chunks()))


ENDINGS = ("nii", "nrrd", "mha", "tif")


@pytest.fixture(scope="module")
def images(folder):
    return {ending: write(folder / f"image.{ending}", voxels()).read_bytes() for ending in ENDINGS}


@BOUNDED
@given(st.sampled_from(ENDINGS), st.lists(st.tuples(st.integers(0, 351), st.integers(0, 255)), min_size=1, max_size=4))
@example("nii", [(42, 255), (43, 255)])
@example("nii", [(70, 0)])
@example("nii", [(108, 255)])
def test_any_header_of_an_image(folder, images, ending, changes):
    """Bytes of the header replaced: a volume of as many finite voxels as it says, or refused."""
    content = bytearray(images[ending])
    for place, value in changes:
        content[place] = value
    path = folder / f"fuzzed.{ending}"
    path.write_bytes(content)
    try:
        found = read_images((str(path),))
    except Unusable as e:
        assert str(e).strip() and "\n" not in str(e)
    else:
        assert found.images.ndim == 4 and len(found.properties["spacing"]) == 3 and np.all(np.isfinite(found.images))
