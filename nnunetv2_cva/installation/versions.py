"""Whether what is installed has the versions that this package's metadata asks for: pip looks once, and others change it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

from packaging.requirements import Requirement

PACKAGE = "nnunetv2_cva"
REASONS = {
    "torch": "convolutions of torch 2.9 are slow in 3D under autocast",
    "timm": "from timm 1.0.23 on dynamic-network-architectures' Primus does not work",
}


def unsupported() -> Iterator[tuple[Requirement, str]]:
    """What is asked for and the version found (empty: none), of every package that does not meet it. Imports none of them."""
    try:
        asked = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:  # a copy of the source on the path: nobody has said what it needs
        return
    for requirement in map(Requirement, asked):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = ""
        if not (version and requirement.specifier.contains(version, prereleases=True)):
            yield requirement, version


def check_versions() -> None:
    """Called where the trainer is imported, before anything that an old version would break.

    Raises:
        ImportError: something is too old, too new or known to be broken; one sentence with the command that mends it.
    """
    wrong = list(unsupported())
    if wrong:
        found = ", ".join(f"{r.name} {v or 'missing'} (expected {r.specifier})" for r, v in wrong)
        mend = " ".join(f'"{r.name}{r.specifier}"' for r, _ in wrong)
        raise ImportError(f"{PACKAGE} does not work with what is installed: {found}. To mend it: pip install {mend}")
