"""The command `cutlayer report`: runs as one page for whoever was not there, and as tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console

from cutlayer.durable import replace
from cutlayer.errors import ConfigError
from cutlayer.report.page import epochs_csv, html, markdown
from cutlayer.report.plain import warn
from cutlayer.runs.commands import plain_command
from cutlayer.runs.findings import view_of


@dataclasses.dataclass(frozen=True)
class ReportArguments:
    """Write a report of runs, finished or not: one HTML page that needs no network, and its tables."""

    runs: tyro.conf.Positional[list[str]]
    """Folders of the runs."""
    output: str | None = None
    """Page to write, such as report.html; its tables go beside it, as .md and .csv. By default report.html in the
    folder of the only run, or here."""
    title: str | None = None
    """Title of the page."""


def report(arguments: Sequence[str], console: Console) -> None:
    """Write a page and tables of runs: epochs, bytes, accuracy, who has what."""
    chosen = tyro.cli(ReportArguments, prog="cutlayer report", args=arguments)
    if not chosen.runs:
        raise ConfigError("expected the folders of one or more runs")
    views = []
    for folder in chosen.runs:
        try:
            views.append(view_of(folder))
        except ConfigError as error:
            if len(chosen.runs) == 1:
                raise
            warn(f"left out: {error}")
    if not views:
        raise ConfigError("none of the folders holds a run")
    names = ", ".join(view.name for view in views)
    title = chosen.title or (f"Report of {names}" if len(names) < 80 else f"Report of {len(views)} runs")
    usual = Path(chosen.runs[0]) / "report.html" if len(chosen.runs) == 1 else Path("report.html")
    page = Path(chosen.output) if chosen.output is not None else usual
    if page.suffix != ".html":
        raise ConfigError(f"output: expected a name that ends in .html, got {page}")
    page.parent.mkdir(parents=True, exist_ok=True)
    commands = [plain_command(view.config, view.history) for view in views]
    for file, content in (
        (page, html(views, title, commands)),
        (page.with_suffix(".md"), markdown(views, title, commands)),
        (page.with_suffix(".csv"), epochs_csv(views)),
    ):
        replace(file, content)
        console.print(f"wrote {file}", soft_wrap=True)
    for view in views:
        for line in view.missing:
            warn(f"{view.name}: missing: {line}")
