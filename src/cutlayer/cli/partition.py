"""The command `cutlayer partition`: divide a data set among clients, or show how one was divided."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console

from cutlayer.data.datasets import load
from cutlayer.data.partition.spec import make_partition
from cutlayer.data.partition.value import Partition
from cutlayer.errors import ConfigError
from cutlayer.report.partition import save_figure, table
from cutlayer.runs.choices import DataName


@dataclasses.dataclass(frozen=True)
class PartitionArguments:
    """Divide a data set's training samples among clients (--data), or show a partition's file (--show)."""

    data: DataName | None = None
    """Data set to divide; with --show, the one to compare the file with."""
    data_dir: str | None = None
    """Folder with the data set's files; by default the environment variable CUTLAYER_DATA, or ./data."""
    train_samples: int | None = None
    """Only the first so many training samples."""
    clients: int = 10
    """Number of clients."""
    how: str = "iid"
    """iid, dirichlet:ALPHA[:MIN_SAMPLES], shards:PER_CLIENT, quantity:ALPHA[:MIN_SAMPLES], or a file; see
    docs/partitions.md."""
    seed: int = 0
    """Seed of the draw."""
    out: str | None = None
    """JSON file to write; without it the partition is only shown."""
    show: str | None = None
    """A partition's file to show, in place of making one."""
    plot: str | None = None
    """Figure of who has what to write: .png, .svg or .pdf."""
    rows: int = 10
    """Clients to list in the table."""


def partition(arguments: Sequence[str], console: Console) -> None:
    """Divide a data set among clients, or show how one was divided."""
    chosen = tyro.cli(PartitionArguments, prog="cutlayer partition", args=arguments)
    if chosen.show is not None and chosen.out is not None:
        raise ConfigError("--show makes no partition to write; leave out --out or --show")
    if chosen.out is not None and Path(chosen.out).exists():
        raise ConfigError(f"{chosen.out} exists already; remove it, or choose another name")
    made = _partition(chosen)
    console.print(table(made, chosen.rows))
    if chosen.out is not None:
        made.save(chosen.out)
        console.print(f"wrote {chosen.out}", soft_wrap=True)
    if chosen.plot is not None:
        save_figure(made, chosen.plot)
        console.print(f"wrote {chosen.plot}", soft_wrap=True)


def _partition(chosen: PartitionArguments) -> Partition:
    shown = Partition.load(chosen.show, allow_empty=True) if chosen.show is not None else None
    if chosen.data is None:
        if shown is None:
            raise ConfigError("expected --data with a data set to divide, or --show with a partition's file")
        return shown
    labels = load(chosen.data, chosen.data_dir)[0].first(chosen.train_samples).labels
    if shown is None:
        return make_partition(chosen.how, labels, chosen.clients, chosen.seed, chosen.data)
    shown.check(labels, chosen.data)
    return shown.of(labels, chosen.data)
