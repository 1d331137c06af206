"""Wheel, sdist and editable install, built and installed offline from a copy of the source."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from nnunetv2_cva import __version__
from nnunetv2_cva.installation.hook import FILE_NAME, VARIABLE

ROOT = Path(__file__).parents[1]
SOURCE = ("nnunetv2_cva", "trainers", "plans", "setup.py", "pyproject.toml", "README.md", "LICENSE")
FIND = "import importlib.util as u; print(u.find_spec('nnunetv2_cva.{}').origin)"


def run(*command, **options):
    """The output of ``command``, outside the repository and without this shell's nnU-Net and Python variables."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("nnUNet_", "PYTHON"))}
    environment = {**inherited, "PIP_NO_INDEX": "1", **options.pop("env", {})}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment, **options)
    assert done.returncode == 0, f"{command}: {done.stdout}\n{done.stderr}"
    return done.stdout


def pip_install(*arguments, python=sys.executable):
    """Install offline, for ``python``, with the pip of the environment that runs the tests."""
    quiet = ("--quiet", "--no-deps", "--no-warn-script-location", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, "install", *quiet, *arguments)


def copy_source(folder):
    for name in SOURCE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    (folder / "plans" / "for_this_test.json").write_text("{}")
    return folder


def site_packages(python):
    return Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the sdist and the wheel that was built from it."""
    source = copy_source(tmp_path_factory.mktemp("source") / "repository")
    run(sys.executable, "-m", "build", "--no-isolation", source, cwd=source.parent)
    return source / "dist"


@pytest.fixture(scope="module")
def editable(tmp_path_factory):
    """``(bin, source)`` of an environment with an editable install; its path is as awkward as a user's may be.

    The packages that ours depends on are those of the environment that runs the tests.
    """
    home = tmp_path_factory.mktemp("it's an environment, ü")
    source = copy_source(home / "repository")
    run(sys.executable, "-m", "venv", "--without-pip", home / "venv")
    python = home / "venv" / "bin" / "python"
    (site_packages(python) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip_install("--no-build-isolation", "--ignore-installed", "-e", source, python=python)
    return python.parent, source


# ---- wheel and sdist


def test_wheel_holds_the_package_with_recipes_and_plans(built):
    (wheel,) = built.glob("*.whl")
    assert wheel.name == f"nnunetv2_cva-{__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {p.relative_to(ROOT).as_posix() for p in (ROOT / "nnunetv2_cva").rglob("*.py")}
    for folder in ("trainers", "plans"):
        files = [*(ROOT / folder).glob("*.py"), *(ROOT / folder).glob("*.json")]
        expected |= {f"nnunetv2_cva/{folder}/{p.name}" for p in files}
    information = f"nnunetv2_cva-{__version__}.dist-info"
    extra = {"nnunetv2_cva/py.typed", "nnunetv2_cva/plans/for_this_test.json", f"{information}/licenses/LICENSE"}
    extra |= {"nnunetv2_cva/seeing/look.js"}
    inside = {n for n in names if not n.startswith(f"{information}/")}
    assert inside == {n for n in expected | extra if not n.startswith(f"{information}/")}
    assert f"{information}/licenses/LICENSE" in names


def test_metadata_says_what_is_needed(built):
    (wheel,) = built.glob("*.whl")
    text = zipfile.ZipFile(wheel).read(f"nnunetv2_cva-{__version__}.dist-info/METADATA").decode()
    for line in ("License-Expression: Apache-2.0", "Requires-Python: >=3.10", f"Version: {__version__}"):
        assert f"\n{line}\n" in text
    assert "\nRequires-Dist: nnunetv2<2.9,>=2.8\n" in text and 'extra == "dev"' in text


def test_sdist_holds_what_the_wheel_was_built_from(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    recipes = {f"trainers/{p.name}" for p in (ROOT / "trainers").glob("*.py")}
    assert recipes | {"LICENSE", "README.md", "setup.py", "pyproject.toml", "plans/for_this_test.json"} <= names


def test_an_installed_wheel_finds_recipes_and_plans(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    pip_install("--target", tmp_path, wheel)
    for name in ("trainers", "plans"):
        origin = run(sys.executable, "-S", "-c", FIND.format(name), env={"PYTHONPATH": str(tmp_path)}, cwd=tmp_path)
        assert origin.strip() == str(tmp_path / "nnunetv2_cva" / name / "__init__.py")
    assert (tmp_path / "nnunetv2_cva" / "plans" / "for_this_test.json").is_file()


def test_nothing_is_built_without_the_recipes(tmp_path):
    source = copy_source(tmp_path / "repository")
    shutil.rmtree(source / "trainers")
    with pytest.raises(AssertionError, match="package directory 'trainers' does not exist"):
        run(sys.executable, "-m", "build", "--wheel", "--no-isolation", source, cwd=tmp_path)


# ---- editable


def test_an_editable_install_finds_recipes_and_plans(editable):
    folder, source = editable
    for name in ("trainers", "plans"):
        origin = run(folder / "python", "-c", FIND.format(name), cwd=folder)
        assert origin.strip() == str(source / name / "__init__.py")


def test_nnunet_finds_our_trainers_by_the_hook(editable, tmp_path):
    """The whole way of a user, in an environment of its own: install the hook, ask nnU-Net, remove the hook."""
    folder, source = editable
    command = folder / "nnUNetv2_cva"
    show = f"import os; print(os.environ.get({VARIABLE!r}))"
    hook = site_packages(folder / "python") / FILE_NAME
    assert str(hook) in run(command, "hook", "install", cwd=tmp_path)
    assert run(command, "hook", "status").startswith("installed: ")
    recipes = str(source / "trainers")
    for options, value in (((), recipes), (("-E",), recipes), (("-I",), recipes), (("-S",), "None")):
        assert run(folder / "python", *options, "-c", show).strip() == value
    done = subprocess.run([command, "doctor"], capture_output=True, text=True, cwd=tmp_path)
    assert f"OK  trainer look-up: nnU-Net finds nnUNetTrainerCVA in {recipes}\n" in done.stdout, done.stdout + done.stderr
    assert run(command, "hook", "remove") == f"Removed {hook}\n"
    assert run(folder / "python", "-c", show).strip() == "None"
    status = subprocess.run([command, "hook", "status"], capture_output=True, text=True)
    assert status.returncode == 1 and status.stdout.startswith("not installed: ")


def test_the_environment_that_runs_the_tests_was_left_alone(editable):
    spec = importlib.util.find_spec("nnunetv2_cva.trainers")
    assert spec is not None and Path(spec.origin) != editable[1] / "trainers" / "__init__.py"
