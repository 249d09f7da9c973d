"""Carrying out a config with its progress shown."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from cutlayer.backends.base import Backend
from cutlayer.backends.local import LOCAL
from cutlayer.backends.ray import Ray
from cutlayer.errors import ConfigError
from cutlayer.records.history import EpochRecord
from cutlayer.report import ProgressView
from cutlayer.report.tensorboard import TensorBoard
from cutlayer.runs.config import RunConfig
from cutlayer.runs.experiment import run_experiment
from cutlayer.runs.run import Run


class Interrupted(KeyboardInterrupt):
    """An interruption, with what to do to go on."""


def carry_out(
    config: RunConfig,
    run: Run,
    console: Console,
    *,
    title: str | None = None,
    resume: bool = False,
    backend: Backend = LOCAL,
    init: str | None = None,
    tensorboard: bool = False,
) -> None:
    """Carry out a config in a run's folder. Raises Interrupted that says how to go on."""
    done = run.checkpointed() if resume else []
    try:
        with ExitStack() as stack:
            title = title or schedule_of(config)
            views: list[Callable[[EpochRecord], None]] = [
                stack.enter_context(ProgressView(title, config.training.epochs, console, done))
            ]
            if tensorboard:
                views.append(stack.enter_context(TensorBoard(run.folder / "tensorboard", len(done))))

            def show(record: EpochRecord) -> None:
                for view in views:
                    view(record)

            run_experiment(config, run.folder, resume=resume, on_epoch=show, progress=False, backend=backend, init=init)
    except KeyboardInterrupt:
        if run.exists():
            raise Interrupted(f"interrupted; go on with: cutlayer train --resume {run.folder}") from None
        raise


def schedule_of(config: RunConfig) -> str:
    """What progress is called if nothing else is said."""
    return type(config.method.schedule).__name__.lower()


def backend_of(name: str, cluster: Ray) -> Backend:
    """Where the clients are. Raises ConfigError for a choice that is for a cluster only."""
    if name == "ray":
        return cluster
    if given := [field for field, value in vars(cluster).items() if value != getattr(Ray(), field)]:
        raise ConfigError(f"{', '.join(given)}: expected with --backend ray only")
    return LOCAL


def new_folder(name: str) -> Path:
    """A folder under ./runs that does not exist yet."""
    base = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, number = base, 1
    while list(base.parent.glob(f"{folder.name}*")):
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder
