"""The command `cutlayer demo`: the method beside plain split learning, in a minute."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import tyro
from rich.console import Console

from cutlayer.cli.shown import carry_out, new_folder, schedule_of
from cutlayer.report import accuracy, comparison
from cutlayer.report.accuracy import Scored
from cutlayer.runs.choices import Choices, with_choices
from cutlayer.runs.recipes import digits
from cutlayer.runs.run import Run


@dataclasses.dataclass(frozen=True)
class DemoArguments:
    """Train the digits CNN twice with the same seed: plain split learning in 32 bits, and the method."""

    run_dir: str | None = None
    """Start of the names of the two run folders; by default new ones under ./runs."""
    epochs: int = digits().training.epochs
    """Length of each run."""
    seed: int = 0
    """Seed of both runs."""


def demo(arguments: Sequence[str], console: Console) -> None:
    """Plain split learning beside the method, on the digits."""
    chosen = tyro.cli(DemoArguments, prog="cutlayer demo", args=arguments)
    base = chosen.run_dir or str(new_folder("demo"))
    method = with_choices(digits(), epochs=chosen.epochs, seed=chosen.seed, threads=1)
    plain = with_choices(method, schedule="always", codec="fp32")
    console.print(
        f"Small CNN on scikit-learn's digits, cut after {method.model.cut}, {chosen.epochs} epochs, seed "
        f"{chosen.seed}:\nplain split learning in 32 bits, then asynchronous exchange ({schedule_of(method)}, "
        f"threshold {Choices.of(method).threshold}) in 8 bits.",
        soft_wrap=True,
    )
    runs: dict[str, Scored] = {}
    for title, config in (("plain split learning", plain), ("cutlayer", method)):
        run = Run(f"{base}-{title.split()[0]}")
        carry_out(config, run, console, title=title)
        content = run.read_config()
        runs[title] = Scored(run.history(), content["config"], content["facts"])
    console.print(comparison({title: run.history for title, run in runs.items()}, accuracy=accuracy.rows(runs)))
    console.print(f"run folders: {base}-plain, {base}-cutlayer")
