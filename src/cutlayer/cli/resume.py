"""`cutlayer train --resume RUN`: going on with a run, and what may be another choice then."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console

from cutlayer.backends.ray import Ray
from cutlayer.cli.shown import backend_of, carry_out
from cutlayer.errors import ConfigError
from cutlayer.runs.choices import with_choices
from cutlayer.runs.config import RunConfig
from cutlayer.runs.run import Run


@dataclasses.dataclass(frozen=True)
class ResumeArguments:
    """Go on with a run that was interrupted."""

    resume: str
    """Folder of the run."""
    epochs: int | None = None
    """Another length for the run, such as more epochs than before; see docs/runs.md."""
    patience: Annotated[int | None, tyro.conf.arg(name="early-stopping.patience")] = None
    """Another patience of early stopping."""
    keep_best: str | None = None
    """Test metric: the checkpoint of its best epoch stays, from now on."""
    checkpoint_every: int | None = None
    """Another number of epochs between checkpoints."""
    keep_checkpoints: int | None = None
    """Another number of checkpoints that stay."""
    data_dir: str | None = None
    """Folder with the data set's files, if they lie elsewhere now."""
    tensorboard: bool = False
    """Write every epoch for TensorBoard, too, into the run's folder tensorboard."""
    backend: Literal["process", "ray"] = "process"
    """Where the clients are from now on, wherever they were; see docs/ray.md."""
    cluster: Annotated[Ray, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Ray)
    """With --backend ray only; see docs/ray.md."""


def resume(arguments: Sequence[str], console: Console) -> Run:
    """Go on with a run; return it."""
    chosen = tyro.cli(ResumeArguments, prog="cutlayer train", args=arguments)
    run = Run(chosen.resume)
    written = run.read_config()["config"]
    if "data" not in written:
        raise ConfigError(f"{run.folder} was begun from Python; go on with fit(..., run=..., resume=True)")
    config = _changed(RunConfig.from_dict(written), chosen)
    backend = backend_of(chosen.backend, chosen.cluster)
    carry_out(config, run, console, resume=True, backend=backend, tensorboard=chosen.tensorboard)
    return run


def _changed(config: RunConfig, chosen: ResumeArguments) -> RunConfig:
    """The config of a run that goes on, with what is another choice now."""
    names = ("epochs", "keep_best", "checkpoint_every", "keep_checkpoints", "data_dir")
    given: dict[str, Any] = {name: value for name in names if (value := getattr(chosen, name)) is not None}
    if chosen.patience is not None:
        given["early_stopping"] = dataclasses.replace(config.training.early_stopping, patience=chosen.patience)
    return with_choices(config, **given)
