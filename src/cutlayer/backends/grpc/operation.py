"""What a server's operator chooses of its connections, and hears of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cutlayer.backends.grpc.limits import ClientLimits
from cutlayer.backends.grpc.name_files import Admissions, Revocations
from cutlayer.backends.grpc.rpc import Endpoint
from cutlayer.records.history import EpochRecord
from cutlayer.stop_request import Stop


@dataclass(frozen=True)
class Listening(Endpoint):
    """Where a server listens, and to whom it does not. With port 0 it takes a free one.

    Attributes:
        revoked: names whose certificates do not count any more.
        admitted: names that are let into the run after it has begun, between two epochs.
        metrics: HOST:PORT to show metrics at, in Prometheus' format.
    """

    revoked: Revocations | None = None
    admitted: Admissions | None = None
    metrics: str | None = None


@dataclass(frozen=True)
class Waits:
    """How long a server waits for clients, in seconds.

    Attributes:
        deadline: after which a client that is connected and sends nothing is disconnected.
        patience: after which an epoch goes on without a client that is not there, or of which nothing comes. A client
            that comes back takes part in the next epoch. The result then depends on who was there in time. None waits
            for all, and to the same bits: a client that begins anew takes the run back to its last checkpoint.
        linger: that the end of the run waits for clients to hear of it and get their half; None waits for all.
    """

    deadline: float = 300.0
    patience: float | None = None
    linger: float | None = 30.0


def _ignored(value: object) -> None:
    pass


@dataclass(frozen=True, eq=False)
class Callbacks:
    """What a server calls while it is at work.

    Attributes:
        on_epoch: after each epoch, with its record.
        on_listening: with the port, once connections are taken.
        on_wait: now and then, with a line that says whom the server waits for and since when.
    """

    on_epoch: Callable[[EpochRecord], None] = _ignored
    on_listening: Callable[[int], None] = _ignored
    on_wait: Callable[[str], None] = _ignored


@dataclass(frozen=True, eq=False)
class Operation:
    """Where a server listens, how long it waits, what clients may cost, what it calls, and what ends it."""

    listening: Listening
    waits: Waits = Waits()
    limits: ClientLimits = field(default_factory=ClientLimits)
    callbacks: Callbacks = Callbacks()
    stop: Stop = field(default_factory=Stop)
