"""The link, and how long an epoch takes over it at a given pace."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from cutlayer.errors import ConfigError
from cutlayer.planning.load import Load
from cutlayer.planning.timing import Pace, Step
from cutlayer.schedule import Exchange
from cutlayer.strategies import Sequential

PACKET_OVERHEAD = 1.048
"""Bytes on a link for each byte of a frame: 66 of headers for 1,448 of data, and 0.2 % of HTTP/2 and TLS; measured in
benchmarks/results/link.md."""


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
class Clock:
    """Seconds of the epochs of a run.

    Args:
        pace: of batches of the usual size.
    """

    load: Load
    pace: Pace
    link: Link

    def epoch(self, exchange: Exchange, up: float, down: float, calibrated: int = 0) -> float:
        """An epoch that sends so many bytes, evaluation and checkpoint aside.

        Args:
            calibrated: batches on which a client measures batch norm's statistics.
        """
        step, load = self.pace.steps[exchange], self.load
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
        before = calibrated * step.client  # all clients at the same time
        if isinstance(load.method.fleet.strategy, Sequential):
            return before + sum(spans)
        return before + max(max(spans), step.server * sum(batches)) + (clients - 1) * step.server

    def _both(self, step: Step, count: float, sent: tuple[float, float]) -> float:
        """Batches that wait for their gradients, in microbatches that overlap."""
        microbatches = self.load.training.microbatches
        stages = (step.client, step.encode, sent[0] / count, step.server, sent[1] / count, step.rest)
        cycle = self.link.round_trip + (sum(stages) + (microbatches - 1) * max(stages)) / microbatches
        return count * cycle + self.link.round_trip

    def _up(self, step: Step, count: float, sent: tuple[float, float]) -> float:
        """Batches that follow each other without waiting: the slowest stage decides."""
        stages = (step.client, step.encode, sent[0] / count, step.server)
        return sum(stages) + (count - 1) * max(stages) + self.link.round_trip

    def _batches(self, samples: int, joint: bool = False) -> float:
        size = self.load.feeds[0][0].batch_size
        joined = joint and self.load.clients > 1 and self.load.method.fleet.strategy.joint
        return samples / (size * self.load.clients if joined else size)

    def evaluated(self, up: float, down: float, scored: bool) -> float:
        """Test activations of so many bytes that are sent, if any are, and are evaluated, if `scored`."""
        count = self._batches(sum(len(test) for _, test in self.load.feeds if test is not None))
        if not count:
            return 0.0
        step = self.pace.steps[Exchange.ACTIVATIONS]
        scores = count * step.evaluation if scored else 0.0
        if not up:
            return scores
        decode = replace(step, server=step.encode)
        return self._up(decode, max(count, 1.0), self.link.seconds(up, down)) + scores

    def saved(self, exchange: Exchange, store: int) -> float:
        """The checkpoint after an epoch: first the clients', then the server's.

        Args:
            store: bytes of the server's store, if the epoch changed it.
        """
        saving = self.pace.saving
        client = saving.client if exchange is not Exchange.NONE else 0.0
        return client + saving.server + saving.byte * store
