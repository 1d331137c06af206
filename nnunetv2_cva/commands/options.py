"""Between a command's options and the library's words: requests made of options, messages that name options."""

from __future__ import annotations

import argparse
import dataclasses
import re
from typing import Any, TypeVar

Kind = TypeVar("Kind")


def request(kind: type[Kind], args: argparse.Namespace) -> Kind:
    """The frozen request of what was given, field by field; lists as tuples."""
    fields = (f.name for f in dataclasses.fields(kind))  # type: ignore[arg-type]
    given: dict[str, Any] = {name: getattr(args, name) for name in fields if hasattr(args, name)}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def in_options(text: str, args: argparse.Namespace) -> str:
    """``text``, in which the library names fields of its requests in backticks, with the options that set them.

    `` `hold_out=0` `` becomes ``--hold-out 0``, `` `target` `` becomes ``--target``.
    """

    def option(found: re.Match[str]) -> str:
        name, value = found.groups()
        if name not in args.options:
            return found.group()
        return args.options[name] + (f" {value}" if value is not None else "")

    return re.sub(r"`(\w+)(?:=([^`]*))?`", option, text)


def options_of(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Of every field that an option sets, the option."""
    return {a.dest: a.option_strings[0] for a in parser._actions if a.option_strings}
