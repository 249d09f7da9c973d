"""The command line: `cutlayer train RECIPE`, `cutlayer train --resume RUN`, `compare RUN ...`, `demo`, `partition`."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from rich.console import Console

from cutlayer.backends.base import Backend
from cutlayer.backends.local import LOCAL
from cutlayer.backends.ray import Ray
from cutlayer.cli import partition
from cutlayer.cli.arguments import parse_recipe
from cutlayer.cli.merge import merge
from cutlayer.cli.resume import ResumeArguments, changed
from cutlayer.errors import ConfigError, CutlayerError, unknown
from cutlayer.records.history import History
from cutlayer.report import ProgressView, comparison, comparisons, figures, write_figures
from cutlayer.runs.config import Config
from cutlayer.runs.fit import Result, fit
from cutlayer.runs.recipes import RECIPES
from cutlayer.runs.run import Run


@dataclasses.dataclass(frozen=True)
class TrainArguments:
    """A recipe, with whatever is changed in it, and the folder to write to."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    run_dir: str | None = None
    """Folder for the run; by default a new one under ./runs."""
    init: str | None = None
    """Folder of a run, finished or not, whose weights this one begins with."""
    backend: Literal["process", "ray"] = "process"
    """Where the clients are: in this process, or actors on a Ray cluster; see docs/ray.md."""
    cluster: Annotated[Ray, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Ray)
    """With --backend ray only; see docs/ray.md."""


@dataclasses.dataclass(frozen=True)
class CompareArguments:
    """Print a table of runs, finished or not."""

    runs: tyro.conf.Positional[list[str]]
    """Folders of the runs."""
    csv: str | None = None
    """File to write the figures to, a line for each run."""
    json: str | None = None
    """File to write the figures to, as a list of objects."""


@dataclasses.dataclass(frozen=True)
class DemoArguments:
    """Train the digits CNN twice with the same seed: plain split learning in 32 bits, and the method."""

    run_dir: str | None = None
    """Start of the names of the two run folders; by default new ones under ./runs."""
    epochs: int = 100
    """Length of each run."""
    seed: int = 0
    """Seed of both runs."""


def train(arguments: Sequence[str], console: Console) -> None:
    """Train a recipe (train RECIPE ...), or go on with a run (train --resume RUN)."""
    if any(argument.split("=")[0] == "--resume" for argument in arguments[:1]):
        chosen = tyro.cli(ResumeArguments, prog="cutlayer train", args=arguments)
        run = Run(chosen.resume)
        written = run.read_config()["config"]
        if isinstance(written.get("method"), dict):
            raise ConfigError(f"{run.folder} was begun from Python; go on with fit(..., run=..., resume=True)")
        config = changed(Config.from_dict(written), chosen)
        run_config(config, run.folder, console, resume=True, backend=_backend(chosen))
    else:
        if any(argument.split("=")[0] == "--resume" for argument in arguments):
            raise ConfigError("to go on with a run, leave the recipe out: cutlayer train --resume RUN")
        chosen = parse_recipe(
            {name: TrainArguments(recipe()) for name, recipe in RECIPES.items()},
            {name: recipe.__doc__ or "" for name, recipe in RECIPES.items()},
            "cutlayer train",
            arguments,
            "Train a recipe. To go on with a run that was interrupted: cutlayer train --resume RUN",
        )
        _require_effect(chosen.config)
        run = Run(chosen.run_dir or new_folder(chosen.config.data))
        run_config(chosen.config, run.folder, console, backend=_backend(chosen), init=chosen.init)
    console.print(comparison({run.folder.name: run.history()}))
    console.print(f"run folder: {run.folder}")


def _backend(chosen: TrainArguments | ResumeArguments) -> Backend:
    if chosen.backend == "ray":
        return chosen.cluster
    if given := _differing(chosen.cluster, Ray()):
        raise ConfigError(f"{', '.join(given)}: expected with --backend ray only")
    return LOCAL


def _require_effect(config: Config) -> None:
    """Refuse choices that would change nothing."""
    several = {"mode", "average_every", "state", "fraction", "dropout", "replay_absent", "live_clients"}
    given = [name for name in _differing(config, Config()) if name in several]
    if config.clients == 1 and given:
        raise ConfigError(f"{', '.join(given)}: expected with several clients only; give their number (--clients)")


def _differing(chosen: Config | Ray, usual: Config | Ray) -> list[str]:
    names = [field.name for field in dataclasses.fields(chosen)]
    return [name for name in names if getattr(chosen, name) != getattr(usual, name)]


def run_config(
    config: Config,
    folder: Path,
    console: Console,
    *,
    title: str | None = None,
    resume: bool = False,
    backend: Backend = LOCAL,
    init: str | None = None,
) -> Result:
    """Carry out a config in a run folder."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    train_data, test_data = config.datasets()
    parts, partition = config.divided(train_data)
    run = Run(folder, config.as_dict())
    if partition is not None:
        folder.mkdir(parents=True, exist_ok=True)
        partition.save(folder / "partition.json")
    done = run.checkpointed() if resume else []
    try:
        with ProgressView(title or config.schedule, config.epochs, console, done) as view:
            return fit(
                config.halves(train_data),
                parts,
                test_data,
                method=config.method(),
                training=config.training(),
                run=run,
                resume=resume,
                on_epoch=view,
                progress=False,
                backend=backend,
                init=init,
            )
    except KeyboardInterrupt:
        if run.exists():
            raise Interrupted(f"interrupted; go on with: cutlayer train --resume {folder}") from None
        raise


class Interrupted(KeyboardInterrupt):
    """An interruption, with what to do to go on."""


def demo(arguments: Sequence[str], console: Console) -> None:
    """Plain split learning beside the method, on the digits."""
    chosen = tyro.cli(DemoArguments, prog="cutlayer demo", args=arguments)
    base = chosen.run_dir or str(new_folder("demo"))
    method = dataclasses.replace(RECIPES["digits"](), epochs=chosen.epochs, seed=chosen.seed, threads=1)
    plain = dataclasses.replace(method, schedule="always", codec="fp32")
    console.print(
        f"Small CNN on scikit-learn's digits, cut after {method.cut}, {method.epochs} epochs, seed {method.seed}:\n"
        f"plain split learning in 32 bits, then asynchronous exchange ({method.schedule}, threshold "
        f"{method.threshold}) in 8 bits.",
        soft_wrap=True,
    )
    histories = {}
    for title, config in (("plain split learning", plain), ("cutlayer", method)):
        run = Path(f"{base}-{title.split()[0]}")
        run_config(config, run, console, title=title)
        histories[title] = Run(run).history()
    console.print(comparison(histories))
    console.print(f"run folders: {base}-plain, {base}-cutlayer")


def compare(arguments: Sequence[str], console: Console) -> None:
    """Print a table of runs."""
    chosen = tyro.cli(CompareArguments, prog="cutlayer compare", args=arguments)
    if not chosen.runs:
        raise ConfigError("expected the folders of one or more runs")
    histories: dict[str, History] = {}
    configs: dict[str, dict] = {}
    for folder in chosen.runs:
        try:
            histories[folder], configs[folder] = Run(folder).history(), Run(folder).read_config()["config"]
        except ConfigError as error:  # one of many, such as a folder whose run was refused before it began
            if len(chosen.runs) == 1:
                raise
            Console(stderr=True).print(f"left out: {error}", highlight=False, markup=False, soft_wrap=True)
    if not histories:
        raise ConfigError("none of the folders holds a run")
    for written, suffix in ((chosen.csv, ".csv"), (chosen.json, ".json")):
        if written is not None:
            rows = {name: figures(histories[name], configs[name]) for name in histories}
            write_figures(rows, Path(written), suffix)
    for table in comparisons(histories, configs, console.width):
        console.print(table)


def new_folder(name: str) -> Path:
    """A folder under ./runs that does not exist yet."""
    base = Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, number = base, 1
    while list(base.parent.glob(f"{folder.name}*")):
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    return folder


def remote(name: str, about: str) -> Callable[[Sequence[str], Console], None]:
    """A command between machines; its module is imported when it is called, as it needs the extra `grpc`."""

    def command(arguments: Sequence[str], console: Console) -> None:
        if name != "serve":  # which has gRPC's core log who is refused; the others see for themselves what is wrong
            os.environ.setdefault("GRPC_VERBOSITY", "NONE")
        try:
            from cutlayer.cli import grpc as machines
        except ModuleNotFoundError as error:
            raise ConfigError(f"`cutlayer {name}` needs {error.name}: pip install 'cutlayer[grpc]'") from None
        machines.COMMANDS[name](arguments, console)

    command.__doc__ = about
    return command


COMMANDS = {
    "train": train,
    "compare": compare,
    "demo": demo,
    "merge": merge,
    "partition": partition.command,
    "certs": remote("certs", "Make certificates for a server and its clients."),
    "serve": remote("serve", "Hold the server half of a run for clients on other machines."),
    "join": remote("join", "Take part in a run that another machine serves."),
    "health": remote("health", "Ask whether a server is up."),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 for a run that failed, 2 for a wrong call."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    console, errors = Console(), Console(stderr=True)
    if not arguments or arguments[0] in ("-h", "--help"):
        console.print("usage: cutlayer COMMAND ...   (cutlayer COMMAND --help explains it)\n", highlight=False)
        for name, command in COMMANDS.items():
            console.print(f"  {name:10}{command.__doc__}", highlight=False)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        console.print(version("cutlayer"), highlight=False)
        return 0
    try:
        if arguments[0] not in COMMANDS:
            raise ConfigError(unknown("command", arguments[0], COMMANDS))
        COMMANDS[arguments[0]](arguments[1:], console)
    except ConfigError as error:
        errors.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        return 2
    except CutlayerError as error:
        errors.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        return 1
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        errors.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt as error:
        errors.print(str(error) or "interrupted", highlight=False, markup=False, soft_wrap=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
