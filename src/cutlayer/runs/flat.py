"""Configs as version 0.1 wrote them, whose choices lay side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cutlayer.codecs import get_pair
from cutlayer.data.augment import Augment, CropFlip
from cutlayer.describe import describe
from cutlayer.errors import ConfigError, unknown
from cutlayer.method import Method
from cutlayer.runs.choices import CONFIG_PATHS
from cutlayer.runs.config import RunConfig
from cutlayer.runs.config_json import encode
from cutlayer.schedule import Schedule, make_schedule
from cutlayer.strategies import Strategy, make_strategy

LIMITS = ("warmup", "threshold", "period")
MADE = ("schedule", *LIMITS, "mode", "average_every", "codec", "activations", "gradients", "augment")


def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config's JSON values as they are written today; what an older version did not know has its default.

    Configs of `fit` are of this kind, too: they describe its arguments and are not read back.

    Raises:
        ConfigError: a field of a flat config that is unknown.
    """
    if not isinstance(values.get("data"), str):
        return _with_later_choices(_with_strategy(values))
    known = [*CONFIG_PATHS, *MADE]
    if strange := [name for name in values if name not in known]:
        raise ConfigError(unknown("config field", strange[0], known))
    new = RunConfig().as_dict()
    for name, place in CONFIG_PATHS.items():
        if name in values:
            _put(new, place, values[name])
    activations, gradients = get_pair(values.get("codec", "fp8"))
    limits = {name: values[name] for name in LIMITS if name in values}
    for place, value in {
        "method.activations": values.get("activations") or activations.name,
        "method.gradients": values.get("gradients") or gradients.name,
        "method.schedule": encode(make_schedule(values.get("schedule", "drop"), **limits), Schedule),
        "method.fleet.strategy": encode(
            make_strategy(values.get("mode", "splitfed_v2"), values.get("average_every")), Strategy
        ),
        "training.augment": encode(CropFlip(), Augment) if values.get("augment") else None,
    }.items():
        _put(new, place, value, whole=True)
    return new


def read_config(values: Mapping[str, Any]) -> RunConfig:
    """A config from its JSON values, of this version or flat. Raises ConfigError for what is unknown or wrong."""
    return RunConfig.from_dict(upgraded(values))


def _with_strategy(values: Mapping[str, Any]) -> dict[str, Any]:
    """A fleet's strategy used to be called its mode."""
    method = values.get("method")
    fleet = method.get("fleet") if isinstance(method, dict) else None
    if not isinstance(method, dict) or not isinstance(fleet, dict) or "mode" not in fleet:
        return dict(values)
    renamed = {("strategy" if name == "mode" else name): value for name, value in fleet.items()}
    return {**values, "method": {**method, "fleet": renamed}}


def _with_later_choices(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a method could not choose at the time has its default."""
    method = values.get("method")
    if not isinstance(method, dict):
        return dict(values)
    # Of a recipe, kinds go without saying.
    usual = RunConfig().as_dict()["method"] if "data" in values else describe(Method())
    return {**values, "method": {**usual, **method}}


def _put(values: dict[str, Any], place: str, value: Any, whole: bool = False) -> None:
    """Put a value in its place; of an object that is not whole, what it lacks stays as it is."""
    *parents, name = place.split(".")
    for parent in parents:
        values = values[parent]
    values[name] = {**values[name], **value} if isinstance(value, dict) and not whole else value
