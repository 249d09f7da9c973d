"""`cutlayer forget`: a served run goes on without a client, and without what is stored of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro
from rich.console import Console

from cutlayer.errors import ConfigError
from cutlayer.records.admitted import Admitted
from cutlayer.records.noted import left_out
from cutlayer.runs.run import Run


@dataclass(frozen=True)
class ForgetArguments:
    """Leave a client out of a served run for good: its samples leave the stores, and it is let in no more."""

    run: tyro.conf.Positional[str]
    """The server's run folder. No server may be at work on it."""
    client: str
    """The client's name."""
    back_to: int | None = None
    """Go back to the checkpoint after so many epochs as well, to be rid of what was learned since."""


def forget(arguments: Sequence[str], console: Console) -> None:
    """Leave a client out of a served run, with all that is stored of it."""
    chosen = tyro.cli(ForgetArguments, prog="cutlayer forget", args=arguments)
    run = Run(chosen.run)
    names = run.read_config()["config"].get("clients", [])
    if isinstance(names, list):
        names += [client.name for client in Admitted(run.folder).read()]
    if not isinstance(names, list) or chosen.client not in names:
        raise ConfigError(f"client: expected one of a served run, {names}, got {chosen.client!r}")
    with run.locked():
        there, before = run.checkpoints.epochs(), left_out(run.folder).read()
        if chosen.client not in before and len(before) + 1 == len(names):
            raise ConfigError(f"{chosen.client} is the last client of {run.folder}; without it there is no run")
        if chosen.back_to is not None and chosen.back_to not in there:
            raise ConfigError(f"back_to: {run.folder} has checkpoints after {there} epochs, not after {chosen.back_to}")
        if chosen.back_to is not None:
            run.checkpoints.prune(range(chosen.back_to + 1))
        done = max(run.checkpoints.epochs(), default=0)
        left_out(run.folder).add(chosen.client, f"left out with `cutlayer forget`, after {done} epochs")
    console.print(
        f"{chosen.client} takes part in {run.folder} no more. `cutlayer serve` goes on without it and its samples; "
        "checkpoints from before hold them until newer ones take their place",
        soft_wrap=True,
    )
