"""Who has what: a table for the terminal, and a figure."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from cutlayer import files
from cutlayer.data.partition.value import Partition
from cutlayer.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Beyond these, bars and colours are too many to tell apart, and a heat map shows more.
MOST_BARS, MOST_COLOURS = 40, 10
FIGURE_FORMATS = ("png", "svg", "pdf")


def distances(counts: np.ndarray) -> np.ndarray:
    """Total-variation distance of each client's class distribution from that of all clients together, 0 to 1.

    0 is the same distribution; a client without samples has NaN.

    Args:
        counts: samples of each class with each client, int64 [clients, classes].
    """
    with np.errstate(invalid="ignore"):
        own = counts / counts.sum(1, keepdims=True)
    return np.abs(own - counts.sum(0) / counts.sum()).sum(1) / 2


def class_counts(partition: Partition) -> np.ndarray:
    """The class counts it holds, int64 [clients, classes]. Raises ConfigError if it was made without labels."""
    if partition.class_counts is None:
        raise ConfigError("the partition does not know the classes; say so with partition.of(labels)")
    return partition.class_counts


def table(partition: Partition, most: int = 10) -> Table:
    """The first clients (`most` at most) with their class counts, and min, median and max over all clients."""
    counts = partition.class_counts
    sizes = partition.sizes
    view = Table(title=_title(partition), caption=summary(partition), title_justify="left", caption_justify="left")
    view.add_column("client", justify="right")
    view.add_column("samples", justify="right")
    rows = [[str(client), str(size)] for client, size in enumerate(sizes)]
    over_all = [("min", np.min), ("median", np.median), ("max", np.max)]
    ends = [[name, f"{of(sizes):g}"] for name, of in over_all]
    if counts is not None:
        view.add_column("classes", justify="right")
        present = (counts > 0).sum(1)
        for row, number in zip(rows, present, strict=True):
            row.append(str(number))
        for row, (_, of) in zip(ends, over_all, strict=True):
            row.append(f"{of(present):g}")
        if counts.shape[1] <= MOST_COLOURS:
            view.add_column("of each class")
            width = len(str(counts.max()))
            for row, own in zip(rows, counts, strict=True):
                row.append(" ".join(f"{count:>{width}}" if count else " " * (width - 1) + "·" for count in own))
    for row in rows[:most]:
        view.add_row(*row)
    if len(rows) > most:
        view.add_row("…", f"{len(rows) - most} more")
    view.add_section()
    for row in ends:
        view.add_row(*row)
    return view


def summary(partition: Partition) -> str:
    """A sentence on what was left out and how far the clients' class distributions are from that of all."""
    left_out = partition.samples - int(partition.sizes.sum())
    parts = [f"{left_out} samples are with no client"] if left_out else []
    if partition.class_counts is not None:
        distance = np.nanmean(distances(partition.class_counts))
        parts.append(f"mean total-variation distance from the classes of all: {distance:.3f}")
    return "; ".join(parts)


def save_figure(partition: Partition, file: str | Path) -> None:
    """Draw who has what, as a whole file or not at all.

    Up to 40 clients and 10 classes: a stacked bar for each client. Otherwise sizes, and a heat map of the classes'
    shares, with clients sorted by the class that they have most of.

    Args:
        partition: one that knows its class counts.
        file: a name that ends in .png, .svg or .pdf.

    Raises:
        ConfigError: for another ending, without class counts, or without matplotlib.
    """
    kind = Path(file).suffix.removeprefix(".").lower()
    if kind not in FIGURE_FORMATS:
        raise ConfigError(f"expected a file name that ends in .png, .svg or .pdf, got {file}")
    drawn = figure(partition)
    out = io.BytesIO()
    drawn.savefig(out, format=kind, dpi=150)
    files.replace(Path(file), out.getvalue())


def figure(partition: Partition) -> Figure:
    """What `save_figure` writes, as a matplotlib figure."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ConfigError("a figure needs matplotlib: pip install 'cutlayer[report]'") from None
    counts = class_counts(partition)
    drawn = Figure(figsize=(9, 5), layout="constrained")
    if len(partition) <= MOST_BARS and counts.shape[1] <= MOST_COLOURS:
        _bars(drawn.subplots(), counts)
    else:
        sizes, shares = drawn.subplots(2, 1, sharex=True, height_ratios=(1, 2.5))
        _heat_map(sizes, shares, counts)
    drawn.suptitle(f"{_title(partition)}\n{summary(partition)}", fontsize=10)
    return drawn


def _bars(axes: Axes, counts: np.ndarray) -> None:
    clients, bottom = np.arange(len(counts)), np.zeros(len(counts))
    for number, of_class in enumerate(counts.T):
        axes.bar(clients, of_class, 0.85, bottom, label=str(number), color=f"C{number}", edgecolor="white", lw=0.4)
        bottom += of_class
    if len(counts) <= 20:
        axes.set_xticks(clients)
    axes.set(xlabel="client", ylabel="samples", xlim=(-0.6, len(counts) - 0.4), ylim=(0, 1.05 * bottom.max()))
    axes.spines[["top", "right"]].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    axes.legend(
        handles[::-1], names[::-1], title="class", loc="upper left", bbox_to_anchor=(1, 1), frameon=False
    )  # from the top down, as the bars are stacked


def _heat_map(sizes: Axes, shares: Axes, counts: np.ndarray) -> None:
    from matplotlib.colors import PowerNorm

    own = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    order = np.lexsort((-own.max(1), own.argmax(1)))
    sizes.stairs(counts.sum(1)[order], np.arange(len(counts) + 1) - 0.5, fill=True, color="0.5")
    sizes.set(ylabel="samples", ylim=(0, None))
    sizes.spines[["top", "right"]].set_visible(False)
    # One scale for all figures, so that they compare; the root lets the small shares of many classes be seen.
    scale = PowerNorm(0.5, vmin=0, vmax=1)
    picture = shares.imshow(own[order].T, aspect="auto", interpolation="nearest", norm=scale, origin="lower")
    if counts.shape[1] <= 20:
        shares.set_yticks(range(counts.shape[1]))
    shares.set(xlabel="clients, sorted by the class that they have most of", ylabel="class")
    shares.figure.colorbar(picture, ax=shares, label="share of the client's samples")


def _title(partition: Partition) -> str:
    of = f" of {partition.data}" if partition.data else ""
    return f"{partition.samples} samples{of} among {len(partition)} clients\n{partition.how}"
