"""How fast both halves are: a short run measured here, or stated rates."""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cutlayer.backends.client_data import ClientData
from cutlayer.backends.local import LOCAL
from cutlayer.errors import DiskError
from cutlayer.fleet import Fleet
from cutlayer.method import Task
from cutlayer.models.cut import Halves, copied
from cutlayer.models.flops import FlopTable
from cutlayer.planning.load import Load, Outline, Stated
from cutlayer.records.checkpoint import Checkpoints
from cutlayer.records.ledger import Ledger
from cutlayer.records.state_dicts import Stateful
from cutlayer.runs.loop import Loop
from cutlayer.schedule import Exchange
from cutlayer.temporary import TemporaryFolder
from cutlayer.training.job import Job

OPERATIONS_PER_VALUE = 20
"""Of encoding or decoding a value, for a device whose speed is stated."""
BATCHES = 2
"""In an epoch of the short run."""
WRITTEN = 1 << 24
"""Bytes that are written to see how fast the disk takes a checkpoint."""


@dataclass(frozen=True)
class Speeds:
    """Stated GFLOP/s; None for a timing here."""

    device: float | None = None
    server: float | None = None


TIMED_HERE = Speeds()


@dataclass(frozen=True)
class Step:
    """Seconds of a batch.

    Attributes:
        client: until its activations are there to be encoded.
        encode: of the activations, by the client.
        rest: of the client, once gradients come.
        server: from a frame to the answer.
        evaluation: of a test batch, by the server.
    """

    client: float = 0.0
    encode: float = 0.0
    rest: float = 0.0
    server: float = 0.0
    evaluation: float = 0.0


@dataclass(frozen=True)
class Saving:
    """Seconds of writing a checkpoint; 0 for a machine whose speed is stated, as that says nothing of its disk.

    Attributes:
        client, server: each one's own, but for the store.
        byte: for each byte of the store, in a checkpoint before which the store changed.
    """

    client: float = 0.0
    server: float = 0.0
    byte: float = 0.0


@dataclass(frozen=True)
class Pace:
    """How fast both halves are: seconds of a batch in each kind of epoch, and of checkpoints."""

    steps: Mapping[Exchange, Step]
    saving: Saving = field(default_factory=Saving)


def measured(halves: Halves, load: Load, task: Task, budget: float = 1.0) -> Pace:
    """The pace of both halves in this process: medians over some short epochs, as the machine is now.

    Args:
        budget: seconds after which it ends, if every kind of epoch was measured.
    """
    inputs, labels = load.first
    tested = any(load.evaluation)
    test = Outline(inputs, labels, BATCHES * len(labels)) if tested else None
    data = [ClientData(Outline(inputs, labels, BATCHES * len(labels)), test)]
    exchanges = "A" + 20 * "ABC"
    # Batch norm's statistics are not measured in the short run: that is counted apart, see `Clock.epoch`.
    norm = "eval" if load.method.norm_in_b == "calibrated" else load.method.norm_in_b
    method = replace(load.method, schedule=Stated(exchanges=exchanges), fleet=Fleet(), norm_in_b=norm)
    size, in_b = len(labels), exchanges.index("B") + 1
    training = replace(load.training, epochs=1 << 20, batch_size=size, microbatches=1, evaluate_every=in_b)
    halves, own, served = copied(halves), Ledger(), Ledger()
    found: dict[Exchange, list[Step]] = defaultdict(list)
    with closing(LOCAL.open(halves.client, data, method, training, own)) as clients:
        client = clients.descriptions[0]
        job = Job(halves.server, client.cut_shape, method, training, task, client.summary.bfloat16)
        server = clients.server(job, served)
        loop = Loop(clients, server, None, None)
        begun = time.perf_counter()
        for number in range(len(exchanges)):
            if number == 1:
                begun = time.perf_counter()  # the first epoch warms up
            if number % 3 == 1 and number > 3 and time.perf_counter() - begun > budget:
                break
            loop.epoch()
            record, spent = loop.records[-1], own.take().seconds
            if number:
                found[Exchange(record.exchange)].append(_step(spent, record.seconds))
        saving = _saving(server.parts(), clients.stores)
    return Pace({exchange: _median(steps) for exchange, steps in found.items()}, saving)


def _step(client: Mapping[str, float], server: Mapping[str, float]) -> Step:
    def each(seconds: Mapping[str, float], *phases: str) -> float:
        return sum(seconds.get(phase, 0.0) for phase in phases) / BATCHES

    return Step(
        each(client, "data", "client forward", "client defence"),
        each(client, "encode"),
        each(client, "decode", "client backward"),
        each(server, *(set(server) - {"evaluation"})),
        each(server, "evaluation"),
    )


def _median(steps: list[Step]) -> Step:
    return Step(*(statistics.median(getattr(step, each.name) for step in steps) for each in fields(Step)))


def _saving(server: Mapping[str, Stateful], client: Mapping[str, Stateful]) -> Saving:
    """How long checkpoints of these take on the disk of the working folder, in which runs are by default."""
    fixed, byte = _disk()
    own, served = (
        fixed + byte * sum(_size(part) for name, part in parts.items() if name != "store") for parts in (client, server)
    )
    return Saving(own, served, byte)


def _size(part: Stateful) -> int:
    return sum(value.nbytes for value in part.state_dict().values() if isinstance(value, Tensor | np.ndarray))


@cache
def _disk() -> tuple[float, float]:
    """Seconds that a small checkpoint takes, and what each byte adds: checksums, and the way to the disk."""
    try:
        return _written()
    except DiskError:
        return 0.0, 0.0  # no run has room here, either


def _written() -> tuple[float, float]:
    # Where nothing can be written, as in a container, runs cannot be, either: then wherever the system says.
    here = os.curdir if os.access(os.curdir, os.W_OK) else None
    with TemporaryFolder("plan", here) as folder:
        seconds = []
        for number, count in enumerate((1, 1, 1, 1, WRITTEN)):
            part = _Bytes(torch.randint(256, (count,), dtype=torch.uint8))
            begun = time.perf_counter()
            Checkpoints(folder.path).save(number, {"server": part}, {}, keep=2)
            seconds.append(time.perf_counter() - begun)
        fixed = statistics.median(seconds[1:-1])
        return fixed, max(0.0, seconds[-1] - fixed) / WRITTEN


class _Bytes:
    """A part of a checkpoint of so many bytes."""

    def __init__(self, content: Tensor) -> None:
        self.content = content

    def state_dict(self) -> Mapping[str, Any]:
        return {"content": self.content}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.content = state["content"]


def of_server(table: FlopTable, batch: int, gflops: float) -> Pace:
    """A server that does so many GFLOP/s, and a client that takes no time; for batches of so many samples."""
    forward, backward = table(batch)
    evaluation = forward / gflops / 1e9
    seconds = [sum(table(batch, input_gradient=True)) / gflops / 1e9, *[(forward + backward) / gflops / 1e9] * 2]
    return Pace({e: Step(server=s, evaluation=evaluation) for e, s in zip(Exchange, seconds, strict=True)})


def of_device(pace: Pace, table: FlopTable, batch: int, values: int, gflops: float) -> Pace:
    """The same with a client that does so many GFLOP/s.

    Args:
        values: at the cut, of a sample.
    """
    forward, backward = table(batch)
    codec = OPERATIONS_PER_VALUE * batch * values / gflops / 1e9
    both = {"client": forward / gflops / 1e9, "encode": codec, "rest": codec + backward / gflops / 1e9}
    nothing = dict.fromkeys(both, 0.0)
    its = {Exchange.BOTH: both, Exchange.ACTIVATIONS: {**both, "rest": 0.0}, Exchange.NONE: nothing}
    steps = {exchange: replace(step, **its[exchange]) for exchange, step in pace.steps.items()}
    return Pace(steps, replace(pace.saving, client=0.0))
