"""The command `cutlayer compare`: a table of runs, or a file of their figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console

from cutlayer.errors import ConfigError
from cutlayer.records.history import History
from cutlayer.report import comparisons, figures, lengths, write_figures
from cutlayer.report.plain import warn
from cutlayer.runs.run import Run


@dataclasses.dataclass(frozen=True)
class CompareArguments:
    """Print a table of runs, finished or not."""

    runs: tyro.conf.Positional[list[str]]
    """Folders of the runs."""
    csv: str | None = None
    """File to write the figures to, a line for each run."""
    json: str | None = None
    """File to write the figures to, as a list of objects."""


def compare(arguments: Sequence[str], console: Console) -> None:
    """Print a table of runs."""
    chosen = tyro.cli(CompareArguments, prog="cutlayer compare", args=arguments)
    if not chosen.runs:
        raise ConfigError("expected the folders of one or more runs")
    histories: dict[str, History] = {}
    configs: dict[str, dict] = {}
    for folder in chosen.runs:
        try:
            histories[folder], configs[folder] = Run(folder).history(), Run(folder).read_config()["config"]
        except ConfigError as error:  # one of many, such as a folder whose run was refused before it began
            if len(chosen.runs) == 1:
                raise
            warn(f"left out: {error}")
    if not histories:
        raise ConfigError("none of the folders holds a run")
    for written, suffix in ((chosen.csv, ".csv"), (chosen.json, ".json")):
        if written is not None:
            rows = {name: figures(histories[name], configs[name]) for name in histories}
            write_figures(rows, Path(written), suffix)
    for table in comparisons(histories, configs, console.width):
        console.print(table)
    if differ := lengths(histories):
        console.print(differ)
