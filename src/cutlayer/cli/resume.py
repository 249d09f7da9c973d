"""The arguments of `cutlayer train --resume RUN`, and what they change in the run's config."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import tyro

from cutlayer.backends.ray import Ray
from cutlayer.runs.config import Config


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
    backend: Literal["process", "ray"] = "process"
    """Where the clients are from now on, wherever they were; see docs/ray.md."""
    cluster: Annotated[Ray, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Ray)
    """With --backend ray only; see docs/ray.md."""


def changed(config: Config, chosen: ResumeArguments) -> Config:
    """The config of a run that goes on, with what is another choice now."""
    names = ("epochs", "keep_best", "checkpoint_every", "keep_checkpoints", "data_dir")
    given: dict[str, Any] = {name: value for name in names if (value := getattr(chosen, name)) is not None}
    if chosen.patience is not None:
        given["early_stopping"] = dataclasses.replace(config.early_stopping, patience=chosen.patience)
    return dataclasses.replace(config, **given)
