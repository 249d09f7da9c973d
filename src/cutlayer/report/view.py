"""What a report shows of a run: what was found of it, and what is missing."""

from __future__ import annotations

import math
import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from cutlayer.records.history import EpochRecord, History, flat
from cutlayer.report.units import human_bytes


@dataclass(frozen=True)
class RunView:
    """A run as a report shows it.

    Attributes:
        name: what to call it.
        history: of the epochs that could be read.
        config, facts, environment: as in config.json; empty if that cannot be read.
        confusion: of the merged model on the test data: of the samples of each class (rows) how many it takes for
            which (columns); empty if that could not be found out.
        clients: samples of each class (columns) with each client (rows); empty if they are not known.
        attacks: lines of attacks.jsonl.
        pictures: names and PNG files of a privacy gallery.
        missing: what there is not, and why, in sentences.
        changes: what was changed in the midst of the run, and which clients came and went, in sentences.
    """

    name: str
    history: History
    config: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    confusion: Sequence[Sequence[int]] = ()
    clients: Sequence[Sequence[int]] = ()
    attacks: Sequence[Mapping[str, Any]] = ()
    pictures: Sequence[tuple[str, bytes]] = ()
    missing: Sequence[str] = ()
    changes: Sequence[str] = ()

    @property
    def metric(self) -> str:
        """The test metric to show: the first one that is not the loss; "" if there is none."""
        names = [name for record in self.history.epochs for name in record.test]
        return next((name for name in names if name != "loss"), names[0] if names else "")

    def points(self, metric: str) -> list[tuple[float, float]]:
        """(epoch from 1, value) of a test metric."""
        return [(record.epoch + 1, record.test[metric]) for record in self.history.epochs if metric in record.test]

    @property
    def sent(self) -> list[int]:
        """Bytes of training up to the end of each epoch."""
        return list(accumulate(training_bytes(record) for record in self.history.epochs))

    @property
    def client_flops(self) -> list[int]:
        """FLOPs of the clients' training up to the end of each epoch."""
        return list(accumulate(_flops(record) for record in self.history.epochs))

    def metric_by_bytes(self, metric: str) -> list[tuple[float, float]]:
        """(MB of training sent so far, value) of a test metric."""
        return [
            (sent / 1e6, r.test[metric])
            for sent, r in zip(self.sent, self.history.epochs, strict=True)
            if metric in r.test
        ]


def training_bytes(record: EpochRecord) -> int:
    """Bytes of training in both directions."""
    return sum(n for kinds in record.bytes.values() for kind, n in kinds.items() if kind != "evaluation")


def _flops(record: EpochRecord) -> int:
    return sum(n for what, n in record.flops.get("client", {}).items() if what != "evaluation")


def letters(count: int) -> list[str]:
    """A letter for each run: a, b, ..., z, a2, ..."""
    return [string.ascii_lowercase[n % 26] + (str(n // 26 + 1) if n > 25 else "") for n in range(count)]


def differing(views: Sequence[RunView]) -> list[tuple[str, list[str]]]:
    """The choices that not all runs made alike, each with every run's."""
    chosen = [flat(view.config) for view in views]
    rows = []
    for name in dict.fromkeys(name for each in chosen for name in each):
        values = [str(each.get(name, "")) for each in chosen]
        if len(set(values)) > 1:
            rows.append((name, values))
    return rows


def epoch_rows(view: RunView) -> Iterator[dict[str, Any]]:
    """A row for each epoch of a run."""
    for record in view.history.epochs:
        yield {
            "run": view.name,
            "epoch": record.epoch + 1,
            "exchange": record.states or record.exchange,
            "loss": round(record.loss, 6),
            **{f"test {name}": round(value, 6) for name, value in record.test.items()},
            "bytes up": sum(n for k, n in record.bytes.get("up", {}).items() if k != "evaluation"),
            "bytes down": sum(n for k, n in record.bytes.get("down", {}).items() if k != "evaluation"),
            "bytes evaluation": sum(kinds.get("evaluation", 0) for kinds in record.bytes.values()),
            "client FLOPs": _flops(record),
            "seconds": round(sum(record.seconds.values()), 3),
        }


def facts(view: RunView, cost: str = "") -> list[tuple[str, str]]:
    """A run's figures in a few lines, for the head of a page.

    Args:
        cost: what is to be said of its metric beside that of plain split learning.
    """
    history = view.history
    found = [("epochs", f"{len(history.epochs)}: " + ", ".join(f"{history.exchanges.count(x)} {x}" for x in "ABC"))]
    if view.metric:
        merged = history.merged.get(view.metric)
        value = f"{history.test(view.metric):.4f}" + ("" if merged is None else f" (merged model {merged:.4f})")
        found.append((f"test {view.metric}", value + (f"; {cost}" if cost else "")))
    found.append(("sent", f"{human_bytes(history.bytes('up'))} up, {human_bytes(history.bytes('down'))} down"))
    for name, ratio in (("traffic", history.traffic_reduction), ("client FLOPs", history.client_flops_reduction)):
        if math.isfinite(ratio):
            found.append((f"{name} reduced", f"{ratio:.3g}x against plain split learning"))
    found += [("changed on the way", change) for change in view.changes]
    return found
