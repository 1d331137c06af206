"""The rules of the structure, read from the source without importing it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "nnunetv2_cva"
# From the ground up: a unit imports from lower layers and from itself, never from its own layer's other units.
LAYERS = (
    {"failures", "files", "nnunet", "seeding", "signals", "sizes"},
    {"settings", "installation"},
    {"config", "distributed"},
    {"views", "model", "losses"},
    {"transfer", "datasets"},
    {"seeing"},
    {"training"},
    {"comparing", "peek", "plan"},
    {"demo"},
    {"commands"},
)
LAYER = {unit: number for number, units in enumerate(LAYERS) for unit in units}
WITHOUT_NNUNET = set().union(*LAYERS[:4])


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


# Modules below the commands that make lines to paste, or call other programs.
LINES_TO_PASTE = (
    *("datasets/next_steps", "demo/flow", "demo/pipeline", "demo/results", "installation/doctor", "installation/hook"),
    *("training/launch", "training/messages", "training/report", "transfer/plans", "transfer/publish", "transfer/target"),
)
OF_NNUNET = {"--c", "-pretrained_weights", "--disable_checkpointing"}  # what a training was started with
OTHER_PROGRAMS = {"-e", "--shm-size", "--ipc"}  # of pip and Docker
OPTION = re.compile(r"(?<![\w-])--?[a-zA-Z](?:[\w-]*\w)?(?![\w-])")


def library_calls(text):
    """Names that functions of a module of commands import from the layers below: functions, for types begin with a capital."""
    for function in (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)):
        for node in (n for n in ast.walk(function) if isinstance(n, ast.ImportFrom)):
            if (node.module or "").startswith(f"{PACKAGE}.") and not node.module.startswith(f"{PACKAGE}.commands"):
                yield from (alias.name for alias in node.names if not alias.name[0].isupper())


def options_in_messages(text):
    """Options of commands in what a module says: its strings, without docstrings and what nnU-Net is called with."""
    tree = ast.parse(text)
    docstrings = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield from (option for option in OPTION.findall(node.value) if option not in OTHER_PROGRAMS | OF_NNUNET)


def test_a_command_calls_one_function_of_the_layers_below():
    commands = sources(f"{PACKAGE}/commands")
    called = {p.stem: sorted(set(library_calls(p.read_text("utf-8")))) for p in commands}
    assert not {name: names for name, names in called.items() if len(names) > 1}
    assert called["plan"] == ["plan"]


def test_messages_below_the_commands_name_no_options():
    """Lines to paste are the exception: they are commands."""
    named = {p: p.relative_to(ROOT / PACKAGE).with_suffix("").as_posix() for p in sources(PACKAGE)}
    assert set(LINES_TO_PASTE) <= set(named.values())
    below = [p for p, name in named.items() if unit_of(p) not in {None, "commands"} and name not in LINES_TO_PASTE]
    assert not {str(p): found for p in below if (found := list(options_in_messages(p.read_text("utf-8"))))}


def test_a_command_that_thinks_and_a_message_with_an_option_are_found():
    imports = ("nnunetv2_cva.datasets.planning import PlanRequest, plan", "nnunetv2_cva.files import read_json")
    text = "def run(args):\n" + "".join(f"    from {line}\n" for line in imports)
    assert list(library_calls(text)) == ["plan", "read_json"]
    text = 'def f():\n    """As --fast."""\n    raise ValueError(f\'{x}: give --hold-out, or -d; a well-known x-y\')'
    assert list(options_in_messages(text)) == ["--hold-out", "-d"]


def circles(imports):
    """Modules that import each other, however many steps away. ``imports``: module -> modules."""

    def reached(start):
        seen, todo = set(), [start]
        while todo:
            new = imports.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return seen

    return sorted(module for module in imports if module in reached(module))


def test_no_module_imports_itself_however_many_steps_away():
    """At run time: what is imported for types alone does not count."""
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in sources(PACKAGE)}
    imports = {}
    for module, path in modules.items():
        tree = ast.parse(path.read_text("utf-8"))
        for node in (n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)):
            node.body = [ast.Pass()]
        names = set(imported(tree, module))
        imports[module] = {n for name in names for n in (name, name.rpartition(".")[0]) if n in modules and n != PACKAGE}
    assert circles(imports) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]


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


def test_one_name_for_one_thing():
    """No class has the name of another module's."""
    found = {}
    for path in sources(PACKAGE):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(path.name)
    assert {name: files for name, files in found.items() if len(files) > 1} == {}
