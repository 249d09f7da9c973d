"""What to type for a config: the recipe that is nearest to it, and the options that differ."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from cutlayer.errors import ConfigError
from cutlayer.method import Method
from cutlayer.records.history import History
from cutlayer.report.accuracy import AT_CUT
from cutlayer.runs.choices import CONFIG_PATHS, SEVERAL, Choices, with_choices
from cutlayer.runs.config import RunConfig
from cutlayer.runs.recipes import RECIPES
from cutlayer.stopping import EarlyStopping


def command_of(config: RunConfig) -> str:
    """The call of `cutlayer train` for a config; a client half of its own (`client_half`) has no option there."""
    made = Choices.of(config)
    found = []
    for name, recipe in RECIPES.items():
        usual = Choices.of(recipe())
        given = {key: value for key, value in made.differing(usual).items() if _counts(key, value, config)}
        options = [part for key, value in given.items() for part in _options(key, value, getattr(usual, key))]
        found.append(["cutlayer", "train", name, *options])
    return shlex.join(min(found, key=len))


def plain_commands(runs: Mapping[str, Any]) -> dict[str, str]:
    """`plain_command` of each of several runs that has one, by name; each has a `config` and a `history`."""
    found = {name: plain_command(run.config, run.history) for name, run in runs.items()}
    return {name: command for name, command in found.items() if command is not None}


def plain_command(config: Mapping[str, Any], history: History) -> str | None:
    """The call for plain split learning in 32 bits, otherwise as in a run's config; None for one begun from Python.

    It does not end early, as it is compared after as many epochs: those of the run, if that ended early.
    """
    if "data" not in config:
        return None
    clients = config.get("clients", 1)
    try:
        run = RunConfig.from_dict({**config, "clients": clients if isinstance(clients, int) else len(clients)})
        ended = run.training.early_stopping.stops(history.epochs)
        epochs = len(history.epochs) if ended else run.training.epochs
        training = dataclasses.replace(run.training, epochs=epochs, early_stopping=EarlyStopping())
        plain = dataclasses.replace(run, client_half=None, method=Method(fleet=run.method.fleet), training=training)
        return command_of(with_choices(plain, **AT_CUT))
    except ConfigError:  # changed by hand, or of a version that knew more
        return None


def _counts(name: str, value: Any, config: RunConfig) -> bool:
    """Whether a choice is one in this config: not for several clients if there is one, nor of another schedule."""
    return (config.clients > 1 or name not in SEVERAL) and (value is not None or name in CONFIG_PATHS)


def _options(name: str, value: Any, usual: Any) -> Iterator[str]:
    flag = name.replace("_", "-")
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            mine, its = getattr(value, field.name), getattr(usual, field.name)
            if mine != its:
                yield from _options(f"{name}.{field.name}", mine, its)
    elif isinstance(value, bool):
        yield f"--{flag}" if value else f"--{_negated(flag)}"
    elif isinstance(value, tuple):
        yield from (f"--{flag}", *map(str, value))
    else:
        yield from (f"--{flag}", str(value))


def _negated(flag: str) -> str:
    *group, name = flag.split(".")
    return ".".join([*group, f"no-{name}"])
