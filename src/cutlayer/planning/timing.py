"""How long things take: a short run measured here, or stated rates; the link; and epochs put together of both."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace

from cutlayer.backends.client_data import ClientData
from cutlayer.backends.local import LOCAL
from cutlayer.errors import ConfigError
from cutlayer.fleet import Fleet
from cutlayer.method import Task
from cutlayer.models.cut import Halves, copied
from cutlayer.models.flops import FlopTable
from cutlayer.planning.load import Load, Outline, Stated
from cutlayer.records.ledger import Ledger
from cutlayer.runs.loop import Loop
from cutlayer.schedule import Exchange
from cutlayer.strategies import Sequential
from cutlayer.training.job import Job

PACKET_OVERHEAD = 1.048
"""Bytes on a link for each byte of a frame: 66 of headers for 1,448 of data, and 0.2 % of HTTP/2 and TLS; measured in
benchmarks/results/link.md."""
OPERATIONS_PER_VALUE = 20
"""Of encoding or decoding a value, for a device whose speed is stated."""
BATCHES = 2
"""In an epoch of the short run."""


@dataclass(frozen=True)
class Link:
    """The link of a client.

    Attributes:
        up, down: bits per second.
        round_trip: seconds.
    """

    up: float
    down: float
    round_trip: float

    @staticmethod
    def parse(text: str) -> Link:
        """A link from "20Mbit/40ms", or with another rate down than up "5Mbit:20Mbit/40ms". Raises ConfigError."""
        rate = r"(\d+(?:\.\d+)?)\s*([kMG])bit"
        match = re.fullmatch(rf"{rate}(?::{rate})?/(\d+(?:\.\d+)?)\s*ms", text.strip())
        if match is None:
            raise ConfigError(f"link: expected a rate and a round trip, such as 20Mbit/40ms, got {text!r}")
        units = {"k": 1e3, "M": 1e6, "G": 1e9}
        up = float(match[1]) * units[match[2]]
        down = float(match[3]) * units[match[4]] if match[3] else up
        if not (up > 0 and down > 0):
            raise ConfigError(f"link: expected rates above 0, got {text!r}")
        return Link(up, down, float(match[5]) / 1000)

    def seconds(self, up: float, down: float) -> tuple[float, float]:
        """Seconds for so many bytes of frames in each direction."""
        return 8 * PACKET_OVERHEAD * up / self.up, 8 * PACKET_OVERHEAD * down / self.down


@dataclass(frozen=True)
class Step:
    """Seconds of a batch.

    Attributes:
        client: until its activations are there to be encoded.
        encode: of the activations, by the client.
        rest: of the client, once gradients come.
        server: from a frame to the answer.
    """

    client: float = 0.0
    encode: float = 0.0
    rest: float = 0.0
    server: float = 0.0


Steps = Mapping[Exchange, Step]


def measured(halves: Halves, load: Load, task: Task, budget: float = 1.0) -> Steps:
    """Seconds of a batch in each kind of epoch, of both halves in this process: the least of some epochs.

    Args:
        budget: seconds after which it ends, if every kind of epoch was measured.
    """
    inputs, labels = load.first
    data = [ClientData(Outline(inputs, labels, BATCHES * len(labels)))]
    exchanges = "A" + 20 * "ABC"
    method = replace(load.method, schedule=Stated(exchanges=exchanges), fleet=Fleet())
    training = replace(load.training, epochs=1 << 20, batch_size=len(labels), microbatches=1, evaluate_every=1 << 20)
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
    return {exchange: _least(steps) for exchange, steps in found.items()}


def _step(client: Mapping[str, float], server: Mapping[str, float]) -> Step:
    def each(seconds: Mapping[str, float], *phases: str) -> float:
        return sum(seconds.get(phase, 0.0) for phase in phases) / BATCHES

    return Step(
        each(client, "data", "client forward"),
        each(client, "encode"),
        each(client, "decode", "client backward"),
        sum(server.values()) / BATCHES,
    )


def _least(steps: list[Step]) -> Step:
    return Step(*(min(getattr(step, name) for step in steps) for name in ("client", "encode", "rest", "server")))


def of_device(steps: Steps, table: FlopTable, batch: int, values: int, gflops: float) -> Steps:
    """The same with a client that does so many GFLOP/s.

    Args:
        values: at the cut, of a sample.
    """
    forward, backward = table(batch)
    codec = OPERATIONS_PER_VALUE * batch * values / gflops / 1e9
    both = Step(forward / gflops / 1e9, codec, codec + backward / gflops / 1e9, steps[Exchange.BOTH].server)
    return {
        Exchange.BOTH: both,
        Exchange.ACTIVATIONS: replace(both, rest=0.0, server=steps[Exchange.ACTIVATIONS].server),
        Exchange.NONE: Step(server=steps[Exchange.NONE].server),
    }


@dataclass(frozen=True)
class Clock:
    """Seconds of the epochs of a run.

    Args:
        steps: of a batch of the usual size.
        evaluation: share of a B epoch's server step that evaluating a batch takes.
    """

    load: Load
    steps: Steps
    link: Link
    evaluation: float = 0.4

    def epoch(self, exchange: Exchange, up: float, down: float) -> float:
        """An epoch that sends so many bytes, evaluation aside."""
        step, load = self.steps[exchange], self.load
        if exchange is Exchange.NONE:
            return step.server * self._batches(load.samples, joint=True)
        clients = load.clients
        sizes = [sum(size * times for size, times in sizes.items()) for sizes in load.sizes]
        batches = [size / load.feeds[number][0].batch_size for number, size in enumerate(sizes)]
        shares = [size / sum(sizes) for size in sizes]
        spans = []
        for count, share in zip(batches, shares, strict=True):
            sent = self.link.seconds(up * share, down * share)
            one = self._both if exchange is Exchange.BOTH else self._up
            spans.append(one(step, count, sent))
        if isinstance(load.method.fleet.strategy, Sequential):
            return sum(spans)
        return max(max(spans), step.server * sum(batches)) + (clients - 1) * step.server

    def _both(self, step: Step, count: float, sent: tuple[float, float]) -> float:
        """Batches that wait for their gradients, in microbatches that overlap."""
        parts = self.load.training.microbatches
        stages = (step.client, step.encode, sent[0] / count, step.server, sent[1] / count, step.rest)
        cycle = self.link.round_trip + (sum(stages) + (parts - 1) * max(stages)) / parts
        return count * cycle + self.link.round_trip

    def _up(self, step: Step, count: float, sent: tuple[float, float]) -> float:
        """Batches that follow each other without waiting: the slowest stage decides."""
        stages = (step.client, step.encode, sent[0] / count, step.server)
        return sum(stages) + (count - 1) * max(stages) + self.link.round_trip

    def _batches(self, samples: int, joint: bool = False) -> float:
        size = self.load.feeds[0][0].batch_size
        joined = joint and self.load.clients > 1 and self.load.method.fleet.strategy.joint
        return samples / (size * self.load.clients if joined else size)

    def evaluated(self, up: float, down: float) -> float:
        """An evaluation that sends so many bytes; without any, what is stored is evaluated."""
        count = self._batches(sum(len(test) for _, test in self.load.feeds if test is not None))
        if not count:
            return 0.0
        step = self.steps[Exchange.ACTIVATIONS]
        scores = count * self.evaluation * step.server
        if not up:
            return scores
        decode = replace(step, server=step.encode)
        return self._up(decode, max(count, 1.0), self.link.seconds(up, down)) + scores
