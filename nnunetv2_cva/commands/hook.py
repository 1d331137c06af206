"""``nnUNetv2_cva hook``: makes nnU-Net find our trainers in this Python environment without an environment variable.

Python executes the lines of ``.pth`` files in its site-packages that begin with ``import`` whenever it starts. Ours
appends the recipes' folder to ``nnUNet_extTrainer``, where nnU-Net (>= 2.8) looks for trainers that are not its own.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import re
import site
import sys
import sysconfig
from ast import literal_eval
from pathlib import Path

HELP = "Make nnU-Net find our trainers in this Python environment, or undo that."

VARIABLE = "nnUNet_extTrainer"
# Not nnunetv2_cva.pth: build tools name their editable files after the project.
FILE_NAME = "nnunetv2_cva_hook.pth"

# One line; a lambda because whatever the line assigns would stay behind in the module `site`.
_LINE = (
    "import os; (lambda os, d, k: os.path.isdir(d)"
    " and d not in map(os.path.normpath, os.environ.get(k, '').split(os.pathsep))"
    " and os.environ.__setitem__(k, os.pathsep.join(filter(None, (os.environ.get(k), d)))))(os, {folder}, {variable})\n"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``nnUNetv2_cva hook``."""
    parser.add_argument(
        "action",
        choices=("install", "remove", "status"),
        help=f"install: write {FILE_NAME} into this environment's site-packages; remove: delete it; "
        "status: exit code 0 where it is installed, 1 where it is missing or stale",
    )


def run(args: argparse.Namespace) -> int:
    """Do what ``args.action`` says; only ``status`` returns other than 0."""
    return {"install": _install, "remove": _remove, "status": _status}[args.action]()


def recipes_folder() -> str:
    """The folder of the recipes, absolute; wherever a wheel or an editable install has put it.

    Raises:
        ValueError: not installed, or the path cannot stand in a list of paths.
    """
    spec = importlib.util.find_spec("nnunetv2_cva.trainers")
    if spec is None or spec.origin is None:
        raise ValueError(
            "Expected the package nnunetv2_cva.trainers, found none: this is a copy of the source that is not "
            "installed. Run `pip install -e .` in the repository, or `pip install nnunetv2_cva`."
        )
    folder = os.path.normpath(os.path.dirname(os.path.abspath(spec.origin)))
    if os.pathsep in folder:
        raise ValueError(
            f"The recipes lie in {folder}, but nnU-Net splits {VARIABLE} at every {os.pathsep!r} and would not find "
            f"them. Install nnunetv2_cva in a folder without {os.pathsep!r} in its path."
        )
    return folder


def with_folder(value: str | None, folder: str) -> str:
    """``value`` of ``nnUNet_extTrainer`` with ``folder`` appended unless it is there: what the hook's line does."""
    if folder in map(os.path.normpath, (value or "").split(os.pathsep)):
        return value or ""
    return os.pathsep.join(filter(None, (value, folder)))


def hook_line(folder: str) -> str:
    """The text of the ``.pth`` file. ASCII whatever the path: Python before 3.13 reads it in the locale's encoding."""
    return _LINE.format(folder=ascii(folder), variable=ascii(VARIABLE))


def site_packages() -> Path:
    """Where the hook belongs: the environment's, or the user's if this package came by ``pip install --user``."""
    user, shared = _user_site(), Path(sysconfig.get_path("purelib"))
    try:
        home = importlib.metadata.distribution("nnunetv2_cva").locate_file("")
    except importlib.metadata.PackageNotFoundError:
        return shared
    return user if user is not None and _same(user, str(home)) else shared


def find_hook() -> Path | None:
    """The hook's file, of whatever content, if there is one that this Python reads."""
    places = [Path(sysconfig.get_path("purelib")), _user_site()]
    return next((p / FILE_NAME for p in places if p is not None and (p / FILE_NAME).is_file()), None)


def stale_reason(path: Path, folder: str) -> str | None:
    """Why the hook at ``path`` does not do what one installed now would, or None."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if text == hook_line(folder):
        return None
    found = re.search(r"\(os, (.+), '" + VARIABLE + r"'\)\s*$", text)
    try:
        other = literal_eval(found.group(1)) if found else None
    except (SyntaxError, ValueError):
        other = None
    if other is None or other == folder:
        return "was written by another version"
    return f"points to {other}, the trainers of this installation are in {folder}"


def _install() -> int:
    folder = recipes_folder()
    path = find_hook() or site_packages() / FILE_NAME
    line = hook_line(folder)
    try:
        _write_atomically(path, line)
    except OSError as e:
        raise ValueError(_not_writable(path, e, "written")) from None
    print(f"Wrote {path}:\n  {line.strip()}\nFrom now on this Python ({sys.executable}) appends\n  {folder}")
    print(f"to {VARIABLE} when it starts, and nnU-Net finds -tr nnUNetTrainerCVA. To undo: nnUNetv2_cva hook remove")
    return 0


def _remove() -> int:
    path = find_hook()
    if path is None:
        print(f"Nothing to remove: no {FILE_NAME} in {site_packages()}.")
    while path is not None:  # there may be one in the user's and one in the environment's site-packages
        try:
            path.unlink()
        except OSError as e:
            raise ValueError(_not_writable(path, e, "removed")) from None
        print(f"Removed {path}")
        path = find_hook()
    return 0


def _status() -> int:
    path = find_hook()
    if path is None:
        print(f"not installed: no {FILE_NAME} in {site_packages()}. To install: nnUNetv2_cva hook install")
        return 1
    reason = stale_reason(path, recipes_folder())
    if reason is not None:
        print(f"stale: {path} {reason}. To renew: nnUNetv2_cva hook install")
        return 1
    print(f"installed: {path} appends {recipes_folder()} to {VARIABLE}")
    return 0


def _write_atomically(path: Path, text: str) -> None:
    """A Python that starts meanwhile reads the old file, the new one or none; never a part (hence no ``.pth`` name)."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="ascii")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _not_writable(path: Path, error: OSError, done: str) -> str:
    return (
        f'{path} cannot be {done} ({error.strerror or error}). Two ways out: put `eval "$(nnUNetv2_cva env)"` into '
        "your shell's start-up file, which sets the variable without touching Python; or install nnU-Net and "
        "nnunetv2_cva in an environment of your own (`python -m venv ~/nnunet`)."
    )


def _user_site() -> Path | None:
    return Path(site.getusersitepackages()) if site.ENABLE_USER_SITE else None


def _same(a: Path, b: str) -> bool:
    return os.path.realpath(a) == os.path.realpath(b)
