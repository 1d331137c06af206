"""torch.compile that may fail: where no compiler is installed, a training goes on without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Compiled:
    """A module under ``torch.compile``. A failure of its first call is reported in one line, and the module itself used from then
    on; running out of GPU memory is not the compiler's fault and is raised."""

    def __init__(self, module: nn.Module, say: Callable[[str], None]) -> None:
        self.module, self.say = module, say
        self.compiled: Callable[..., Any] | None = torch.compile(module)
        self.worked = False

    def __call__(self, *inputs: Any) -> Any:
        if self.compiled is None:
            return self.module(*inputs)
        if self.worked:
            return self.compiled(*inputs)
        try:
            found = self.compiled(*inputs)
            self.worked = True
            return found
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as e:
            self.compiled = None
            found = self.module(*inputs)  # fails in the same way when compiling was not to blame
            reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
            self.say(f"Going on without torch.compile, which failed: {reason} (nnUNet_compile=0 switches it off)")
            return found
