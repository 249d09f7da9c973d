"""Nested values as JSON values and back: a dataclass is an object of its fields.

If a field may hold one of several kinds, such as a schedule, its object names which, as "kind".
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Iterable, Mapping
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec

from cutlayer.data.augment import Augment, CropFlip
from cutlayer.errors import ConfigError, unknown
from cutlayer.models.optim import Optimizer, OptimizerSpec
from cutlayer.runs.client_half import CLIENT_HALVES, ClientHalf
from cutlayer.schedule import SCHEDULES, Schedule
from cutlayer.strategies import STRATEGIES, Strategy


def _named(kinds: Iterable[type]) -> dict[str, type]:
    return {kind.__name__: kind for kind in kinds}


# Of fields that may hold one of several kinds: what they are declared as, and the kinds by name.
KINDS: dict[Any, dict[str, type]] = {
    Schedule: _named(SCHEDULES.values()),
    Strategy: _named(STRATEGIES.values()),
    OptimizerSpec: _named([Optimizer]),
    Augment: _named([CropFlip]),
    ClientHalf: CLIENT_HALVES,
}


def encode(value: Any, hint: Any = None, path: str = "") -> Any:
    """A value as JSON values.

    Args:
        hint: what it is declared as.
        path: what an error calls it.

    Raises:
        ConfigError: a kind of the user's own, which could not be read again.
    """
    kinds = _kinds(hint)
    if kinds and value is not None and kinds.get(type(value).__name__) is not type(value):
        raise ConfigError(
            f"{path}: {value!r} cannot be written to a config, which knows {', '.join(kinds)}; give it to `fit`"
        )
    if dataclasses.is_dataclass(value):
        hints = get_type_hints(type(value))
        names = [field.name for field in dataclasses.fields(value)]
        encoded = {name: encode(getattr(value, name), hints[name], _join(path, name)) for name in names}
        return {"kind": type(value).__name__, **encoded} if kinds else encoded
    return list(value) if isinstance(value, tuple) else value


def decode(value: Any, hint: Any, path: str = "") -> Any:
    """Inverse of `encode`: JSON values as a value of what they are declared as. Fields left out have their defaults.

    Raises:
        ConfigError: a field or kind that is unknown, or a value of the wrong type.
    """
    members, kinds = _members(hint), _kinds(hint)
    objects = [member for member in members if dataclasses.is_dataclass(member) and member not in KINDS]
    if isinstance(value, dict) and kinds:
        name = value.get("kind")
        if name not in kinds:
            raise ConfigError(f"config, {path}: {unknown('kind', name, kinds)}")
        return _made(kinds[name], {key: item for key, item in value.items() if key != "kind"}, path)
    if isinstance(value, dict) and objects:
        return _made(objects[0], value, path)
    plain = tuple(member for member in members if member not in (*objects, *KINDS))
    if not plain:
        raise ConfigError(f"config, {path or 'the whole'}: expected an object, got {value!r}")
    try:
        return msgspec.convert(value, functools.reduce(operator.or_, plain))
    except msgspec.ValidationError as error:
        raise ConfigError(f"config, {path}: {error}") from None


def _made(kind: Any, values: Mapping[str, Any], path: str) -> Any:
    hints = get_type_hints(kind)
    known = [_join(path, field.name) for field in dataclasses.fields(kind)]
    for name in values:
        if _join(path, name) not in known:
            raise ConfigError(unknown("config field", _join(path, name), known))
    return kind(**{name: decode(value, hints[name], _join(path, name)) for name, value in values.items()})


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _kinds(hint: Any) -> dict[str, type]:
    """The kinds that a value may be of; empty if it can be of one only."""
    return next((KINDS[member] for member in _members(hint) if member in KINDS), {})


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
