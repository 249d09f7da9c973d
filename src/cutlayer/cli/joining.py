"""The command `cutlayer join`: take part in a run with this machine's data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import tyro
from rich.console import Console
from torch import nn

from cutlayer.backends.grpc.calls import leave, wait_for_config
from cutlayer.backends.grpc.rpc import Endpoint
from cutlayer.backends.grpc.session import own_name
from cutlayer.cli.connection import ConnectionArguments, cut_shape_of, prepare, until_stopped
from cutlayer.cli.consent import PolicyArguments, ask, check_sizes
from cutlayer.data.partition import Partition
from cutlayer.errors import ConfigError, harmless
from cutlayer.runs.config import RunConfig
from cutlayer.runs.join import join
from cutlayer.stop_request import Stop


@dataclasses.dataclass(frozen=True, kw_only=True)
class JoinArguments(PolicyArguments, ConnectionArguments):
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
    """Seconds without a server after which to end; by default never. To wait to be let in is not to be without one."""
    leave: bool = False
    """Leave the run for good, in place of taking part: nobody waits for this client any more, and the server drops what
    it stores of it. Only with --tls, as the certificate says who leaves."""


def join_command(arguments: Sequence[str], console: Console) -> None:
    """Take part in a run that another machine serves."""
    chosen = tyro.cli(JoinArguments, prog="cutlayer join", args=arguments)
    server = Endpoint(chosen.address, **chosen.secured())
    prepare(None, chosen.log)
    if chosen.leave:
        until_stopped(lambda stop: _leave(chosen, server, console, stop), chosen.run_dir, console)
        return
    if until_stopped(lambda stop: _join(chosen, server, console, stop), chosen.run_dir, console) is not None:
        console.print(f"finished: {chosen.run_dir}/client.safetensors", soft_wrap=True)


def _leave(chosen: JoinArguments, server: Endpoint, console: Console, stop: Stop) -> None:
    leave(server, give_up_after=chosen.give_up_after, check=stop.check)
    console.print(
        "left the run for good. The server drops what it stores of this client before the next epoch; what the network "
        "has learned from it stays. This client's checkpoints are where they were",
        soft_wrap=True,
    )


def _join(chosen: JoinArguments, server: Endpoint, console: Console, stop: Stop) -> nn.Module:
    """The trained client half."""
    name = own_name(chosen.tls) if chosen.tls else chosen.name
    config = _config(chosen, stop)
    if chosen.data not in (None, config.data.name):
        raise ConfigError(f"data: the server's run is on {config.data.name!r}, not on {chosen.data!r}")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    policy = chosen.policy(config.clients)
    cut = f"{config.model.name} on {config.data.name}, cut after {config.model.cut}"
    console.print(f"{name or 'client'}: {harmless(cut)}")
    train, test = config.datasets()
    half, share = config.halves(train).client, train
    shapes = cut_shape_of(half, train), tuple(train.inputs.shape[1:])
    ask(chosen, policy, config.model.cut, (half, config.method, *shapes), console)
    if chosen.partition is not None:
        partition = Partition.load(chosen.partition)
        partition.check(train.labels, config.data.name)
        share = partition.subset(train, chosen.part)
    return join(
        server,
        half,
        share,
        test if chosen.part == 0 else None,
        folder=chosen.run_dir,
        name=name,
        method=config.method,
        training=config.training,
        policy=policy,
        on_epoch=lambda exchange, epoch: console.print(f"epoch {epoch + 1}: {exchange}"),
        give_up_after=chosen.give_up_after,
        stop=stop,
    )


def _config(chosen: JoinArguments, stop: Stop) -> RunConfig:
    """The server's config, once it can be reached."""
    found = wait_for_config(chosen.address, chosen.tls, chosen.give_up_after, stop.check)
    return _for_here(found, chosen)


def _for_here(values: Any, chosen: JoinArguments) -> RunConfig:
    """The server's config with this machine's device and folder of data, and not with where the server's store is."""
    own = {"data": {"folder": chosen.data_dir}, "training": {"device": chosen.device}, "method": {"store": {}}}
    if not all(isinstance(values.get(part), dict) for part in (*own, "model")):
        raise ConfigError("the server's config is not of this version; use the same version of cutlayer on both sides")
    check_sizes(values, chosen.policy())
    chosen_there = {name: value for name, value in values.items() if name != "terms"}
    return RunConfig.from_dict({**chosen_there, **{part: {**values[part], **mine} for part, mine in own.items()}})
