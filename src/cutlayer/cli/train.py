"""The command `cutlayer train`: a recipe, or a run that was interrupted (`cli.resume`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro
from rich.console import Console

from cutlayer.backends.ray import Ray
from cutlayer.cli.arguments import parse_recipe
from cutlayer.cli.resume import resume
from cutlayer.cli.shown import backend_of, carry_out, new_folder
from cutlayer.errors import ConfigError
from cutlayer.report import comparison
from cutlayer.runs.choices import SEVERAL, Choices
from cutlayer.runs.recipes import RECIPES
from cutlayer.runs.run import Run


@dataclasses.dataclass(frozen=True)
class TrainArguments:
    """A recipe, with whatever is changed in it, and the folder to write to."""

    recipe: tyro.conf.Suppress[str]
    choices: Annotated[Choices, tyro.conf.arg(name="")]
    run_dir: str | None = None
    """Folder for the run; by default a new one under ./runs."""
    init: str | None = None
    """Folder of a run, finished or not, whose weights this one begins with."""
    tensorboard: bool = False
    """Write every epoch for TensorBoard, too, into the run's folder tensorboard."""
    backend: Literal["process", "ray"] = "process"
    """Where the clients are: in this process, or actors on a Ray cluster; see docs/ray.md."""
    cluster: Annotated[Ray, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Ray)
    """With --backend ray only; see docs/ray.md."""


def train(arguments: Sequence[str], console: Console) -> None:
    """Train a recipe (train RECIPE ...), or go on with a run (train --resume RUN)."""
    resumes = [argument.split("=")[0] == "--resume" for argument in arguments]
    if any(resumes[1:]):
        raise ConfigError("to go on with a run, leave the recipe out: cutlayer train --resume RUN")
    run = resume(arguments, console) if any(resumes) else _begin(arguments, console)
    console.print(comparison({run.folder.name: run.history()}))
    console.print(f"run folder: {run.folder}")


def _begin(arguments: Sequence[str], console: Console) -> Run:
    chosen: TrainArguments = parse_recipe(
        {name: TrainArguments(name, Choices.of(recipe())) for name, recipe in RECIPES.items()},
        {name: recipe.__doc__ or "" for name, recipe in RECIPES.items()},
        "cutlayer train",
        arguments,
        "Train a recipe. To go on with a run that was interrupted: cutlayer train --resume RUN",
    )
    recipe = RECIPES[chosen.recipe]()
    if chosen.choices.clients == 1:
        given = [name for name in chosen.choices.differing(Choices.of(recipe)) if name in SEVERAL]
        if given:
            raise ConfigError(f"{', '.join(given)}: expected with several clients only; give their number (--clients)")
    config = chosen.choices.applied_to(recipe)
    run = Run(chosen.run_dir or new_folder(config.data.name))
    backend = backend_of(chosen.backend, chosen.cluster)
    carry_out(config, run, console, backend=backend, init=chosen.init, tensorboard=chosen.tensorboard)
    return run
