"""The rules of the structure, read from the source without importing it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "nnunetv2_cva"
# From the ground up: a unit imports from lower layers and from itself, never from its own layer's other units.
LAYERS = (
    {"files", "nnunet", "sizes", "seeding"},
    {"config", "distributed"},
    {"views", "model", "losses"},
    {"transfer", "datasets"},
    {"seeing"},
    {"training"},
    {"demo"},
    {"commands"},
)
LAYER = {unit: number for number, units in enumerate(LAYERS) for unit in units}
WITHOUT_NNUNET = {"files", "nnunet", "sizes", "config", "distributed", "seeding", "views", "model", "losses"}


def sources(*folders):
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def unit_of(path):
    """``views`` for nnunetv2_cva/views/loader.py; None for the package's own __init__."""
    first = path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")
    return None if first == "__init__" else first


def imported(tree, module):
    """Absolute names of everything that the source of ``module`` imports, ``import_module("...")`` included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str))


def complaints_about_imports(path, text):
    """What ``text``, as the file ``path``, imports against the rules."""
    unit = unit_of(path)
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for name in imported(ast.parse(text), module):
        first, *rest = name.split(".")
        if first == "nnunetv2" and unit in WITHOUT_NNUNET:
            yield f"{path}: {unit} imports {name}, but must work without nnunetv2"
        if first == "trainers" or (first == PACKAGE and rest[:1] == ["trainers"]):
            yield f"{path} imports the recipe {name}"
        elif first == PACKAGE and rest and rest[0] in LAYER and unit is not None and rest[0] != unit:
            if LAYER[rest[0]] >= LAYER[unit]:
                yield f"{path}: {unit} imports {name}, but {rest[0]} does not stand below it"


def complaints_about_recipes(path, text):
    """What a module of recipes holds besides a docstring, absolute imports, classes and private values for these."""
    for number, node in enumerate(ast.parse(text).body):
        docstring = number == 0 and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        targets = node.targets if isinstance(node, ast.Assign) else [node]
        private = all(getattr(t, "id", getattr(t, "name", "")).startswith("_") for t in targets)
        if isinstance(node, ast.ImportFrom) and node.level:
            yield f"{path}: relative import; nnU-Net imports recipes as top-level modules"
        elif not (docstring or private or isinstance(node, (ast.Import, ast.ImportFrom, ast.ClassDef))):
            yield f"{path}:{node.lineno}: expected only imports and classes, found {type(node).__name__}"


def prints(text):
    return [n.lineno for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "print"]


def test_every_unit_has_a_layer():
    units = {unit_of(p) for p in sources(PACKAGE)} - {None}
    assert units <= set(LAYER), f"say in LAYERS where {units - set(LAYER)} stands"


def test_imports_go_one_way():
    assert not [c for p in sources(PACKAGE) for c in complaints_about_imports(p, p.read_text("utf-8"))]


@pytest.mark.parametrize(
    ("file", "text", "match"),
    [
        ("views/loader.py", "from nnunetv2_cva.training.trainer import CVATrainer", "training does not stand below"),
        ("views/loader.py", "from nnunetv2_cva import model", "model does not stand below"),
        ("config.py", "from .views import geometry", "views does not stand below"),
        ("model/taps.py", "def f():\n    import nnunetv2.paths", "must work without nnunetv2"),
        ("losses.py", "import importlib\nimportlib.import_module('nnunetv2_cva.commands')", "commands does not stand"),
        ("training/trainer.py", "from nnunetv2_cva.trainers import nnUNetTrainerCVA", "imports the recipe"),
        ("commands/demo.py", "from nnunetv2_cva.trainers.nnUNetTrainerCVA import nnUNetTrainerCVA", "the recipe"),
    ],
)
def test_an_import_against_the_rules_is_found(file, text, match):
    (complaint,) = complaints_about_imports(ROOT / PACKAGE / file, text)
    assert match in complaint


def test_imports_within_the_rules_are_not():
    text = "import nnunetv2\nfrom nnunetv2_cva.config import CVAConfig\nfrom .objective import objective"
    assert not list(complaints_about_imports(ROOT / PACKAGE / "training" / "trainer.py", text))


def test_recipes_are_absolute_imports_and_classes():
    assert not [c for p in sources("trainers") for c in complaints_about_recipes(p, p.read_text("utf-8"))]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("from .other import X", "relative import"),
        ("import torch\nLR = 1e-2", ":2: expected only imports and classes, found Assign"),
        ("_LR = 1e-2\ndef helper(): ...", ":2: expected only imports and classes, found FunctionDef"),
        ("if True:\n    import torch", "found If"),
    ],
)
def test_a_recipe_against_the_rules_is_found(text, match):
    (complaint,) = complaints_about_recipes("recipe.py", text)
    assert match in complaint


def test_only_commands_print():
    silent = [p for p in sources(PACKAGE, "trainers", "plans") if "commands" not in p.relative_to(ROOT).parts]
    assert not {str(p): lines for p in silent if (lines := prints(p.read_text("utf-8")))}
    assert prints("def f():\n    print('x')") == [2]


def test_no_file_is_called_utils():
    assert not [p for p in sources(PACKAGE, "trainers", "plans", "tests", "benchmarks") if p.stem in ("utils", "util")]
