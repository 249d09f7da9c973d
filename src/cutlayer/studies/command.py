"""The options and the course that scripts of studies share."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from cutlayer.studies.study import Outcome, Study


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add `--table` and `--jobs`."""
    parser.add_argument("--table", action="store_true", help="run nothing: say what is there, and write its table")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, each in a process of one thread")


def carry_out(study: Study, asked: argparse.Namespace, write_table: Callable[[], object]) -> None:
    """Carry out a study as the options ask, and write its table after each run.

    Args:
        asked: what `add_options` added, parsed.
        write_table: writes the table of what is in the study's file; not called if that is nothing.
    """
    left = len(study.todo())
    print(f"{study.file.name}: {len(study.configs) - left} of {len(study.configs)} runs are there", flush=True)

    def done(outcome: Outcome) -> None:
        nonlocal left
        left -= 1
        figures = {name: value for name, value in outcome.values.items() if isinstance(value, int | float | str)}
        print(", ".join(f"{name} {value}" for name, value in figures.items()), f"({left} left)", flush=True)
        write_table()

    if not asked.table:
        study.run(asked.jobs, done)
    if study.outcomes():
        write_table()
