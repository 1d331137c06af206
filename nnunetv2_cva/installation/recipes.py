"""Which recipes ``nnUNetv2_train -tr`` finds."""

from __future__ import annotations

import ast
import os
from pathlib import Path

from nnunetv2_cva.installation.hook import VARIABLE, recipes_folder


def all_recipes() -> dict[str, str]:
    """Name -> first line of the docstring: ours, the default first, then those in the user's own folders."""
    folders = [recipes_folder(), *os.environ.get(VARIABLE, "").split(os.pathsep)]
    found: dict[str, str] = {}
    for folder in dict.fromkeys(os.path.realpath(f) for f in folders if f):
        found.update({name: line for name, line in recipes(Path(folder)).items() if name not in found})
    return found


def recipes(folder: Path) -> dict[str, str]:
    """Name -> first line of the docstring of the recipes in ``folder``, the default first, then file by file.

    Read without importing: nnU-Net takes seconds to import, and not at all where torchvision does not match torch.
    """
    found = {}
    for path in sorted(folder.glob("*.py"), key=lambda p: p.stem.split("_")):
        for node in ast.parse(path.read_text(encoding="utf-8"), str(path)).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name] = (ast.get_docstring(node) or "").partition("\n")[0]
    return found
