"""The hook: makes nnU-Net find our trainers in this Python environment without an environment variable.

Python executes the lines of ``.pth`` files in its site-packages that begin with ``import`` whenever it starts. Ours
appends the recipes' folder to ``nnUNet_extTrainer``, where nnU-Net (>= 2.8) looks for trainers that are not its own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import site
import sys
import sysconfig
from ast import literal_eval
from pathlib import Path

from nnunetv2_cva.files import write_text

VARIABLE = "nnUNet_extTrainer"
# Not nnunetv2_cva.pth: build tools name their editable files after the project.
FILE_NAME = "nnunetv2_cva_hook.pth"

# One line; a lambda because whatever the line assigns would stay behind in the module `site`.
_LINE = (
    "import os; (lambda os, d, k: os.path.isdir(d)"
    " and d not in map(os.path.normpath, os.environ.get(k, '').split(os.pathsep))"
    " and os.environ.__setitem__(k, os.pathsep.join(filter(None, (os.environ.get(k), d)))))(os, {folder}, {variable})\n"
)


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


def install() -> list[str]:
    """Write the hook, over an older one where there is one. Returns what was done, in lines.

    Raises:
        ValueError: it cannot be written.
    """
    folder = recipes_folder()
    path, line = find_hook() or site_packages() / FILE_NAME, hook_line(folder)
    try:
        write_text(path, line)  # under its own name only when whole: a Python that starts meanwhile reads the old or the new one
    except OSError as e:
        raise ValueError(_not_writable(path, e, "written")) from None
    return [
        f"Wrote {path}:\n  {line.strip()}\nFrom now on this Python ({sys.executable}) appends\n  {folder}",
        f"to {VARIABLE} when it starts, and nnU-Net finds -tr nnUNetTrainerCVA. To undo: nnUNetv2_cva hook remove",
    ]


def remove() -> list[str]:
    """Remove every hook that this Python reads. Returns what was done, in lines.

    Raises:
        ValueError: one cannot be removed.
    """
    removed: list[str] = []
    while (path := find_hook()) is not None:  # there may be one in the user's and one in the environment's site-packages
        try:
            path.unlink()
        except OSError as e:
            raise ValueError(_not_writable(path, e, "removed")) from None
        removed.append(f"Removed {path}")
    return removed or [f"Nothing to remove: no {FILE_NAME} in {site_packages()}."]


def status() -> tuple[bool, str]:
    """Whether the hook is installed and up to date, and that in words."""
    path = find_hook()
    if path is None:
        return False, f"not installed: no {FILE_NAME} in {site_packages()}. To install: nnUNetv2_cva hook install"
    reason = stale_reason(path, recipes_folder())
    if reason is not None:
        return False, f"stale: {path} {reason}. To renew: nnUNetv2_cva hook install"
    return True, f"installed: {path} appends {recipes_folder()} to {VARIABLE}"


def export_line() -> str:
    """What does the same for one shell."""
    return f"export {VARIABLE}={shlex.quote(with_folder(os.environ.get(VARIABLE), recipes_folder()))}"


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
