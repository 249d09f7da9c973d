"""Slots for connections that have no session yet: so many for each client, so many for all strangers together.

Who opens streams and says nothing uses up its own slots alone. A stream without a slot is refused at once.
"""

from __future__ import annotations

import heapq
import itertools
import resource
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from cutlayer.backends.grpc.limits import ClientLimits
from cutlayer.errors import ConfigError, RefusedError

SPARE = 8
"""Threads beside those that clients and strangers can take up: they refuse, and answer for health and config."""
OWN_DESCRIPTORS = 128
"""Of the process itself: its files, checkpoints, gRPC's own."""
MOST_BUCKETS = 1024


class Busy(RefusedError):  # noqa: N818
    """There is no slot for a connection at the moment."""


class Slots:
    """Who may begin a connection.

    Args:
        members: names of the run's clients.
        named: whether connections show whose they are, by TLS. If not, all of them share all slots.
        room: for clients that may be admitted later.
    """

    def __init__(self, members: Collection[str], limits: ClientLimits, *, named: bool, room: int = 0) -> None:
        self.members, self.limits, self.most = frozenset(members), limits, len(members) + room
        self._named = named
        self._taken: Counter[str] = Counter()
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def threads(self) -> int:
        """Threads for all streams that may be open, and some to refuse others."""
        return self.most * (1 + self.limits.streams) + self.limits.strangers + SPARE

    @property
    def _shared(self) -> int:
        """Slots for all who are not known by name: all that there are, if nobody is."""
        return self.limits.strangers + (0 if self._named else len(self.members) * self.limits.streams)

    def add(self, names: Collection[str]) -> None:
        """These are members, too. Raises ConfigError if there is no room for them."""
        if len(members := self.members | set(names)) > self.most:
            raise ConfigError(
                f"admit: expected at most {self.most} clients in this process of the server, got {len(members)}; start "
                "it again for more"
            )
        self.members = members

    @contextmanager
    def slot(self, who: str) -> Iterator[None]:
        """Inside the block a stream without a session has a slot. Raises Busy if there is none.

        Args:
            who: the name in the certificate; without TLS the address.
        """
        member = who in self.members
        key, most = (who, self.limits.streams) if member else ("", self._shared)
        with self._lock:
            if not self._attempt(who):
                raise Busy(f"{who}: expected at most {self.limits.attempt_rate:g} connections a second")
            if self._taken[key] >= most:
                of = f"client {who}" if member else "those that are not of this run"
                raise Busy(f"{who}: {of} may have {most} connections that have not begun a session, not more")
            self._taken[key] += 1
        try:
            yield
        finally:
            with self._lock:
                self._taken[key] -= 1

    def _attempt(self, who: str) -> bool:
        """Whether this identity, or address, may begin a connection now; a bucket of tokens for each."""
        now, limits = time.monotonic(), self.limits
        tokens, since = self._buckets.pop(who, (float(limits.attempts), now))
        tokens = min(float(limits.attempts), tokens + (now - since) * limits.attempt_rate)
        self._buckets[who] = (tokens - 1 if tokens >= 1 else tokens, now)
        if len(self._buckets) > MOST_BUCKETS:  # the one that was used least recently
            self._buckets.popitem(last=False)
        return tokens >= 1


class Deadlines:
    """Calls that are due at a time unless they are taken back: one thread for all of them."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int]] = []
        self._calls: dict[int, Callable[[], object]] = {}
        self._numbers = itertools.count()
        self._condition = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="cutlayer-deadlines", daemon=True)
        self._thread.start()

    @contextmanager
    def within(self, seconds: float, call: Callable[[], object]) -> Iterator[None]:
        """Make the call unless the block ends within so many seconds."""
        with self._condition:
            number = next(self._numbers)
            self._calls[number] = call
            heapq.heappush(self._due, (time.monotonic() + seconds, number))
            self._condition.notify()
        try:
            yield
        finally:
            with self._condition:
                self._calls.pop(number, None)
                if len(self._due) > 64 + 2 * len(self._calls):  # most of them taken back
                    self._due = [each for each in self._due if each[1] in self._calls]
                    heapq.heapify(self._due)

    def close(self) -> None:
        """End the thread."""
        with self._condition:
            self._closed = True
            self._condition.notify()
        self._thread.join(5.0)

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._closed and (not self._due or self._due[0][0] > time.monotonic()):
                    self._condition.wait(self._due[0][0] - time.monotonic() if self._due else None)
                if self._closed:
                    return
                call = self._calls.pop(heapq.heappop(self._due)[1], None)
            if call is not None:
                call()


def descriptors_for_strangers(clients: int) -> int:
    """Connections that may be open at a time, of all kinds, so that the process has descriptors left for its files.

    Takes as many descriptors as the system allows. Raises ConfigError if they are too few for the clients.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    most = min(hard if hard != resource.RLIM_INFINITY else 1 << 16, 1 << 16) - OWN_DESCRIPTORS
    if (needed := 4 * clients + SPARE) > most:
        raise ConfigError(
            f"descriptors: {clients} clients need {needed} beside the process's own {OWN_DESCRIPTORS}, the system "
            f"allows {hard}; raise the limit (ulimit -n, LimitNOFILE)"
        )
    return most
