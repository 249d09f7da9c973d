"""A report of runs: one HTML page that needs nothing else, and the same tables as Markdown and CSV."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from cutlayer.errors import ConfigError
from cutlayer.report import accuracy
from cutlayer.report.accuracy import Scored
from cutlayer.report.charts import Series, heat_map, lines, timeline
from cutlayer.report.privacy import any_short, attack_rows, bound
from cutlayer.report.spreadsheet import csv_text
from cutlayer.report.table import comparison_rows, lengths
from cutlayer.report.view import RunView, differing, epoch_rows, facts, letters

TEMPLATE = Path(__file__).with_name("page.html.j2")


def html(views: Sequence[RunView], title: str, commands: Sequence[str | None]) -> str:
    """The page.

    Args:
        commands: what to type for plain split learning of each run, if it is known.

    Raises ConfigError without jinja2.
    """
    try:
        import jinja2
    except ModuleNotFoundError:
        raise ConfigError("a report needs jinja2: pip install 'cutlayer[report]'") from None
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    safe = jinja2.utils.markupsafe.Markup  # of charts, whose text is escaped where they are drawn
    named = list(zip(letters(len(views)), views, strict=True))
    runs = _scored(views)
    return template.render(
        title=title,
        about=_about(views),
        missing=_missing(views),
        not_compared=_not_compared(runs, commands),
        runs=[_run(letter, view, safe, accuracy.in_words(runs, letter, view.metric)) for letter, view in named],
        charts=[(name, safe(chart)) for name, chart in _charts(views) if chart],
        differing=differing(views) if len(views) > 1 else [],
        summary=_summary(views, runs),
        confusions=[
            (f"{a} {v.name}", safe(_classes(v.confusion, "true class by class"))) for a, v in named if v.confusion
        ],
        partitions=[(f"{a} {v.name}", safe(_classes(v.clients, "client by class"))) for a, v in named if v.clients],
        attacks=_attacks(views),
        bound=_bound(views),
        pictures=[(f"{a} {name}", base64.b64encode(png).decode()) for a, v in named for name, png in v.pictures],
    )


def markdown(views: Sequence[RunView], title: str, commands: Sequence[str | None]) -> str:
    """The page's tables as Markdown; arguments as for `html`."""
    names = [f"{letter} {_in_markdown(v.name)}" for letter, v in zip(letters(len(views)), views, strict=True)]
    parts = [f"# {_in_markdown(title)}", _in_markdown(_about(views))]
    if missing := _missing(views):
        parts.append("## Missing\n\n" + "\n".join(f"- {_in_markdown(line)}" for line in missing))
    if len(views) > 1 and (rows := differing(views)):
        parts.append("## Choices that differ\n\n" + _markdown_table(["", *names], [[name, *v] for name, v in rows]))
    runs = _scored(views)
    parts.append(
        "## What came of them\n\n" + _markdown_table(["", *names], [[n, *v] for n, v in _summary(views, runs)])
    )
    parts += [_in_markdown(line) for line in _not_compared(runs, commands)]
    for about, tables in (("Which class is taken for which", "confusion"), ("Who has what", "clients")):
        for name, view in zip(names, views, strict=True):
            if counts := getattr(view, tables):
                header = ["", *map(str, range(len(counts[0])))]
                rows = [[str(n), *map(str, row)] for n, row in enumerate(counts)]
                parts.append(f"## {about}: {name}\n\n" + _markdown_table(header, rows))
    if attacks := _attacks(views):
        table = _markdown_table([*attacks[0]], [[*row.values()] for row in attacks])
        parts.append(f"## What attacks got back\n\n{table}\n\n{_bound(views)}")
    for name, view in zip(names, views, strict=True):
        if rows := list(epoch_rows(view)):
            columns = [column for column in _columns(rows) if column != "run"]
            cells = [[str(row.get(column, "")) for column in columns] for row in rows]
            parts.append(f"## Epochs: {name}\n\n" + _markdown_table(columns, cells))
    return "\n\n".join(parts) + "\n"


def epochs_csv(views: Sequence[RunView]) -> str:
    """A line for each epoch of each run."""
    rows = [row for view in views for row in epoch_rows(view)]
    return csv_text(rows, _columns(rows))


def _about(views: Sequence[RunView]) -> str:
    epochs = sum(len(view.history.epochs) for view in views)
    runs = f"{len(views)} runs" if len(views) > 1 else "1 run"
    names = zip(letters(len(views)), views, strict=True)
    differ = lengths({f"{letter} {view.name}": view.history for letter, view in names})
    return f"{runs}, {epochs} epochs in all. Bytes are those of frames that were sent. {differ}".strip()


def _scored(views: Sequence[RunView]) -> dict[str, Scored]:
    """The runs by their letters, as names may be the same."""
    named = zip(letters(len(views)), views, strict=True)
    return {letter: Scored(view.history, view.config, view.facts) for letter, view in named}


def _not_compared(runs: Mapping[str, Scored], commands: Sequence[str | None]) -> list[str]:
    known = {letter: command for letter, command in zip(runs, commands, strict=True) if command is not None}
    return accuracy.not_compared(runs, known)


def _attacks(views: Sequence[RunView]) -> list[dict[str, str]]:
    named = zip(letters(len(views)), views, strict=True)
    return [{"run": f"{letter} {view.name}", **row} for letter, view in named for row in attack_rows(view.attacks)]


def _bound(views: Sequence[RunView]) -> str:
    return bound(any(any_short(view.attacks) for view in views))


def _missing(views: Sequence[RunView]) -> list[str]:
    return [f"{view.name}: {line}" for view in views for line in view.missing]


def _run(letter: str, view: RunView, safe: Any, cost: str) -> dict[str, Any]:
    rows = list(epoch_rows(view))
    command = shlex.join(map(str, view.environment.get("command", ())))
    about = {**view.environment, "command": command or None}
    return {
        "letter": letter,
        "name": view.name,
        "facts": facts(view, cost),
        "timeline": safe(timeline(view.history.exchanges)),
        "epochs": rows,
        "columns": [name for name in _columns(rows) if name != "run"],
        "environment": ", ".join(f"{name} {value}" for name, value in about.items() if value is not None)
        or "not known",
    }


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _charts(views: Sequence[RunView]) -> Iterator[tuple[str, str]]:
    named = list(zip(letters(len(views)), views, strict=True))

    def chart(points: Any, x: str, y: str, log_x: bool = False) -> str:
        return lines([Series(letter, view.name, points(view)) for letter, view in named], x, y, log_x=log_x)

    metric = next((view.metric for view in views if view.metric), "")
    yield "Training loss", chart(lambda v: [(r.epoch + 1, r.loss) for r in v.history.epochs], "epoch", "loss")
    if metric:
        yield f"Test {metric}", chart(lambda v: v.points(metric), "epoch", metric)
    sent = lambda v: list(zip(range(1, len(v.sent) + 1), (n / 1e6 for n in v.sent), strict=True))  # noqa: E731
    yield "Sent in training", chart(sent, "epoch", "MB so far")
    done = lambda v: [(n + 1, flops / 1e9) for n, flops in enumerate(v.client_flops)]  # noqa: E731
    yield "Computed by clients", chart(done, "epoch", "GFLOPs so far")
    if metric:
        name = f"Test {metric} against what was sent"
        yield name, chart(lambda v: v.metric_by_bytes(metric), "MB sent, logarithmic", metric, True)


def _classes(counts: Sequence[Sequence[int]], about: str) -> str:
    return heat_map(counts, [str(n) for n in range(len(counts))], [str(n) for n in range(len(counts[0]))], about)


def _summary(views: Sequence[RunView], runs: Mapping[str, Scored]) -> list[tuple[str, list[str]]]:
    cost = {name: [*cells.values()] for name, cells in accuracy.rows(runs).items()}
    return list(comparison_rows([view.history for view in views], cost))


def _in_markdown(text: str) -> str:
    """A name or value that stays text: neither markup nor the end of a cell or line."""
    return escape(" ".join(text.split()), quote=False).replace("\\", "\\\\").replace("|", "\\|")


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_in_markdown(cell) for cell in cells) + " |"

    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])
