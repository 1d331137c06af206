"""Settings that explain themselves: frozen dataclasses whose fields carry help and range, and where their values come from.

Values are taken from, later wins:

1. the recipe (``config = ...`` of the trainer class),
2. ``configurations[name][BLOCK]`` of the plans file, merged setting by setting along ``inherits_from``,
3. the environment variable ``VARIABLE`` (JSON), for throw-away runs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from nnunetv2_cva.nnunet import inheritance


@dataclass(frozen=True)
class Range:
    """Which values of a setting are allowed, in words and as a rule."""

    words: str
    holds: Callable[[Any], bool]


ANYTHING = Range("", lambda v: True)
PROBABILITY = Range("a probability in [0, 1]", lambda v: 0 <= v <= 1)
POSITIVE_INTEGER = Range("a positive integer", lambda v: v >= 1)
COUNT = Range("an integer >= 0", lambda v: v >= 0)
POSITIVE = Range("a positive number", lambda v: v > 0)
NOT_NEGATIVE = Range("a number >= 0", lambda v: v >= 0)
INTERVAL = Range("0 < low <= high", lambda v: 0 < v[0] <= v[1])
FRACTIONS = Range("0 < low <= high <= 1", lambda v: 0 < v[0] <= v[1] <= 1)


def setting(default: Any, meaning: str, allowed: Range = ANYTHING, *, group: str = "", may_change: bool = False) -> Any:
    """A field of a :class:`Settings`. ``meaning``: one line; ``may_change``: a run that is continued may have another value."""
    return dataclasses.field(default=default, metadata=dict(meaning=meaning, allowed=allowed, group=group, may_change=may_change))


@dataclass(frozen=True)
class Settings:
    """Base of frozen dataclasses whose fields are made by :func:`setting`. Subclasses may add fields.

    Raises:
        ValueError: a value has the wrong type or is out of range; names the setting.
    """

    BLOCK: ClassVar[str]  # of a configuration in the plans
    VARIABLE: ClassVar[str]
    RENAMED: ClassVar[Mapping[str, str]] = {}  # names of earlier versions
    TYPES: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        # Now: nnU-Net drops modules of recipes from sys.modules, and with them the names that annotations refer to.
        cls.TYPES = typing.get_type_hints(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, expected = getattr(self, field.name), self.TYPES[field.name]
            if not _has_type(value, expected):
                raise ValueError(f"{field.name}: expected {type_name(expected)}, found {value!r}.")
            allowed = field.metadata.get("allowed", ANYTHING)
            if not allowed.holds(value):
                raise ValueError(f"{field.name}: expected {allowed.words}, found {value!r}.")

    def as_dict(self) -> dict[str, Any]:
        """Plain types only (lists instead of tuples), as stored in checkpoints and ``cva_config.json``."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def updated(self: Chosen, values: Mapping[str, Any], origin: str) -> Chosen:
        """A copy with ``values`` set; lists become tuples.

        Raises:
            ValueError: unknown key, wrong type or value out of range; names the key and ``origin``.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"{origin}: expected an object of settings, found {type(values).__name__} {values!r}.")
        known = {f.name for f in dataclasses.fields(self)}
        for key in values:
            if key in self.RENAMED:
                raise ValueError(f"{origin}: the setting {key!r} is now called {self.RENAMED[key]!r}. Rename it there.")
            if key not in known:
                raise ValueError(f"{origin}: unknown setting {key!r}. Valid settings: {', '.join(sorted(known))}.")
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        try:
            return dataclasses.replace(self, **plain)
        except ValueError as e:
            raise ValueError(f"{origin}: {e}") from None


Chosen = TypeVar("Chosen", bound=Settings)


def resolve(recipe: Chosen, plans: Mapping[str, Any], configuration: str, environment: Mapping[str, str]) -> Chosen:
    """The settings of a run: recipe < plans < environment (see the module's docstring).

    Raises:
        ValueError: a bad value anywhere; the message names the key and where it came from.
    """
    config = recipe
    for name in inheritance(plans, configuration):
        block = plans["configurations"][name].get(recipe.BLOCK)
        if block is not None:
            config = config.updated(block, f'plans file, configurations["{name}"]["{recipe.BLOCK}"]')
    origin, text = f"environment variable {recipe.VARIABLE}", environment.get(recipe.VARIABLE, "").strip()
    if text:
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{origin}: expected JSON such as '{{\"epochs\": 10}}', found {text!r} ({e}).") from None
        config = config.updated(values, origin)
    return config


def check_resumable(saved: Mapping[str, Any], now: Chosen) -> Chosen:
    """The checkpoint's configuration with the settings that may change taken from ``now``.

    Raises:
        ValueError: another setting differs; names every such key with both values.
    """
    before, after = dict(saved), now.as_dict()
    fixed = [f.name for f in dataclasses.fields(now) if not f.metadata.get("may_change")]
    changed = [k for k in fixed if before.get(k, after[k]) != after[k]]
    if changed:
        listing = "; ".join(f"{k}: {before[k]!r} in the checkpoint, {after[k]!r} now" for k in changed)
        raise ValueError(
            f"Cannot resume with other settings than the checkpoint's ({listing}). Restore them in the plans file or in "
            f"{now.VARIABLE}, or start a new training instead."
        )
    return now.updated({k: before[k] for k in fixed if k in before}, "checkpoint")


@dataclass(frozen=True)
class Explained:
    """A setting in words. ``fixed``: a run that is continued keeps it."""

    name: str
    default: str
    expected: str
    meaning: str
    group: str
    fixed: bool


def explained(config: Settings) -> list[Explained]:
    """Every setting of ``config`` with its value there as the default."""
    return [
        Explained(
            f.name,
            json.dumps(getattr(config, f.name)),
            f.metadata["allowed"].words or type_name(config.TYPES[f.name]),
            f.metadata["meaning"],
            f.metadata["group"],
            not f.metadata["may_change"],
        )
        for f in dataclasses.fields(config)
    ]


def _has_type(value: Any, expected: Any) -> bool:
    origin = typing.get_origin(expected)
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in typing.get_args(expected))
    if origin is tuple:
        args = typing.get_args(expected)
        return isinstance(value, tuple) and len(value) == len(args) and all(map(_has_type, value, args))
    if origin in (typing.Union, types.UnionType):
        return any(_has_type(value, a) for a in typing.get_args(expected))
    if expected is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, expected)


def type_name(expected: Any) -> str:
    """A type as messages and tables call it, in JSON's words."""
    origin = typing.get_origin(expected)
    if origin is Literal:
        return "one of " + ", ".join(repr(a) for a in typing.get_args(expected))
    if origin is tuple:
        return "[" + ", ".join(type_name(a) for a in typing.get_args(expected)) + "]"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(a) for a in typing.get_args(expected))
    return "null" if expected is type(None) else {"bool": "true or false"}.get(expected.__name__, expected.__name__)
