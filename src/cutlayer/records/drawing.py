"""A run's epochs drawn with matplotlib, and as the few lines of HTML that a notebook shows."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING, Any

from cutlayer.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"A": "tab:blue", "B": "tab:orange", "C": "tab:gray"}


def draw(records: Sequence[Any], metric: str | None, axes: Axes | None = None) -> Axes:
    """Training loss by epoch, on a second scale a test metric, and the exchanges behind them.

    Args:
        records: of the epochs, as `EpochRecord`.
        metric: of the test data; None for none.
        axes: to draw into; by default new ones.
    """
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError:
        raise ConfigError("a figure needs matplotlib: pip install 'cutlayer[report]'") from None
    if axes is None:
        _, axes = plt.subplots()
    assert axes is not None
    begin = 1
    for exchange, stretch in groupby(record.exchange for record in records):
        end, name = begin + len(list(stretch)), f"{exchange} epochs"
        known = axes.get_legend_handles_labels()[1]
        label = name if name not in known else "_"
        axes.axvspan(begin - 0.5, end - 0.5, color=COLOURS.get(exchange, "tab:gray"), alpha=0.15, label=label)
        begin = end
    axes.plot([r.epoch + 1 for r in records], [r.loss for r in records], color="black", label="training loss")
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss")
    handles, labels = axes.get_legend_handles_labels()
    tested = [record for record in records if metric in record.test] if metric is not None else []
    if tested:
        beside = axes.twinx()
        points = [r.epoch + 1 for r in tested], [r.test[metric] for r in tested]
        beside.plot(*points, "--", color="tab:green", label=f"test {metric}")
        beside.set_ylabel(f"test {metric}")
        more = beside.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    axes.legend(handles, labels)
    return axes


def html_table(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """A small table."""
    body = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table><caption>{escape(title)}</caption>{body}</table>"
