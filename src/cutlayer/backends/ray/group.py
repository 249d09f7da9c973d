"""The server's workers as its process sees them: each call goes to all of them, in one order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from torch import Tensor

from cutlayer.backends.ray.worker import Samples, Worker
from cutlayer.errors import ConfigError, CutlayerError, StateLostError

AHEAD = 4
"""Steps that are given to the workers before the first of them is done; each holds its activations in memory."""


class Group:
    """Workers that train the server half together. If one dies, all are made anew.

    Args:
        world: how many.
        options: what each asks the cluster for.
        arguments: of `Worker.build`, after rank and world.
        timeout: seconds in which all must have begun.

    Attributes:
        broken: whether one has died, or the others may be waiting for one that failed.
    """

    def __init__(self, world: int, options: dict[str, Any], arguments: Sequence[Any], timeout: float) -> None:
        self.world, self.options, self.arguments, self.timeout = world, options, list(arguments), timeout
        self._calls: deque[list[Any]] = deque()
        self.workers: list[Any] = []
        self.start()

    def start(self) -> None:
        """Begin all workers, and have them meet."""
        make: Any = ray.remote(Worker)
        self.broken = False
        self.workers = [make.options(**self.options).remote() for _ in range(self.world)]
        built = [w.build.remote(rank, self.world, *self.arguments) for rank, w in enumerate(self.workers)]
        if ray.wait(built, num_returns=self.world, timeout=self.timeout)[1]:
            raise ConfigError(
                f"the server's {self.world} workers did not begin in {self.timeout:.0f} s; each asks for "
                f"{self.options}, the cluster has {ray.cluster_resources()}"
            )
        self.get(built)
        (place,) = self.get([self.workers[0].meet.remote(None)])
        self.get([worker.meet.remote(place) for worker in self.workers])

    def each(self, name: str, arguments: Callable[[int], tuple[Any, ...]]) -> list[Any]:
        """Call this method of every worker, with arguments by rank; references to what they return."""
        return [getattr(worker, name).remote(*arguments(rank)) for rank, worker in enumerate(self.workers)]

    def get(self, references: Sequence[Any]) -> list[Any]:
        """What was returned. Raises StateLostError if a worker has died, and otherwise what a worker raised."""
        waiting = list(references)
        try:
            while waiting:  # not all at once: if one fails, others wait for it in vain
                done, waiting = ray.wait(waiting)
                ray.get(done)
            return ray.get(list(references))
        except RayTaskError as error:
            self.broken = True
            if isinstance(error.cause, CutlayerError):
                raise error.cause from None
            raise
        except RayError as error:
            self.broken = True
            raise StateLostError(f"a worker of the server died: {str(error).splitlines()[0]}") from None

    def later(self, references: list[Any]) -> None:
        """Calls that return nothing; waits for earlier ones while there are too many."""
        self._calls.append(references)
        while len(self._calls) > AHEAD:
            self.get(self._calls.popleft())

    def wait(self) -> None:
        """Wait for all calls."""
        while self._calls:
            self.get(self._calls.popleft())

    def restart(self) -> None:
        """Forget the calls under way, and if a worker has died, make all anew, with nothing in their shards."""
        if not self.broken:
            with suppress(CutlayerError):
                self.wait()
        self._calls.clear()
        if self.broken:
            self.kill()
            self.start()

    def kill(self) -> None:
        """End the workers."""
        for worker in self.workers:
            with suppress(Exception):
                ray.kill(worker)

    # --- samples ---

    def samples_of(self, rank: int, samples: Samples) -> Samples | None:
        """A worker's share of samples, numbered as in its shard; None if it has none of them."""
        ids, encoded, labels = samples
        chosen = ids % self.world == rank
        if not chosen.any():
            return None
        shared = encoded.shared.expand(len(ids), -1)[chosen]
        own = type(encoded)(encoded.codec, encoded.shape, encoded.rows[chosen], shared)
        return ids[chosen] // self.world, own, labels[chosen]

    def ids_of(self, rank: int, ids: Tensor) -> Tensor:
        """A worker's share of ids, numbered as in its shard."""
        return ids[ids % self.world == rank] // self.world
