"""What a run's savings cost in accuracy: its test metrics beside those of plain split learning, if they are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cutlayer.errors import some
from cutlayer.records.history import History, flat

DEFENCES = ("nopeek", "adversary", "noise", "clip", "channel_dropout", "watch")
AT_CUT = {"narrow": 1, "padding": 0, "bind": 1}
"""What a model has at its cut that the uncut network has not: the values with which it has nothing."""


@dataclass(frozen=True)
class Scored:
    """A run, as far as its accuracy can be compared.

    Attributes:
        history: its epochs and scores.
        config, facts: of its config.json; empty if that cannot be read.
    """

    history: History
    config: Mapping[str, Any]
    facts: Mapping[str, Any]

    @property
    def plain(self) -> bool:
        """Whether it is plain split learning in 32 bits: its network learns what the uncut one would."""
        method, model = self.config.get("method", {}), self.config.get("model", {})
        return bool(
            _kind(method.get("schedule")) == "Always"
            and method.get("activations") == method.get("gradients") == "fp32"
            and not any(method.get("defence", {}).get(name) for name in DEFENCES)
            and all(model.get(name, usual) == usual for name, usual in AT_CUT.items())
            and self.config.get("client_half") is None
        )

    @property
    def task(self) -> Any:
        """The same for runs of one network and the same data; None if nothing is recorded of these."""
        config = self.config
        if "data" not in config:  # begun from Python: what can be said of halves and data, and what is learned
            facts = {name: value for name, value in self.facts.items() if not name.startswith("batches")}
            return (facts, config.get("task")) if facts else None
        clients, model = config.get("clients", 1), config["model"]
        # The cut changes nothing of the network, unless its layers up to there have a width of their own.
        free = {*AT_CUT} if model.get("client_width") is not None else {*AT_CUT, "cut"}
        return (
            {name: value for name, value in config["data"].items() if name != "folder"},
            {name: value for name, value in model.items() if value is not None and name not in free},
            clients if isinstance(clients, int) else len(clients),  # a served run has their names
            config.get("partition", "iid"),
        )

    def score(self, metric: str, merged: bool) -> float | None:
        """The newest value of a test metric: of the merged model, or over the wire."""
        if merged:
            return self.history.merged.get(metric)
        return next((r.test[metric] for r in reversed(self.history.epochs) if metric in r.test), None)


@dataclass(frozen=True)
class Against:
    """A run beside plain split learning.

    Attributes:
        plain: the place of that run among those that were given; its own if it is one; None if there is none.
        lost: by metric, the run's value less that of plain split learning: of both merged models, or if there are not
            both, over the wire. Empty for a run of plain split learning.
    """

    plain: int | None
    lost: Mapping[str, float]


def against_plain(runs: Sequence[Scored]) -> list[Against]:
    """Each run beside that of plain split learning on the same data and network, and after as many epochs.

    Of several it is the one whose other choices, such as the seed, differ the least.
    """
    return [_against(place, runs) for place in range(len(runs))]


def _against(place: int, runs: Sequence[Scored]) -> Against:
    run = runs[place]
    if run.plain:
        return Against(place, {})
    if run.task is None:
        return Against(None, {})
    fitting = [
        other
        for other, each in enumerate(runs)
        if each.plain and each.task == run.task and len(each.history.epochs) == len(run.history.epochs)
    ]
    if not fitting or not run.history.epochs:
        return Against(None, {})
    plain = min(fitting, key=lambda other: _differing(run.config, runs[other].config))
    lost = {}
    for metric in metrics_of([run.history]):
        pairs = [(run.score(metric, merged), runs[plain].score(metric, merged)) for merged in (True, False)]
        if both := [(mine, its) for mine, its in pairs if mine is not None and its is not None]:
            lost[metric] = both[0][0] - both[0][1]
    return Against(plain, lost)


def metrics_of(histories: Sequence[History]) -> list[str]:
    """Names of test metrics, the loss aside."""
    names = dict.fromkeys(name for history in histories for record in history.epochs for name in record.test)
    return [name for name in names if name != "loss"]


def rows(runs: Mapping[str, Scored]) -> dict[str, dict[str, str]]:
    """Rows of a table, by what they say, each with a cell for every run; none if all are plain split learning."""
    if all(run.plain for run in runs.values()):
        return {}
    found = against_plain([*runs.values()])
    return {
        f"test {metric} against plain{', points' if _in_points(metric) else ''}": {
            name: "plain" if runs[name].plain else _difference(metric, each) or "not compared"
            for name, each in zip(runs, found, strict=True)
        }
        for metric in metrics_of([run.history for run in runs.values()])
    }


def in_words(runs: Mapping[str, Scored], name: str, metric: str) -> str:
    """The same of one run and metric; "" for plain split learning itself."""
    against = _against([*runs].index(name), [*runs.values()])
    if runs[name].plain:
        return ""
    if not (difference := _difference(metric, against)):
        return "not compared with plain split learning"
    unit = " points" if _in_points(metric) else ""
    return f"{difference}{unit} against plain split learning ({[*runs][against.plain or 0]})"


def not_compared(runs: Mapping[str, Scored], commands: Mapping[str, str]) -> list[str]:
    """A line for the runs of one network and data that are shown without plain split learning, and how to get that.

    Args:
        runs: by name.
        commands: what to type for plain split learning of a run, by the run's name; others were begun from Python.
    """
    without: dict[str, list[str]] = {}
    for (name, run), against in zip(runs.items(), against_plain([*runs.values()]), strict=True):
        if against.plain is None and metrics_of([run.history]):
            without.setdefault(repr((run.task, len(run.history.epochs))), []).append(name)
    return [
        f"The accuracy of {some(names, 3)} is not compared: "
        + (
            "config.json does not say on which data and network, as in a run that is served from Python"
            if runs[names[0]].task is None
            else "among these is no run of plain split learning on the same data and network, of as many epochs. "
            f"To make one: {commands.get(names[0], 'the same call with method=Method()')}"
        )
        for names in without.values()
    ]


def _difference(metric: str, against: Against) -> str:
    if metric not in against.lost:
        return ""
    lost = against.lost[metric]
    return f"{100 * lost:+.2f}" if _in_points(metric) else f"{lost:+.4g}"


def _in_points(metric: str) -> bool:
    return "accuracy" in metric.lower()


def _differing(config: Mapping[str, Any], other: Mapping[str, Any]) -> int:
    """How many choices of training differ."""
    mine, its = (flat(each.get("training", {})) for each in (config, other))
    return sum(mine.get(name) != its.get(name) for name in {*mine, *its})


def _kind(schedule: Any) -> str:
    return schedule.get("kind", "") if isinstance(schedule, dict) else ""
