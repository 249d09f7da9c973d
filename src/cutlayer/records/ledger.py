"""What a run costs: bytes of real frames, FLOPs of passes that ran, seconds by phase."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

from cutlayer.wire.frames import PackedFrame

Direction = Literal["up", "down"]
Item = TypeVar("Item")
TRAINING_KINDS = ("activations", "gradients", "labels", "control", "weights")


@dataclass(frozen=True)
class EpochCosts:
    """What one epoch cost.

    Attributes:
        bytes: by direction ("up", "down") and kind.
        flops: by party ("client", "server") and pass.
        seconds: by phase.
    """

    bytes: dict[str, dict[str, int]]
    flops: dict[str, dict[str, int]]
    seconds: dict[str, float]


class _Thread(threading.local):
    """The phases that a thread is in, the innermost last, and until when they are charged."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.mark = 0.0


class Ledger:
    """Costs of one epoch, to be read with `take`.

    Bytes are counted by direction ("up": client to server) and kind (see `PackedFrame.sizes`), FLOPs by party and pass,
    seconds by phase. A phase inside another is not counted twice: while it lasts, the outer one stands still. Phases of
    two threads at once count both. On CUDA the seconds of a phase are those the host spent in it.
    """

    def __init__(self) -> None:
        self._thread = _Thread()
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self._bytes: dict[str, dict[str, int]] = {"up": defaultdict(int), "down": defaultdict(int)}
        self._flops: dict[str, dict[str, int]] = {"client": defaultdict(int), "server": defaultdict(int)}
        self._seconds: dict[str, float] = defaultdict(float)

    def frame(self, direction: Direction, frame: PackedFrame) -> None:
        """Count a frame that crosses the wire."""
        for kind, size in frame.sizes():
            self._bytes[direction][kind] += size

    def flops(self, party: Literal["client", "server"], what: str, count: int) -> None:
        """Count FLOPs of a pass ("forward", "backward", "evaluation")."""
        self._flops[party][what] += count

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the time inside the block to this phase."""
        self._charge()
        self._thread.phases.append(name)
        try:
            yield
        finally:
            self._charge()
            self._thread.phases.pop()

    def each(self, name: str, items: Iterator[Item]) -> Iterator[Item]:
        """The items; the time that each takes to come is a phase's."""
        while True:
            with self.phase(name):
                item = next(items, None)
            if item is None:
                return
            yield item

    def _charge(self) -> None:
        thread, now = self._thread, time.perf_counter()
        if thread.phases:
            with self._lock:
                self._seconds[thread.phases[-1]] += now - thread.mark
        thread.mark = now

    def add(self, costs: EpochCosts) -> None:
        """Add FLOPs and seconds that another ledger's `take` returned. Bytes are counted where the wire ends, once."""
        for party, passes in costs.flops.items():
            for what, count in passes.items():
                self._flops[party][what] += count
        for name, spent in costs.seconds.items():
            self._seconds[name] += spent

    def training_bytes(self) -> int:
        """Bytes of training in both directions since the last `take`."""
        return sum(sizes[kind] for sizes in self._bytes.values() for kind in sizes if kind != "evaluation")

    def take(self) -> EpochCosts:
        """The costs since the last call; counting starts again from zero."""
        costs = EpochCosts(
            {direction: dict(sorted(kinds.items())) for direction, kinds in self._bytes.items()},
            {party: dict(sorted(passes.items())) for party, passes in self._flops.items()},
            {name: round(spent, 6) for name, spent in self._seconds.items()},
        )
        self._clear()
        return costs
