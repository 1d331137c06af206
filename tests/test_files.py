"""Files are whole or not there; JSON that is none is one sentence."""

import os
import subprocess
import sys

import numpy as np
import pytest

from nnunetv2_cva import files
from nnunetv2_cva.sizes import by


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(RuntimeError, match="half"), files.written_whole(path) as partial:
        partial.write_text("torn")
        raise RuntimeError("half")
    assert files.read_json(path) == {"a": 1} and os.listdir(tmp_path) == ["a.json"]


def test_two_writers_do_not_share_a_partial_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    with files.written_whole(path) as mine:
        monkeypatch.setattr(files, "HOST", "another")
        with files.written_whole(path) as theirs:
            theirs.write_text("theirs")
            mine.write_text("mine")
        assert path.read_text() == "theirs"
    assert path.read_text() == "mine" and os.listdir(tmp_path) == ["a"]


def test_what_a_killed_process_left_is_removed_by_the_next_write(tmp_path):
    code = (
        "import os, sys; from nnunetv2_cva import files\n"
        "with files.written_whole(sys.argv[1]) as p:\n p.write_text('x'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "a[1]")])
    assert len(os.listdir(tmp_path)) == 1
    other = tmp_path / f"b.{files.HOST}.{os.getppid()}{files.PARTIAL}"
    other.write_text("being written")  # by a process that lives
    files.write_text(tmp_path / "a[1]", "new")
    assert sorted(os.listdir(tmp_path)) == ["a[1]", other.name]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b'{"a": 1\n"b"}', "line 2: expected JSON"),
        (b"", "line 1: expected JSON"),
        ('{"\u00e4": 1}'.encode("utf-16"), "another encoding"),
    ],
)
def test_json_that_is_none(tmp_path, content, match):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=match):
        files.read_json(tmp_path / "a.json")


def test_json_with_a_byte_order_mark_missing_files_and_lists(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert files.read_object(tmp_path / "a.json") == {"a": 1}
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        files.read_json(tmp_path / "b.json")
    files.write_json(tmp_path / "b.json", [1])
    with pytest.raises(ValueError, match="expected a JSON object, found list"):
        files.read_object(tmp_path / "b.json")


def test_sizes():
    assert by((160, np.int64(96), 8.0)) == "160x96x8" and by((0.859375, 1.5)) == "0.8594x1.5" and by([12345]) == "12345"
