"""When to communicate: a file for each family of schedules. `make_schedule` makes one by its name."""

from __future__ import annotations

import dataclasses
from typing import Any

from cutlayer.errors import ConfigError, unknown
from cutlayer.schedule.base import NOTHING, Cost, Exchange, Outlook, Schedule, State
from cutlayer.schedule.budget import Budget
from cutlayer.schedule.rules import Always, Drift, Drop, LossBased, Once, Periodic, Plateau
from cutlayer.schedule.settle import Fixed, Settle

__all__ = [
    "NOTHING",
    "SCHEDULES",
    "Always",
    "Budget",
    "Cost",
    "Drift",
    "Drop",
    "Exchange",
    "Fixed",
    "LossBased",
    "Once",
    "Outlook",
    "Periodic",
    "Plateau",
    "Schedule",
    "Settle",
    "State",
    "make_schedule",
]

SCHEDULES: dict[str, type[Schedule]] = {
    "always": Always,
    "drift": Drift,
    "drop": Drop,
    "plateau": Plateau,
    "periodic": Periodic,
    "once": Once,
    "fixed": Fixed,
    "settle": Settle,
    "budget": Budget,
}


def make_schedule(name: str, **values: Any) -> Schedule:
    """The schedule of this name; values that it does not use are ignored. Raises ConfigError with the known names."""
    if name not in SCHEDULES:
        raise ConfigError(unknown("schedule", name, SCHEDULES))
    kind = SCHEDULES[name]
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{key: value for key, value in values.items() if key in known})
