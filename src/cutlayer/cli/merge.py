"""The command `cutlayer merge`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro
from rich.console import Console

from cutlayer.files import save_sealed
from cutlayer.runs.run import Run


@dataclasses.dataclass(frozen=True)
class MergeArguments:
    """Write the uncut network's weights of a recipe's run, finished, interrupted or served."""

    run: tyro.conf.Positional[str]
    """Folder of the run."""
    client: str | None = None
    """Folder of the client, for a run that was served to one client."""
    best: bool = False
    """The best epoch's weights, of a run with --keep-best, in place of the last one's."""
    output: str | None = None
    """File to write; by default merged.safetensors in the run's folder."""


def merge(arguments: Sequence[str], console: Console) -> None:
    """Write a run's uncut network to a file: of its newest or best checkpoint, or of two machines' halves."""
    chosen = tyro.cli(MergeArguments, prog="cutlayer merge", args=arguments)
    run = Run(chosen.run)
    model = run.model(best=chosen.best, client=chosen.client)
    file = Path(chosen.output) if chosen.output else run.folder / "merged.safetensors"
    save_sealed(model.state_dict(), file)
    console.print(f"wrote {file}", soft_wrap=True)
