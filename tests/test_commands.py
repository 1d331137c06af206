"""The console command itself, and ``env``."""

import argparse
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nnunetv2_cva import __version__, commands
from nnunetv2_cva.commands import hook as hook_command
from nnunetv2_cva.commands import main
from nnunetv2_cva.installation import hook


def call(*arguments):
    return main.main(arguments)


def test_every_module_with_help_is_a_command_and_the_reverse():
    modules = {p.stem for p in Path(commands.__path__[0]).glob("*.py") if "\nHELP = " in p.read_text("utf-8")}
    assert modules == {main.WITHIN.get(name, name) for name in main.COMMANDS}


@pytest.mark.parametrize("name", main.COMMANDS)
def test_a_command_has_help_arguments_and_run(name):
    module = importlib.import_module(f"nnunetv2_cva.commands.{main.WITHIN.get(name, name)}")
    command = getattr(module, name) if name in main.WITHIN else module
    assert isinstance(command.HELP, str) and command.HELP.endswith(".") and callable(command.run)
    command.add_arguments(argparse.ArgumentParser())


def test_help_names_every_command_without_importing_torch():
    code = (
        "import sys\nfrom nnunetv2_cva.commands.main import main\n"
        "try: main(['--help'])\nexcept SystemExit as e: assert not e.code\n"
        "slow = {'torch', 'nnunetv2', 'numpy', 'matplotlib'} & set(sys.modules)\nassert not slow, slow"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(re.search(rf"^    {name}\s", done.stdout, flags=re.MULTILINE) for name in main.COMMANDS)


def test_only_the_named_command_is_imported(monkeypatch):
    wanted = []
    real = importlib.import_module
    monkeypatch.setattr(main.importlib, "import_module", lambda name: wanted.append(name) or real(name))
    main.make_parser(["env"])
    assert wanted == ["nnunetv2_cva.commands.hook"]


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        call("--version")
    assert capsys.readouterr().out == f"nnUNetv2_cva {__version__}\n"


def test_unknown_command(capsys):
    with pytest.raises(SystemExit, match="2"):
        call("bogus")
    assert "invalid choice: 'bogus'" in capsys.readouterr().err


def test_a_users_error_is_one_line_and_exit_code_2(monkeypatch, capsys):
    def run(args):
        raise ValueError("Expected 3,\n   found 4.")

    monkeypatch.setattr(hook_command.env, "run", run)
    assert call("env") == 2
    assert capsys.readouterr() == ("", "nnUNetv2_cva: error: Expected 3, found 4.\n")


def test_our_own_bugs_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(hook_command.env, "run", lambda args: {}["bug"])
    with pytest.raises(KeyError, match="bug"):
        call("env")


def test_interrupting_is_no_traceback(monkeypatch, capsys):
    def run(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(hook_command.env, "run", run)
    assert call("env") == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("before", [None, "", "/a/b", '/it\'s $HOME/`x` "y"', "/a" + os.pathsep + "/ü"])
def test_env_survives_the_shell(before, monkeypatch, capfd):
    if before is not None:
        monkeypatch.setenv(hook.VARIABLE, before)
    assert call("env") == 0
    line = capfd.readouterr().out
    assert line.startswith("export nnUNet_extTrainer=") and line.count("\n") == 1
    shell = subprocess.run(["sh", "-c", f'{line}printf %s "${hook.VARIABLE}"'], capture_output=True, check=True)
    assert os.fsdecode(shell.stdout).split(os.pathsep) == [
        *((before or "").split(os.pathsep) if before else []),
        hook.recipes_folder(),
    ]


def test_env_adds_nothing_twice(monkeypatch, capsys):
    monkeypatch.setenv(hook.VARIABLE, f"/a{os.pathsep}{hook.recipes_folder()}/")
    assert call("env") == 0
    assert capsys.readouterr().out.count("trainers") == 1


def test_env_refuses_a_source_tree_that_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(hook.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"Expected the package nnunetv2_cva\.trainers, found none.*pip install -e"):
        hook.recipes_folder()
    assert call("env") == 2 and capsys.readouterr().out == ""
