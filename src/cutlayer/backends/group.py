"""Several clients in one process, whose halves share the memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import nn

from cutlayer.backends.client_data import ClientData
from cutlayer.method import Method, Training
from cutlayer.records.ledger import Ledger
from cutlayer.training.client import Client
from cutlayer.training.halves import HalfPool
from cutlayer.training.job import ClientJob


def store_name(name: str, number: int, clients: int) -> str:
    """What checkpoints call a client's own store of this name."""
    return f"{name}_{number}" if clients > 1 else name


@dataclass(frozen=True, eq=False)
class ClientGroup:
    """Clients in one process, by number, and what holds their halves."""

    pool: HalfPool
    by_number: dict[int, Client]


def build_clients(
    half: nn.Module,
    data: dict[int, ClientData],
    method: Method,
    training: Training,
    ledger: Ledger,
    folder: str | None,
) -> ClientGroup:
    """Clients with these numbers and data in this process.

    Args:
        half: what all begin with; it becomes the half of the first.
        folder: for the halves that are not in memory.
    """
    feeds = {number: held.feeds(number, training) for number, held in data.items()}
    live, owners = method.fleet.live, len(feeds)
    pool = HalfPool(half, training.client, training, owners=owners, live=live, folder=folder)
    clients: dict[int, Client] = {}
    table = None
    for number, (train, test) in feeds.items():
        job = ClientJob(number, train, test, method, training)
        clients[number] = Client(job, partial(pool.take, number), ledger, table)
        table = clients[number].flops
    return ClientGroup(pool, clients)
