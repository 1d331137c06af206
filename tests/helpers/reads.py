"""Noticing where a program would have to wait for its device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Reads(TorchDispatchMode):
    """Notes operations whose result, or the shape of it, has to be read back from the device."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name.startswith(self.NAMES):
            self.found.append(name)
        types_ = {getattr(leaf, "dtype", None) for leaf in tree_leaves(args)}
        if name.startswith("index") and torch.bool in types_:
            self.found.append(f"{name} by bool")
        return function(*args, **(kwargs or {}))
