"""Runs beside each other at their end: a table, and the same figures as values."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.measure import Measurement
from rich.table import Table

from cutlayer.durable import replace
from cutlayer.records.history import History, flat
from cutlayer.report.plain import plain_console
from cutlayer.report.spreadsheet import csv_text
from cutlayer.report.units import human_bytes
from cutlayer.schedule import Exchange


def _times(ratio: float) -> str:
    return "" if math.isnan(ratio) else f"{ratio:.2f}x"


def comparison(
    histories: dict[str, History],
    configs: Mapping[str, Mapping[str, Any]] | None = None,
    accuracy: Mapping[str, Mapping[str, str]] | None = None,
) -> Table:
    """A table with a column for each run: first what they chose, then what came of them.

    Test scores "over the wire" are of activations that went through the codec, and those of the merged model in 32
    bits, which only a run has whose process held both halves and the test data.

    Args:
        configs: of all runs that are compared, of which these may be some; choices that all made alike are left out.
        accuracy: what their savings cost, from `accuracy.rows`.
    """
    table = Table(title=None)
    table.add_column("", overflow="fold")
    for name in histories:
        table.add_column(name, justify="right", overflow="fold")

    chosen = {name: flat(config) for name, config in (configs or {}).items()}
    for choice in dict.fromkeys(choice for config in chosen.values() for choice in config):
        values = {name: str(config.get(choice, "")) for name, config in chosen.items()}
        if len(set(values.values())) > 1:
            table.add_row(choice, *(values[name] for name in histories))
    cost = {name: [cells[run] for run in histories] for name, cells in (accuracy or {}).items()}
    for name, cells in comparison_rows(list(histories.values()), cost):
        table.add_row(name, *cells)
    return table


def comparison_rows(runs: Sequence[History], accuracy: Mapping[str, list[str]]) -> Iterator[tuple[str, list[str]]]:
    """What came of runs: rows, each with a cell for every run.

    Args:
        accuracy: what savings cost, such rows by name, which are put beside them.
    """
    metrics = list(dict.fromkeys(m for history in runs for record in history.epochs for m in record.test))
    for metric in [m for m in metrics if m != "loss"] + [m for m in metrics if m == "loss"]:
        sent = [next((r.test[metric] for r in reversed(h.epochs) if metric in r.test), None) for h in runs]
        merged = [history.merged.get(metric) for history in runs]
        for how, values in (("over the wire", sent), ("merged model", merged)):
            if any(value is not None for value in values):
                yield f"test {metric}, {how}", ["" if v is None else f"{v:.4f}" for v in values]
    rows = {
        "epochs A / B / C": lambda h: " / ".join(str(h.count(exchange)) for exchange in Exchange),
        "sent up": lambda h: human_bytes(h.bytes("up")),
        "sent down": lambda h: human_bytes(h.bytes("down")),
        "all training bytes": lambda h: human_bytes(h.bytes()),
        "client weights, of these": lambda h: human_bytes(h.bytes(kinds=("weights",))),
        "evaluation traffic": lambda h: human_bytes(h.bytes(kinds=("evaluation",))),
        "given up when interrupted": lambda h: human_bytes(sum(h.given_up.values())),
        "client GFLOPs": lambda h: f"{h.flops('client') / 1e9:.1f}",
        "client GFLOPs, evaluation": lambda h: f"{h.evaluation_flops / 1e9:.1f}",
        "server GFLOPs": lambda h: f"{h.flops('server') / 1e9:.1f}",
        "seconds": lambda h: f"{h.seconds:.1f}",
        "activations and gradients reduced": lambda h: _times(h.traffic_reduction),
        "all training bytes reduced": lambda h: _times(h.all_bytes_reduction),
        "client FLOPs reduced": lambda h: _times(h.client_flops_reduction),
    }
    if not any(history.bytes(kinds=("weights",)) for history in runs):
        del rows["client weights, of these"]
    if not any(history.given_up for history in runs):
        del rows["given up when interrupted"]
    for name, cell in rows.items():
        yield name, [cell(history) for history in runs]
    yield from accuracy.items()


def lengths(histories: Mapping[str, History]) -> str:
    """What to say of runs of different lengths; nothing if they are of one."""
    counts = {name: len(history.epochs) for name, history in histories.items()}
    if len(set(counts.values())) < 2:
        return ""
    each = ", ".join(f"{name}: {count}" for name, count in counts.items())
    return (
        f"The runs are of different lengths ({each} epochs). Each is held against plain split learning of "
        "its own length, and longer runs save more by themselves."
    )


def comparisons(
    histories: Mapping[str, History],
    configs: Mapping[str, Mapping[str, Any]],
    accuracy: Mapping[str, Mapping[str, str]],
    width: int,
) -> Iterator[Table]:
    """Tables as `comparison` makes them, each of as many runs beside each other as the width takes."""
    wide, names = plain_console(width=1 << 16), list(histories)

    def table(count: int) -> Table:
        return comparison({name: histories[name] for name in names[:count]}, configs, accuracy)

    while names:
        count = 1
        while count < len(names) and Measurement.get(wide, wide.options, table(count + 1)).maximum <= width:
            count += 1
        yield table(count)
        names = names[count:]


def figures(history: History, config: Mapping[str, Any]) -> dict[str, Any]:
    """What a run chose and what came of it, as plain values by name; None for what there is not."""
    scores = next((record.test for record in reversed(history.epochs) if record.test), {})
    names = ("traffic_reduction", "all_bytes_reduction", "client_flops_reduction")
    ratios = {name: getattr(history, name) for name in names}
    values = {
        **{f"config.{name}": value for name, value in flat(config).items()},
        **{f"test.{name}": value for name, value in scores.items()},
        **{f"merged.{name}": value for name, value in history.merged.items()},
        **{f"epochs.{exchange.value}": history.count(exchange) for exchange in Exchange},
        **{f"bytes.{way}": history.bytes(way) for way in ("up", "down")},
        "bytes.given_up": sum(history.given_up.values()),
        "bytes.evaluation": history.bytes(kinds=("evaluation",)),
        **{f"flops.{party}": history.flops(party) for party in ("client", "server")},
        "flops.client_evaluation": history.evaluation_flops,
        "seconds": history.seconds,
        **ratios,
    }
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def write_figures(runs: Mapping[str, Mapping[str, Any]], file: Path, suffix: str) -> None:
    """Write the figures of runs, by name: ".json", or ".csv" with a line for each run."""
    rows = [{"run": name, **values} for name, values in runs.items()]
    if suffix == ".json":
        replace(file, json.dumps(rows, indent=2) + "\n")
        return
    replace(file, csv_text(rows, list(dict.fromkeys(name for row in rows for name in row))))
