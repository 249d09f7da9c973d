"""Terminals as this package uses them: text is shown as it is."""

from __future__ import annotations

from typing import Any

from rich.console import Console


def plain_console(**options: Any) -> Console:
    """A console that reads no markup in names with brackets, and does not colour figures."""
    return Console(markup=False, highlight=False, **options)


def warn(line: str) -> None:
    """Say a line on stderr."""
    plain_console(stderr=True).print(line, soft_wrap=True)
