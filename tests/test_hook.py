"""The hook: what its line does in a starting Python, and what the command does with its file."""

import json
import os
import site
import stat
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from nnunetv2_cva.commands import hook as command
from nnunetv2_cva.installation import hook

NAMES = ("plain", "with space", "it's", 'say "hi"', "back\\slash", "ünï-日本", "{braces} %s", "new\nline")
# -S: without the site-packages of this Python, whose own hook may be installed
START = """
import json, os, site, sys, builtins
watched = (site, builtins, sys.modules["__main__"])
before = [set(vars(m)) | {"before"} for m in watched]
site.addsitedir(sys.argv[1])
leaked = [set(vars(m)) - b for m, b in zip(watched, before)]
assert not any(leaked), leaked
print(json.dumps(os.environ.get("nnUNet_extTrainer")))
"""


def start(packages, value=None):
    """``nnUNet_extTrainer`` in a Python that starts with these site-packages, where the shell has ``value``."""
    environment = {**os.environ, **({} if value is None else {hook.VARIABLE: value})}
    command = [sys.executable, "-S", "-c", START, str(packages)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Site-packages of an environment without a user's one; the recipes' folder exists beside it."""
    monkeypatch.setattr(hook.sysconfig, "get_path", lambda name: str(tmp_path / "site-packages"))
    monkeypatch.setattr(site, "ENABLE_USER_SITE", False)
    monkeypatch.setattr(hook, "recipes_folder", lambda: str(tmp_path / "trainers"))
    for name in ("site-packages", "trainers"):
        (tmp_path / name).mkdir()
    return tmp_path / "site-packages"


def run(action):
    return command.run(Namespace(action=action))


# ---- the line


@pytest.mark.parametrize("name", NAMES)
def test_line_appends_any_folder(name, tmp_path):
    folder, packages = tmp_path / name, tmp_path / "packages"
    folder.mkdir(), packages.mkdir()
    line = hook.hook_line(str(folder))
    assert line.startswith("import os;") and line.isascii() and line.count("\n") == 1 and line.endswith("\n")
    (packages / hook.FILE_NAME).write_text(line)
    assert start(packages) == str(folder)
    assert start(packages, "/users/own") == f"/users/own{os.pathsep}{folder}"


@pytest.mark.parametrize("value", [None, "", "/a", "{}", "{}/", "/a:{}", "{}:/a", "/b:{}/../trainers:"])
def test_line_and_env_agree_and_respect_the_users_value(value, tmp_path):
    folder, packages = tmp_path / "trainers", tmp_path / "packages"
    folder.mkdir(), packages.mkdir()
    (packages / hook.FILE_NAME).write_text(hook.hook_line(str(folder)))
    value = value if value is None else value.format(folder).replace(":", os.pathsep)
    after = start(packages, value)
    assert after == hook.with_folder(value, str(folder))
    assert after.startswith(value or "")
    assert [os.path.normpath(p) for p in after.split(os.pathsep)].count(str(folder)) == 1
    assert start(packages, after) == after  # a child process inherits it and adds nothing


@pytest.mark.parametrize("value", [None, "", "/a"])
def test_line_does_nothing_when_the_folder_is_gone(value, tmp_path):
    (tmp_path / hook.FILE_NAME).write_text(hook.hook_line(str(tmp_path / "gone")))
    assert start(tmp_path, value) == value


# ---- the command


def test_install_status_remove(packages, capsys):
    assert run("status") == 1
    assert capsys.readouterr().out.startswith(f"not installed: no {hook.FILE_NAME} in {packages}.")
    assert run("install") == 0 and run("install") == 0
    folder = packages.parent / "trainers"
    written = packages / hook.FILE_NAME
    assert os.listdir(packages) == [hook.FILE_NAME] and start(packages) == str(folder)
    out = capsys.readouterr().out
    assert f"Wrote {written}" in out and written.read_text().strip() in out and str(folder) in out
    assert run("status") == 0
    assert capsys.readouterr().out.startswith(f"installed: {written} appends {folder}")
    assert run("remove") == 0 and run("remove") == 0
    assert "Nothing to remove" in capsys.readouterr().out
    assert os.listdir(packages) == [] and run("status") == 1


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (hook.hook_line("/it's/another"), "points to /it's/another, the trainers of this installation are in"),
        ("import os; os.environ['nnUNet_extTrainer'] = 'x'\n", "was written by another version"),
        ("(os, [1, 'nnUNet_extTrainer')", "was written by another version"),
        ("", "was written by another version"),
    ],
)
def test_a_stale_hook_is_reported_and_renewed(packages, capsys, text, match):
    (packages / hook.FILE_NAME).write_text(text)
    assert run("status") == 1
    out = capsys.readouterr().out
    assert out.startswith("stale: ") and match in out
    assert run("install") == 0 and run("status") == 0


def test_everyone_who_may_read_the_folder_may_read_the_hook(packages):
    run("install")
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((packages / hook.FILE_NAME).stat().st_mode) == 0o666 & ~mask


def test_a_failed_write_leaves_the_old_hook(packages, monkeypatch):
    old = hook.hook_line("/old")
    (packages / hook.FILE_NAME).write_text(old)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ValueError, match=r"hook\.pth cannot be written \(No space left on device\)"):
        run("install")
    assert os.listdir(packages) == [hook.FILE_NAME] and (packages / hook.FILE_NAME).read_text() == old


def test_site_packages_not_writable(packages, monkeypatch):
    run("install")

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")  # the tests may run as root, who may everything

    monkeypatch.setattr(Path, "unlink", denied)
    with pytest.raises(ValueError, match=r"cannot be removed \(Permission denied\)"):
        run("remove")
    monkeypatch.undo()
    monkeypatch.setattr(hook.sysconfig, "get_path", lambda name: str(packages / "there is no such folder"))
    monkeypatch.setattr(site, "ENABLE_USER_SITE", False)
    with pytest.raises(ValueError, match=r"cannot be written \(.+\)\. Two ways out: put `eval .*-m venv"):
        run("install")


@pytest.mark.parametrize("enabled", [True, False])
def test_hook_of_a_user_install_goes_beside_it(packages, tmp_path, monkeypatch, enabled):
    user = tmp_path / "user"
    user.mkdir()
    monkeypatch.setattr(site, "ENABLE_USER_SITE", enabled)
    monkeypatch.setattr(site, "getusersitepackages", lambda: str(user))
    distribution = Namespace(locate_file=lambda name: user / name)
    monkeypatch.setattr(hook.importlib.metadata, "distribution", lambda name: distribution)
    run("install")
    assert (user / hook.FILE_NAME).exists() is enabled and (packages / hook.FILE_NAME).exists() is not enabled
    assert run("status") == 0
    (packages / hook.FILE_NAME).write_text("")
    run("remove")  # from both
    assert not list(tmp_path.rglob("*.pth"))


def test_folder_that_nnunet_would_split(monkeypatch):
    spec = Namespace(origin=os.path.join(os.sep, f"a{os.pathsep}b", "trainers", "__init__.py"))
    monkeypatch.setattr(hook.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ValueError, match="nnU-Net splits nnUNet_extTrainer at every"):
        hook.recipes_folder()


def test_the_recipes_are_found_where_they_are():
    folder = Path(hook.recipes_folder())
    assert folder.is_absolute() and folder.name == "trainers" and (folder / "nnUNetTrainerCVA.py").is_file()
