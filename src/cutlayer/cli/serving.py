"""The commands of a server between machines: `cutlayer serve`, and `health`, which asks it how it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.console import Console

from cutlayer.backends.grpc.calls import check_health
from cutlayer.backends.grpc.corelog import log_refusals
from cutlayer.backends.grpc.health import LIVENESS, READINESS
from cutlayer.backends.grpc.limits import ClientLimits, read_quotas
from cutlayer.backends.grpc.name_files import Admissions, Revocations, read_again_on_signal
from cutlayer.backends.grpc.operation import Callbacks, Listening, Waits
from cutlayer.cli.arguments import parse_recipe
from cutlayer.cli.connection import ConnectionArguments, cut_shape_of, prepare, until_stopped
from cutlayer.cli.shown import schedule_of
from cutlayer.errors import ConfigError, RefusedError
from cutlayer.report import ProgressView
from cutlayer.runs.choices import Choices
from cutlayer.runs.config import RunConfig
from cutlayer.runs.recipes import RECIPES
from cutlayer.runs.run import Run
from cutlayer.runs.serve import Served, serve
from cutlayer.stop_request import Stop


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeArguments(ConnectionArguments):
    """A recipe, with whatever is changed in it, and where to serve it."""

    recipe: tyro.conf.Suppress[str]
    choices: Annotated[Choices, tyro.conf.arg(name="")]
    listen: str = "127.0.0.1:7070"
    """HOST:PORT to take connections on."""
    client: tuple[str, ...] = ("client",)
    """Names of the clients, as in their certificates."""
    frozen: bool = False
    """Do not train the client half, so that clients without PyTorch can take part (cutlayer-device): no A epochs."""
    run_dir: str | None = None
    """Folder of the run, to begin or to go on with; by default runs/RECIPE's data set-served."""
    deadline: float = Waits.deadline
    """Seconds after which a client that is connected and sends nothing is disconnected."""
    patience: float | None = None
    """Seconds after which an epoch goes on without a client of which nothing comes; by default all are waited for."""
    linger: float = 60.0
    """Seconds that the end of the run waits for clients to hear of it and get their half."""
    farewell: bool = False
    """Only hand out what a run that is at its end has for its clients, for as long as it takes."""
    max_samples: int = ClientLimits.max_samples
    """Training samples, and test samples, that a client may say it has."""
    quotas: str | None = None
    """JSON file with the same for single clients, such as {"alice": 50000}."""
    max_batch: int | None = None
    """Samples in a client's largest batch; by default four times the run's own."""
    client_memory: int = ClientLimits.memory >> 20
    """MiB of a client's frames that may be in memory."""
    goings_back: int = ClientLimits.goings_back
    """Times that the server goes back to an older checkpoint for one client that has lost its newest."""
    revoked: str | None = None
    """File with the names, one a line, of clients whose certificates do not count any more; read again on SIGHUP."""
    admit: str | None = None
    """File with the names, one a line, of clients that may join after the run has begun: each is admitted at the end of
    the epoch in which it comes. Read again on SIGHUP."""
    metrics: str | None = None
    """HOST:PORT to show metrics at, in Prometheus' format, such as 127.0.0.1:9100."""
    slowest_link: int = ClientLimits.slowest >> 10
    """KiB a second. A client whose frames come more slowly counts as silent."""

    def limits(self) -> ClientLimits:
        """Bounds of what a client may claim, hold and cost."""
        return ClientLimits(
            max_samples=self.max_samples,
            quotas=read_quotas(self.quotas) if self.quotas is not None else {},
            max_batch=self.max_batch,
            memory=self.client_memory << 20,
            slowest=self.slowest_link << 10,
            goings_back=self.goings_back,
        )


@dataclasses.dataclass(frozen=True)
class HealthArguments:
    """Ask a server's health service; the exit status is 0 if it serves."""

    address: tyro.conf.Positional[str]
    """HOST:PORT of the server."""
    tls: str | None = None
    """A folder of certificates: a client's, or the server's own."""
    ready: bool = False
    """Whether to ask if the run is ready as well: it is not while it waits for a client."""


def parse_serve(arguments: Sequence[str]) -> ServeArguments:
    """The arguments of `cutlayer serve`."""
    return parse_recipe(
        {name: ServeArguments(recipe=name, choices=Choices.of(recipe())) for name, recipe in RECIPES.items()},
        {name: recipe.__doc__ or "" for name, recipe in RECIPES.items()},
        "cutlayer serve",
        arguments,
    )


def serve_command(arguments: Sequence[str], console: Console) -> None:
    """Hold the server half of a run for clients on other machines."""
    chosen = parse_serve(arguments)
    log_refusals()
    config = dataclasses.replace(chosen.choices.applied_to(RECIPES[chosen.recipe]()), clients=len(chosen.client))
    prepare(config.threads, chosen.log)
    folder = Run(chosen.run_dir or f"runs/{config.data.name}-served")
    done = folder.records() if folder.exists() else []
    if config.training.ending.reached(done):
        at_its_end = f"{folder.folder} is at its end, after {len(done)} epochs: clients are told so, nothing is trained"
        console.print(f"{at_its_end}. To go on, give more --epochs", soft_wrap=True)
    elif chosen.farewell:
        raise ConfigError(f"farewell: {folder.folder} is not at its end, {len(done)} epochs are done")
    with ProgressView(schedule_of(config), config.training.epochs, console, done) as view:
        served = until_stopped(
            lambda stop: _served(chosen, config, folder, console, view, stop), folder.folder, console
        )
    if served is None:
        return
    if served.refusals:
        console.print(f"refused: {served.refusals}")
    if len(chosen.client) > 1:
        folder.save_model(folder.model())
    else:
        console.print(
            f"the client half is with the client; for the uncut network, where both folders are: "
            f"cutlayer merge {folder.folder} --client CLIENT_RUN",
            soft_wrap=True,
        )
    console.print(f"run folder: {folder.folder}")


def _served(
    chosen: ServeArguments, config: RunConfig, folder: Run, console: Console, view: ProgressView, stop: Stop
) -> Served:
    outline = config.data.outline()
    halves = config.halves(outline)
    if chosen.frozen:
        halves.client.requires_grad_(False)

    def on_listening(port: int) -> None:
        how = "mutual TLS" if chosen.tls else "plain text"
        line = f"listening on port {port} ({how}) for {', '.join(chosen.client)}"
        if chosen.listen.startswith(("127.", "localhost:", "[::1]:")):
            line += f"; from this machine alone: for others say --listen 0.0.0.0:{port}"
        console.print(line, soft_wrap=True)

    revoked = Revocations(chosen.revoked) if chosen.revoked is not None else None
    admitted = Admissions(chosen.admit) if chosen.admit is not None else None
    with read_again_on_signal(revoked, admitted):
        return serve(
            halves.server,
            cut_shape_of(halves.client, outline),
            listen=Listening(
                chosen.listen, **chosen.secured(), revoked=revoked, admitted=admitted, metrics=chosen.metrics
            ),
            run=folder.folder,
            clients=chosen.client,
            client_half=halves.client,
            method=config.method,
            training=config.training,
            config=config.as_dict(),
            waits=Waits(chosen.deadline, chosen.patience, None if chosen.farewell else chosen.linger),
            limits=chosen.limits(),
            callbacks=Callbacks(view, on_listening, view.note),
            stop=stop,
        )


def health(arguments: Sequence[str], console: Console) -> None:
    """Ask whether a server is up."""
    chosen = tyro.cli(HealthArguments, prog="cutlayer health", args=arguments)
    status = check_health(chosen.address, chosen.tls, READINESS if chosen.ready else LIVENESS)
    if status != "SERVING":
        raise RefusedError(f"{chosen.address}: {status}")
    console.print(status)
