"""The page about a training: everything on it, nothing beside it, and readable in a browser."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers.browser import browse, browser
from helpers.projects import make_project, train
from helpers.targets import call
from nnunetv2_cva.trainers.nnUNetTrainerCVA import nnUNetTrainerCVA
from nnunetv2_cva.trainers.nnUNetTrainerCVA_objectives import nnUNetTrainerCVA_MAE

from nnunetv2_cva.commands.main import main
from nnunetv2_cva.training import report, showing


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a training of two epochs, ended as nnU-Net ends it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        make_project(tmp_path_factory.mktemp("project"), monkeypatch, cases=24)  # 2 of them are watched
        return Path(train(nnUNetTrainerCVA).output_folder)


def test_a_training_ends_with_its_page_and_pictures(folder):
    assert {"report.html", "views.png", "matches.png", "progress.png", "watched.json"} <= {p.name for p in folder.iterdir()}
    log = next(folder.glob("training_log*")).read_text()
    assert "What was learned, on one page" in log and log.count("TOO EARLY: ") == 3, "after each epoch and in the end"


def test_the_page_has_all_parts_and_needs_nothing_else(folder):
    text = (folder / "report.html").read_text()
    parts = ["Metrics", "Curves", "Views", "Matches of watched cases", "Data", "Times", "Next", "Settings of the method"]
    assert re.findall("<h2>(.*?)</h2>", text) == parts
    assert text.count("data:image/png;base64,") == 3 and "TOO EARLY" in text
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)|https?://""", text)
    for name in ("effective_rank", "feature_retrieval", "teacher_distance", "learning_rate", "mask_ratio", "3d_fullres"):
        assert name in text
    row = re.search(r"<tr><td>alignment</td>(.*?)</tr>", text).group(1)
    assert len(re.findall(r"<td>-?[\d.e-]+</td>", row)) == 3, "first, last, without learning"
    assert re.search("nnUNetv2_train DATASET 3d_fullres FOLD -p nnUNetPlans -pretrained_weights", text)


@pytest.mark.skipif(browser() is None, reason="no chromium or chrome here to open the page with")
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_shows_the_page_without_complaint(folder, width):
    script = """
      const images = [...document.images].map(i => i.complete && i.naturalWidth > 0);
      document.title = JSON.stringify({images, wide: document.documentElement.scrollWidth});
    """
    found = browse(folder / "report.html", width, script)
    seen = json.loads(found.title)
    assert found.errors == [] and found.requests == []
    assert seen["images"] == [True] * 3 and seen["wide"] <= width


@pytest.mark.skipif(browser() is None, reason="no chromium or chrome here to open the page with")
def test_the_page_prints_whole(folder):
    """Nothing that would have to be scrolled is cut, no picture is higher than a page of A4 without its margins."""
    script = """
      const cut = [...document.querySelectorAll("pre, .wide")].filter(e =>
        e.scrollWidth > e.clientWidth && getComputedStyle(e).overflowX !== "visible");
      document.title = JSON.stringify({cut: cut.length, wide: document.documentElement.scrollWidth,
        heights: [...document.images].map(i => i.getBoundingClientRect().height)});
    """
    width, height = 718, 1047  # 19 x 27.7 cm at 96 to the inch
    found = browse(folder / "report.html", width, script, height=height, media="print")
    seen = json.loads(found.title)
    assert seen["cut"] == 0 and seen["wide"] <= width and max(seen["heights"]) < height
    assert found.errors == [] and 2 <= len(re.findall(rb"/Type\s*/Page\b", found.paper)) <= 12


def test_the_command_makes_the_page_anew_and_prints_the_verdict(folder, capsys):
    (folder / "report.html").unlink()
    before = (folder / "matches.png").stat().st_mtime
    assert call("report", folder) == 0
    assert re.match(r"TOO EARLY: 2 of at least 4 epochs.\nWrote .*report.html.\n", capsys.readouterr().out)
    assert (folder / "report.html").is_file() and (folder / "matches.png").stat().st_mtime == before


def test_a_folder_of_something_else(tmp_path, capsys):
    assert call("report", tmp_path) == 2
    assert "is no folder of a pretraining: expected metrics.jsonl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", "[1]\n", "metrics.jsonl: expected one JSON object of numbers a line"),
        ("metrics.jsonl", '{"epoch": "x"}\n', "metrics.jsonl: expected one JSON object of numbers a line"),
        ("metrics.jsonl", "[" * 5000, "metrics.jsonl: expected one JSON object of numbers a line"),
        ("watched.json", '{"data": 1}', "watched.json: expected a folder and a list of cases"),
        (
            "plans.json",
            '{"configurations": {"3d_fullres": {"spacing": "x"}}}',
            "a list of positive numbers as spacing, found 'x'",
        ),
        ("cva_config.json", "[]", "cva_config.json: expected a JSON object"),
    ],
)
def test_files_that_somebody_else_has_written_are_named(folder, tmp_path, capsys, name, content, message):
    copy = tmp_path / folder.parent.name / folder.name
    copy.mkdir(parents=True)
    for path in [folder / n for n in ("metrics.jsonl", "watched.json", "cva_config.json")]:
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "checkpoint_final.pth").write_bytes(b"PK\x03\x04")  # not reached
    (copy.parent / "plans.json").write_bytes((folder.parent / "plans.json").read_bytes())
    (copy.parent / name if name == "plans.json" else copy / name).write_text(content)
    assert main(["report", str(copy)]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_what_is_not_there_yet_is_left_out_or_said(folder, tmp_path):
    early = tmp_path / folder.parent.name / "fold_all"
    early.mkdir(parents=True)
    for name in ("metrics.jsonl", "cva_config.json"):
        (early / name).write_text((folder / name).read_text())
    (early.parent / "plans.json").write_text((folder.parent / "plans.json").read_text())
    text = report.write_report(early).read_text()
    assert "There are no weights in this folder to look at." in text and "<h2>Curves</h2>" not in text


def test_a_page_that_cannot_be_written_costs_no_run(monkeypatch):
    said = []
    monkeypatch.setattr(showing, "write_report", lambda folder: 1 / 0)
    showing.report_quietly("here", said.append)
    assert said == [
        "WARNING: the report could not be written (ZeroDivisionError: division by zero). Again: nnUNetv2_cva report here"
    ]


def test_recipes_of_one_view_have_pictures_and_collapse_measures_too(tmp_path, monkeypatch):
    make_project(tmp_path, monkeypatch)
    monkeypatch.setattr("nnunetv2_cva.training.trainer.report_quietly", lambda *a: None)
    trainer = train(nnUNetTrainerCVA_MAE)
    last = trainer.history.epochs[-1]
    assert {"watched_loss", "effective_rank", "spread", "reconstruction_null"} <= last.keys() and "alignment" not in last
    assert last["effective_rank"] > 1 and (Path(trainer.output_folder) / "views.png").is_file()


def test_a_bar_for_the_whole_run_on_a_terminal_only(monkeypatch, capsys):
    showing.RunBar(10, 0).tick()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = showing.RunBar(10, 4)
    with bar.aside():
        print("a line")
    bar.tick()
    bar.close()
    shown = capsys.readouterr()
    assert "Pretraining" in shown.err and "5/10" in shown.err and shown.out == "a line\n"


def test_tensorboard_gets_every_metric_where_it_is_installed(tmp_path, monkeypatch):
    found = []
    fake = ModuleType("torch.utils.tensorboard")
    writer = SimpleNamespace(add_scalar=lambda *a: found.append(a), close=lambda: found.append("closed"))
    fake.SummaryWriter = lambda folder: found.append(folder) or writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setattr(torch.utils, "tensorboard", fake, raising=False)
    monkeypatch.setattr(showing.importlib.util, "find_spec", lambda name: object())
    board = showing.Board(tmp_path)
    board.log("alignment", 0.5, 3)
    board.close()
    assert found == [str(tmp_path / "tensorboard"), ("alignment", 0.5, 3), "closed"]
    monkeypatch.setattr(showing.importlib.util, "find_spec", lambda name: None)
    showing.Board(tmp_path).log("alignment", 0.5, 3)
    assert len(found) == 3
