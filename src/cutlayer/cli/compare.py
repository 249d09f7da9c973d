"""The command `cutlayer compare`: a table of runs, or a file of their figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import tyro
from rich.console import Console

from cutlayer.errors import ConfigError
from cutlayer.report import accuracy, comparisons, figures, lengths, write_figures
from cutlayer.report.accuracy import Scored
from cutlayer.report.plain import warn
from cutlayer.runs.commands import plain_commands
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
    runs: dict[str, Scored] = {}
    for folder in chosen.runs:
        try:
            content = Run(folder).read_config()
            runs[folder] = Scored(Run(folder).history(), content["config"], content.get("facts", {}))
        except ConfigError as error:  # one of many, such as a folder whose run was refused before it began
            if len(chosen.runs) == 1:
                raise
            warn(f"left out: {error}")
    if not runs:
        raise ConfigError("none of the folders holds a run")
    histories = {name: run.history for name, run in runs.items()}
    configs = {name: run.config for name, run in runs.items()}
    for written, suffix in ((chosen.csv, ".csv"), (chosen.json, ".json")):
        if written is not None:
            write_figures(_figures(runs), Path(written), suffix)
    for table in comparisons(histories, configs, accuracy.rows(runs), console.width):
        console.print(table)
    for line in accuracy.not_compared(runs, plain_commands(runs)):
        console.print(line, soft_wrap=True)
    if differ := lengths(histories):
        console.print(differ)


def _figures(runs: Mapping[str, Scored]) -> dict[str, dict]:
    """What each run chose and what came of it, and what its savings cost."""
    found = accuracy.against_plain([*runs.values()])
    return {
        name: {**figures(run.history, run.config), **{f"against_plain.{m}": lost for m, lost in against.lost.items()}}
        for (name, run), against in zip(runs.items(), found, strict=True)
    }
