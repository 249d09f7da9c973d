"""Parts of a config: by their place in it, or made up of several choices."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from cutlayer.codecs import PAIRS, get_pair
from cutlayer.errors import ConfigError, unknown
from cutlayer.method import Method
from cutlayer.schedule import SCHEDULES, Schedule
from cutlayer.strategies import STRATEGIES, Strategy, make_strategy

# What makes up a schedule, by the names that its classes have for it.
SCHEDULE_VALUES = {
    "fixed_exchanges": "exchanges",
    "threshold": "threshold",
    "warmup": "warmup",
    "period": "period",
    "both_epochs": "both",
    "activation_epochs": "activations",
    "last_exchange": "last",
    "spread": "spread",
    "averaged_updates": "averaged",
    "megabytes": "megabytes",
    "client_gflops": "client_gflops",
    "both_share": "share",
}


def schedule_of(before: Schedule, given: Mapping[str, Any]) -> Schedule:
    """The schedule, with what is given of it in place of what the one before said."""
    name = given.get("schedule")
    if name is not None and name not in SCHEDULES:
        raise ConfigError(unknown("schedule", name, SCHEDULES))
    kind = SCHEDULES[name] if name is not None else type(before)
    names = [field.name for field in dataclasses.fields(kind)]
    values = {name: getattr(before, name) for name in names if hasattr(before, name)}
    new = {field: given[name] for name, field in SCHEDULE_VALUES.items() if field in names and name in given}
    return kind(**{**values, **new})


def strategy_of(before: Strategy, given: Mapping[str, Any]) -> Strategy:
    """The strategy, with what is given of it in place of the one before."""
    name, every = given.get("strategy"), given.get("average_every")
    if every is None and (name is None or STRATEGIES.get(name) is type(before)):
        return before
    return make_strategy(name or name_of(before, STRATEGIES), every)


def codecs_of(method: Method, given: Mapping[str, Any]) -> dict[str, str]:
    """The specs of both directions."""
    names = ("activations", "gradients")
    pair = [transfer.name for transfer in get_pair(given["codec"])] if "codec" in given else None
    usual = pair or [method.activations, method.gradients]
    return {name: given.get(name, spec) for name, spec in zip(names, usual, strict=True)}


def pair_of(method: Method) -> str:
    """The shortest spec of both directions."""
    both = (method.activations, method.gradients)
    return next((name for name, pair in PAIRS.items() if pair == both), "/".join(dict.fromkeys(both)))


def name_of(value: object, known: Mapping[str, type]) -> str:
    """The name of a value's kind; that of its class for one of the user's own."""
    return next((name for name, kind in known.items() if type(value) is kind), type(value).__name__)


def at(value: Any, place: str) -> Any:
    """The part of a value in a place, such as "method.fleet.state"."""
    for name in place.split("."):
        value = getattr(value, name)
    return value


def replaced(value: Any, parts: Mapping[str, Any]) -> Any:
    """A value with other parts, by their places. It is made once, of all of them, so checks see what goes together."""
    new: dict[str, Any] = {}
    within: dict[str, dict[str, Any]] = {}
    for place, part in parts.items():
        name, _, rest = place.partition(".")
        if rest:
            within.setdefault(name, {})[rest] = part
        else:
            new[name] = part
    return dataclasses.replace(
        value, **new, **{name: replaced(getattr(value, name), of) for name, of in within.items()}
    )
