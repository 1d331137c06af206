"""How the end of a program that is nobody's bug is said: in one sentence."""

from __future__ import annotations

import errno
import os


class TrainingFailed(RuntimeError):
    """A training cannot go on: no memory, nothing finite, no data process. The message says what to change."""


TOLD = (ValueError, OSError, ImportError, TrainingFailed)  # what is said in one sentence; all else shows where it came from


def sentence(error: BaseException) -> str:
    """The error in one line, with the file that it is about."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        advice = {errno.ENOSPC: " Make room there.", errno.EACCES: " Get permission, or choose another place."}
        return f"{where}{error.strerror}.{advice.get(error.errno or 0, '')}"
    return " ".join(str(error).split()) or type(error).__name__
