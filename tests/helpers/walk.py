"""Runs ``nnUNetv2_cva plan`` and then every line that it has printed, one after the other, in one process: a program of its own,
because nnU-Net reads its folders when it is imported.

    python walk.py EPOCHS ITERATIONS plan -d ... (what follows nnUNetv2_cva)

Lines run as they are printed, but for fewer processes; a fine-tuning is only EPOCHS epochs of ITERATIONS iterations long.
"""

import contextlib
import io
import os
import shlex
import sys
from importlib.metadata import entry_points


def stock(name, arguments):
    """A command of nnU-Net's, by its entry point."""
    (entry,) = entry_points(group="console_scripts", name=name)
    sys.argv = [name, *arguments]
    entry.load()()


def shorten(epochs, iterations):
    """Of stock trainers; ours have settings for it."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    first = nnUNetTrainer.initialize

    def initialize(self):
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = epochs, iterations, 1
        first(self)

    nnUNetTrainer.initialize = initialize


def run(words):
    from nnunetv2_cva.commands import main

    name, *arguments = words
    fewer = {"nnUNetv2_preprocess": ["-np", "1"], "nnUNetv2_predict": ["-npp", "1", "-nps", "1"]}
    if name == "nnUNetv2_cva":
        code = main.main([*arguments, *(["-np", "1"] if arguments[0] in ("plan", "preprocess") else [])])
        if code:
            sys.exit(code)
    else:
        stock(name, [*arguments, *fewer.get(name, [])])


if __name__ == "__main__":
    shorten(int(sys.argv[1]), int(sys.argv[2]))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        run(["nnUNetv2_cva", *sys.argv[3:]])
    print(out.getvalue())
    for line in [line.strip() for line in out.getvalue().splitlines() if line.startswith("  nnUNetv2")]:
        print("$", line, flush=True)
        run([os.path.expandvars(word) for word in shlex.split(line)])
