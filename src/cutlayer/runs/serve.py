"""The server's process of a run whose clients `join` from processes of their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from cutlayer.backends.grpc.admission import Waits
from cutlayer.backends.grpc.claims import Claims, Outline
from cutlayer.backends.grpc.clients import Control, GrpcClients
from cutlayer.backends.grpc.limits import Limits
from cutlayer.backends.grpc.listener import Listener
from cutlayer.backends.grpc.revocations import Revocations
from cutlayer.backends.grpc.rpc import KEEPALIVE, check_address
from cutlayer.backends.grpc.stop import Stop
from cutlayer.describe import describe
from cutlayer.errors import ConfigError
from cutlayer.method import Method, Task, Training, require_choices
from cutlayer.records.history import EpochRecord, History
from cutlayer.records.ledger import Ledger
from cutlayer.records.noted import delivered, left_out
from cutlayer.runs.loop import Loop
from cutlayer.runs.metrics import Metrics, shown
from cutlayer.runs.run import Run
from cutlayer.runs.weights import save_halves
from cutlayer.training.job import Job
from cutlayer.wire.messages import Saved


@dataclass(frozen=True, eq=False)
class Served:
    """What `serve` returns: the run's history, the trained server half, and how much was refused from whom."""

    history: History
    half: nn.Module
    refusals: dict[str, int]


def serve(
    half: nn.Module,
    cut_shape: tuple[int, ...],
    *,
    listen: str,
    run: str | Path,
    clients: Sequence[str] = ("client",),
    tls: str | Path | None = None,
    insecure_plaintext: bool = False,
    client_half: nn.Module | None = None,
    method: Method = Method(),
    training: Training = Training(),
    task: Task = Task(),
    config: dict[str, Any] | None = None,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    on_listening: Callable[[int], None] | None = None,
    on_wait: Callable[[str], None] | None = None,
    limits: Limits = Limits(),
    revoked: Revocations | None = None,
    metrics: str | None = None,
    deadline: float = 300.0,
    patience: float | None = None,
    linger: float | None = 30.0,
    farewell: bool = False,
    keepalive: float = KEEPALIVE,
    stop: Stop | None = None,
) -> Served:
    """Hold the server half of a run, for clients that `join` from processes of their own.

    Several clients work together as `Method.fleet` says.

    Args:
        half: from the activations at the cut to the outputs; trained in place.
        cut_shape: shape of one sample's activations.
        listen: HOST:PORT; port 0 takes a free one.
        run: the run's folder. If a run was begun there, this goes on with it, to the same bits.
        clients: their names, as in their certificates.
        tls: this machine's folder of certificates (`cutlayer certs`).
        insecure_plaintext: allow addresses beyond this machine without TLS.
        client_half: for its structure alone, which a client's must equal; None compares clients with each other.
        config: what clients that ask for it are told, and config.json holds.
        on_epoch: called after each epoch with its record.
        on_listening: called with the port once connections are taken.
        on_wait: called now and then with a line that says whom the server waits for and since when.
        revoked: names whose certificates do not count any more.
        metrics: HOST:PORT to show metrics at, in Prometheus' format.
        limits: bounds of what a client may claim, hold and cost.
        deadline: seconds after which a client that is connected and sends nothing is disconnected.
        patience: seconds after which an epoch goes on without a client that is not there, or of which nothing comes. A
            client that comes back takes part in the next epoch. The result then depends on who was there in time. None
            waits for all, and to the same bits: a client that begins anew takes the run back to its last checkpoint.
        linger: seconds that the end of the run waits for clients to hear of it and get their half; None waits for all.
        farewell: only hand out what a run that is at its end has for its clients, to those that have not got it.
        keepalive: seconds within which a connection whose other end has vanished without a word is given up.
        stop: lets another thread, or signals, end the run early.

    Raises:
        ConfigError: arguments, folder or address do not fit.
        DivergedError, StoreFullError: as in `fit`.
        Stopped: the run was asked to stop; the same call goes on with it.
    """
    check_address(listen, tls, insecure_plaintext)
    outline = Outline(clients, client_half, cut_shape, method, training)
    folder, stop, chosen = Run(run), stop or Stop(), _chosen(config, outline, task)
    if folder.exists():
        folder.check(chosen)

    control = Control(limits, Waits(deadline, patience, keepalive), stop, on_wait or (lambda line: None), revoked)
    joined = GrpcClients(outline, control, folder.checkpoints, lambda: _oldest(loop), left_out(folder.folder))
    with ExitStack() as stack:
        offered = _offered(config, Claims(outline, limits).terms)
        listener = Listener(listen, tls, joined.reception(offered, named=tls is not None), keepalive)
        stack.callback(listener.close)
        stack.callback(joined.close)
        if on_listening is not None:
            on_listening(listener.port)
        stack.enter_context(folder.locked())
        joined.meet()
        bfloat16 = all(summary.bfloat16 for summary in joined.summaries)
        server = joined.server(Job(half, cut_shape, method, training, task, bfloat16), Ledger())
        loop = Loop(joined, server, folder, folder.checkpoints, stop)
        stack.enter_context(shown(Metrics(joined, lambda: loop.records), metrics))
        loop.open(chosen, {}, resume=True)
        if farewell and not training.ending.reached(loop.records):
            raise ConfigError(f"farewell: {folder.folder} is not at its end, {len(loop.records)} epochs are done")
        loop.train([on_epoch] if on_epoch is not None else [])
        save_halves(folder.folder, half, server.shared.tensors, joined.run)
        joined.say_farewell(server, len(loop.records), delivered(folder.folder), linger)
    return Served(History(loop.records, loop.baseline, folder.given_up()), half, dict(joined.refusals.counts))


def _chosen(config: dict[str, Any] | None, outline: Outline, task: Task) -> dict[str, Any]:
    """What config.json holds. Raises ConfigError for choices that are none, or none between processes."""
    method, training = outline.method, outline.training
    require_choices(method, training, task)
    if method.fleet.dropout:
        raise ConfigError("dropout simulates the loss of clients in one process; between processes leave it at 0")
    described = {"method": describe(method), "training": describe(training), "task": describe(task)}
    return {**(config or described), "clients": list(outline.names)}


def _oldest(loop: Loop) -> Saved:
    """The oldest checkpoint that the server may go back to, and the best epoch's, if that is to stay."""
    assert loop.checkpoints is not None
    oldest = loop.checkpoints.epochs()[-loop.training.keep_checkpoints :][0]
    return Saved(oldest, max(loop.training.ending.kept(loop.records), default=-1))


def _offered(config: dict[str, Any] | None, terms: dict[str, str]) -> str:
    """What clients that ask are told: the config, and the terms, for a device that cannot work them out itself."""
    return json.dumps({**(config or {}), "terms": terms})
