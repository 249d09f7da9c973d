"""The server's process of a run whose clients `join` from processes of their own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from cutlayer.backends.grpc.claims import Outline
from cutlayer.backends.grpc.clients import GrpcClients
from cutlayer.backends.grpc.limits import ClientLimits
from cutlayer.backends.grpc.listener import Listener
from cutlayer.backends.grpc.name_files import Admissions, Revocations
from cutlayer.backends.grpc.operation import Callbacks, Listening, Operation, Waits
from cutlayer.describe import describe
from cutlayer.errors import ConfigError
from cutlayer.method import Method, Task, Training, require_choices
from cutlayer.models.auxiliary import SelfTraining
from cutlayer.models.cut import copied
from cutlayer.records.history import History
from cutlayer.records.ledger import Ledger
from cutlayer.records.noted import delivered, left_out
from cutlayer.runs.loop import Loop
from cutlayer.runs.metrics import Metrics, shown
from cutlayer.runs.rounds import Rounds
from cutlayer.runs.run import Run
from cutlayer.runs.weights import save_halves
from cutlayer.stop_request import Stop
from cutlayer.training.job import Job
from cutlayer.training.states import States
from cutlayer.wire.messages import Saved

__all__ = ["Admissions", "Callbacks", "ClientLimits", "Listening", "Revocations", "Served", "Stop", "Waits", "serve"]


ALONE = (
    "admit: expected a run of two clients or more. The half of a single client never leaves it, so there is none that "
    "another could begin with; begin a run of several from its weights"
)


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
    listen: str | Listening,
    run: str | Path,
    clients: Sequence[str] = ("client",),
    client_half: nn.Module | None = None,
    method: Method = Method(),
    training: Training = Training(),
    task: Task = Task(),
    config: dict[str, Any] | None = None,
    waits: Waits = Waits(),
    limits: ClientLimits = ClientLimits(),
    callbacks: Callbacks = Callbacks(),
    stop: Stop | None = None,
) -> Served:
    """Hold the server half of a run, for clients that `join` from processes of their own.

    Several clients work together as `Method.fleet` says. A run that is at its end is not trained on: what it has for
    its clients is handed out, to those that have not got it.

    Args:
        half: from the activations at the cut to the outputs; trained in place.
        cut_shape: shape of one sample's activations.
        listen: HOST:PORT on this machine, or a `Listening`, with certificates for what comes from others; port 0 takes
            a free one.
        run: the run's folder. If a run was begun there, this goes on with it, to the same bits.
        clients: names of those that the run begins with, as in their certificates; others are admitted to it later if
            `Listening.admitted` says so.
        client_half: for its structure alone, which a client's must equal; None compares clients with each other.
        config: what clients that ask for it are told, and config.json holds.
        waits: how long clients are waited for; by default in an epoch without end.
        limits: bounds of what a client may claim, hold and cost.
        callbacks: what is called after each epoch, once connections are taken, and while clients are waited for.
        stop: lets another thread, or signals, end the run early.

    Raises:
        ConfigError: arguments, folder or address do not fit, or another process is at work in the folder.
        DivergedError, StoreFullError: as in `fit`.
        Stopped: the run was asked to stop; the same call goes on with it.
    """
    operation = Operation(Listening.of(listen), waits, limits, callbacks, stop or Stop())
    outline = Outline(clients, client_half, cut_shape, method, training)
    _require_served(outline, operation.listening)
    folder, chosen = Run(run), _chosen(config, outline, task)
    with ExitStack() as stack:
        stack.enter_context(folder.locked())  # before anything of it is read, and before anyone can connect
        if folder.exists():
            folder.check(chosen)
        joined = GrpcClients(outline, operation, folder.checkpoints, lambda: _oldest(rounds), left_out(folder.folder))
        listener = Listener(operation.listening, joined.reception(_offered(config, joined.claims.terms)))
        stack.callback(listener.close)
        stack.callback(joined.close)
        metrics = Metrics(joined, folder.checkpointed if folder.exists() else list)
        stack.enter_context(shown(metrics, operation.listening.metrics))
        callbacks.on_listening(listener.port)
        joined.meet()
        bfloat16 = all(summary.bfloat16 for summary in joined.summaries)
        # A half that has run may not be copied any more, and each round needs one that has not.
        blank = copied(half) if operation.listening.admitted is not None or joined.members.grown else None

        def make() -> Loop:
            fresh = half if blank is None else copied(blank)
            job = Job(fresh, cut_shape, method, training, task, bfloat16)
            made = Loop(joined, joined.server(job, Ledger()), folder, folder.checkpoints, operation.stop)
            made.open(chosen, {}, resume=True)
            if joined.tries_newcomer:
                _require_afforded(made.server.states)
            return made

        rounds = Rounds(joined, folder, make)
        metrics.records = lambda: rounds.records
        loop = rounds.train(callbacks.on_epoch)
        save_halves(folder.folder, loop.server.half, loop.server.shared.tensors, joined.run)
        half.load_state_dict(loop.server.half.state_dict())
        joined.say_farewell(loop.server, len(loop.records), delivered(folder.folder), waits.linger)
        rounds.drop_leavers(loop)
    return Served(History(loop.records, loop.baseline, folder.given_up()), half, dict(joined.refusals.counts))


def _require_served(outline: Outline, listening: Listening) -> None:
    """Raise ConfigError for a run that cannot be one between processes."""
    if isinstance(outline.half, SelfTraining):
        raise ConfigError(
            "client_half: one that trains by itself (LocalLoss) is not served: what a client and a server agree on "
            "before a run does not say which batches it sends. Train it in one process or on a Ray cluster "
            "(run_experiment(config, backend=Ray())), or serve a half that is trained with the server"
        )
    if listening.admitted is not None and len(outline.names) < 2:
        raise ConfigError(ALONE)


def _chosen(config: dict[str, Any] | None, outline: Outline, task: Task) -> dict[str, Any]:
    """What config.json holds. Raises ConfigError for choices that are none, or none between processes."""
    method, training = outline.method, outline.training
    require_choices(method, training, task)
    if method.fleet.dropout:
        raise ConfigError("dropout simulates the loss of clients in one process; between processes leave it at 0")
    described = {"method": describe(method), "training": describe(training), "task": describe(task)}
    return {**(config or described), "clients": list(outline.names)}


def _require_afforded(states: States) -> None:
    """Raise ConfigError if no budget is left for the coming epoch with a client more, or for its first activations."""
    if not states.schedule.affords(states.state):
        raise ConfigError(
            "budget: what is left of it does not pay for an epoch with a client more; begin a run with a larger one"
        )


def _oldest(rounds: Rounds) -> Saved:
    """The oldest checkpoint that the server may go back to, and the best epoch's, if that is to stay."""
    loop = rounds.loop
    assert loop is not None
    assert loop.checkpoints is not None
    oldest = min(*loop.checkpoints.epochs()[-loop.training.keep_checkpoints :], *loop.epochs_to_keep(), 1 << 62)
    return Saved(oldest, max(loop.training.ending.kept(loop.records), default=-1))


def _offered(config: dict[str, Any] | None, terms: dict[str, str]) -> str:
    """What clients that ask are told: the config, and the terms, for a device that cannot work them out itself."""
    return json.dumps({**(config or {}), "terms": terms})
