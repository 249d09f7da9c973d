"""The command line between machines: `cutlayer certs`, `serve`, `join`, `health`."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Sequence
from typing import Annotated, Any

import grpc
import torch
import tyro
from rich.console import Console

from cutlayer.backends.grpc.certs import make_certificates
from cutlayer.backends.grpc.corelog import log_refusals
from cutlayer.backends.grpc.rpc import KEEPALIVE, check_address
from cutlayer.backends.grpc.session import check_health, fetch_config, own_name
from cutlayer.backends.grpc.stop import Stop, Stopped
from cutlayer.backends.grpc.trouble import Attempts
from cutlayer.cli.answer import answer
from cutlayer.cli.arguments import parse_recipe
from cutlayer.cli.shown import schedule_of
from cutlayer.data.partition import Partition
from cutlayer.errors import ConfigError, RefusedError
from cutlayer.report import ProgressView
from cutlayer.runs.choices import Choices
from cutlayer.runs.config import RunConfig
from cutlayer.runs.join import join
from cutlayer.runs.recipes import RECIPES
from cutlayer.runs.run import Run
from cutlayer.runs.serve import Served, serve


@dataclasses.dataclass(frozen=True)
class CertsArguments:
    """Make a private authority, a server certificate and one for each client; what is there already stays."""

    folder: tyro.conf.Positional[str]
    """Folder to write to. Copy its folder `server` to the server and each client's folder to that client."""
    client: tuple[str, ...] = ("client",)
    """Names of the clients."""
    days: float = 825
    """Days that the certificates are valid."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConnectionArguments:
    """How this machine is connected."""

    tls: str | None = None
    """This machine's folder of certificates."""
    insecure_plaintext: bool = False
    """Allow addresses beyond this machine without TLS."""
    keepalive: float = KEEPALIVE
    """Seconds within which a connection whose other end has vanished without a word is given up."""

    def values(self) -> dict[str, Any]:
        """As `serve` and `join` take them."""
        return {name: getattr(self, name) for name in ("tls", "insecure_plaintext", "keepalive")}


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
    deadline: float = 300.0
    """Seconds after which a client that is connected and sends nothing is disconnected."""
    patience: float | None = None
    """Seconds after which an epoch goes on without a client of which nothing comes; by default all are waited for."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JoinArguments(ConnectionArguments):
    """Take part in a run with this machine's data. Model, cut and method are the server's."""

    address: tyro.conf.Positional[str]
    """HOST:PORT of the server."""
    data: str | None = None
    """Data set; by default the one that the server names."""
    data_dir: str | None = None
    """Folder with the data set's files."""
    partition: str | None = None
    """Partition file, to take part with one client's share of the data set; see `cutlayer partition`."""
    part: int = 0
    """With a partition file: whose share, from 0. The test data come with the first."""
    run_dir: str = "runs/joined"
    """Folder for this client's checkpoints, to begin with or to go on."""
    name: str | None = None
    """This client's name, for a connection without TLS."""
    device: str = "cpu"
    """Device of the client half."""
    give_up_after: float | None = None
    """Seconds without a server after which to end; by default never."""


@dataclasses.dataclass(frozen=True)
class HealthArguments:
    """Ask a server's health service; the exit status is 0 if it serves."""

    address: tyro.conf.Positional[str]
    """HOST:PORT of the server."""
    tls: str | None = None
    """A folder of certificates: a client's, or the server's own."""


def certs(arguments: Sequence[str], console: Console) -> None:
    """Make certificates for a server and its clients."""
    chosen = tyro.cli(CertsArguments, prog="cutlayer certs", args=arguments)
    written = make_certificates(chosen.folder, chosen.client, chosen.days)
    for file in written:
        console.print(f"wrote {file}", highlight=False, soft_wrap=True)
    if not written:
        console.print(f"all there already in {chosen.folder}; to renew one, remove its folder", highlight=False)


def serve_command(arguments: Sequence[str], console: Console) -> None:
    """Hold the server half of a run for clients on other machines."""
    chosen: ServeArguments = parse_recipe(
        {name: ServeArguments(recipe=name, choices=Choices.of(recipe())) for name, recipe in RECIPES.items()},
        {name: recipe.__doc__ or "" for name, recipe in RECIPES.items()},
        "cutlayer serve",
        arguments,
    )
    log_refusals()
    config = dataclasses.replace(chosen.choices.applied_to(RECIPES[chosen.recipe]()), clients=len(chosen.client))
    _prepare(config.threads)
    folder = Run(chosen.run_dir or f"runs/{config.data.name}-served")
    done = folder.records() if folder.exists() else []
    if config.training.ending.reached(done):
        at_its_end = f"{folder.folder} is at its end, after {len(done)} epochs: clients are told so, nothing is trained"
        console.print(f"{at_its_end}. To go on, give more --epochs", highlight=False, soft_wrap=True)
    stop = Stop()
    with stop.on_signals(), ProgressView(schedule_of(config), config.training.epochs, console, done) as view:
        try:
            served = _served(chosen, config, folder, console, view, stop)
        except Stopped as stopped:
            console.print(f"{stopped}; the same command goes on with {folder.folder}", highlight=False, soft_wrap=True)
            return
    if served.refusals:
        console.print(f"refused: {served.refusals}", highlight=False)
    if len(chosen.client) > 1:
        folder.save_model(folder.model())
    else:
        console.print(
            f"the client half is with the client; for the uncut network, where both folders are: "
            f"cutlayer merge {folder.folder} --client CLIENT_RUN",
            highlight=False,
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
    with torch.no_grad():
        cut_shape = tuple(halves.client.eval()(outline.inputs.new_zeros((1, *outline.inputs.shape[1:]))).shape[1:])

    def listening(port: int) -> None:
        how = "mutual TLS" if chosen.tls else "plain text"
        console.print(f"listening on port {port} ({how}) for {', '.join(chosen.client)}", highlight=False)

    return serve(
        halves.server,
        cut_shape,
        listen=chosen.listen,
        run=folder.folder,
        clients=chosen.client,
        client_half=halves.client,
        method=config.method,
        training=config.training,
        config=config.as_dict(),
        on_epoch=view,
        on_listening=listening,
        on_wait=view.note,
        deadline=chosen.deadline,
        patience=chosen.patience,
        stop=stop,
        **chosen.values(),
    )


def join_command(arguments: Sequence[str], console: Console) -> None:
    """Take part in a run that another machine serves."""
    chosen = tyro.cli(JoinArguments, prog="cutlayer join", args=arguments)
    check_address(chosen.address, chosen.tls, chosen.insecure_plaintext)
    _prepare(None)
    stop = Stop()
    with stop.on_signals():
        try:
            _join(chosen, console, stop)
        except Stopped as stopped:
            console.print(f"{stopped}; the same command goes on with {chosen.run_dir}", highlight=False, soft_wrap=True)
            return
    console.print(f"finished: {chosen.run_dir}/client.safetensors", highlight=False, soft_wrap=True)


def _join(chosen: JoinArguments, console: Console, stop: Stop) -> None:
    name = own_name(chosen.tls) if chosen.tls else chosen.name
    config = _config(chosen, stop)
    if chosen.data not in (None, config.data.name):
        raise ConfigError(f"data: the server's run is on {config.data.name!r}, not on {chosen.data!r}")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    cut = f"{config.model.name} on {config.data.name}, cut after {config.model.cut}"
    console.print(f"{name or 'client'}: {cut}", highlight=False)
    train, test = config.datasets()
    half, share = config.halves(train).client, train
    if chosen.partition is not None:
        partition = Partition.load(chosen.partition)
        partition.check(train.labels, config.data.name)
        share = partition.subset(train, chosen.part)
    join(
        chosen.address,
        half,
        share,
        test if chosen.part == 0 else None,
        folder=chosen.run_dir,
        name=name,
        method=config.method,
        training=config.training,
        on_epoch=lambda exchange, epoch: console.print(f"epoch {epoch + 1}: {exchange}", highlight=False),
        give_up_after=chosen.give_up_after,
        stop=stop,
        **chosen.values(),
    )


def health(arguments: Sequence[str], console: Console) -> None:
    """Ask whether a server is up."""
    chosen = tyro.cli(HealthArguments, prog="cutlayer health", args=arguments)
    status = check_health(chosen.address, chosen.tls)
    if status != "SERVING":
        raise RefusedError(f"{chosen.address}: {status}")
    console.print(status)


def _config(chosen: JoinArguments, stop: Stop) -> RunConfig:
    """The server's config, once it can be reached."""
    started, wait, attempts = time.monotonic(), 0.2, Attempts(chosen.address, chosen.tls)
    while True:
        stop.check()
        try:
            return _for_here(json.loads(fetch_config(chosen.address, chosen.tls)), chosen)
        except grpc.RpcError as error:
            reason = f"no connection to {chosen.address}: "
            if attempts.failed(error):
                raise ConfigError(reason + attempts.last) from None
            if chosen.give_up_after is not None and time.monotonic() - started > chosen.give_up_after:
                raise RefusedError(reason + attempts.last) from None
            stop.check()
            time.sleep(wait)
            wait = min(2 * wait, 5.0)


def _for_here(values: Any, chosen: JoinArguments) -> RunConfig:
    """The server's config with this machine's device and folder of data, and not with where the server's store is."""
    own = {"data": {"folder": chosen.data_dir}, "training": {"device": chosen.device}, "method": {"store": {}}}
    if not isinstance(values, dict) or not all(isinstance(values.get(part), dict) for part in own):
        raise ConfigError("the server's config is not of this version; use the same version of cutlayer on both sides")
    chosen_there = {name: value for name, value in values.items() if name != "terms"}
    return RunConfig.from_dict({**chosen_there, **{part: {**values[part], **mine} for part, mine in own.items()}})


def _prepare(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
    level = os.environ.get("CUTLAYER_LOG", "WARNING")
    logging.basicConfig(level=level, format="%(asctime)s %(name)s: %(message)s")


COMMANDS = {"certs": certs, "answer": answer, "serve": serve_command, "join": join_command, "health": health}
