"""What a user sees of a training that fails: one sentence on the terminal, where it came from in the log."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from nnunetv2_cva.failures import TOLD, sentence

NNUNETS_COMMAND = "nnunetv2.run.run_training"
REFUSED = 2


@contextmanager
def noting(say: Callable[..., None]) -> Iterator[None]:
    """Pass on what the block raises, with its traceback in the log (``say``: the trainer's) but not on the terminal."""
    try:
        yield
    except TOLD:
        say(f"\n{traceback.format_exc()}", also_print_to_console=False)
        raise


def speak_plainly_in_nnunets_command() -> None:
    """From now on what ends ``nnUNetv2_train`` is one sentence and exit code 2, too: of the errors that a user can mend, and only
    where nnU-Net's command has called, so that no other program is changed."""
    if getattr(sys.excepthook, "__name__", "") == _one_sentence.__name__:
        return
    global _before
    _before, sys.excepthook = sys.excepthook, _one_sentence


_before = sys.excepthook


def _one_sentence(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not (isinstance(error, TOLD) and _called_by_nnunet(trace)):
        _before(kind, error, trace)
        return
    sys.stderr.write(f"nnunetv2_cva: error: {sentence(error)}\n")
    sys.exit(REFUSED)  # Python ends with the code that its hook asks for


def _called_by_nnunet(trace: TracebackType | None) -> bool:
    names = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(trace)]
    return NNUNETS_COMMAND in names and any(str(n).startswith("nnunetv2_cva.") for n in names)
