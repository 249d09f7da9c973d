"""The clients of a run in actors, and what happens if one of these dies."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, ClassVar

import ray
import torch
from ray.exceptions import RayError
from torch import nn

from cutlayer.backends.base import TrustedClients
from cutlayer.backends.client_data import ClientData
from cutlayer.backends.group import store_name
from cutlayer.backends.ray.compact import compact
from cutlayer.backends.ray.group import Group
from cutlayer.backends.ray.handle import ActorHandle, descriptions_of
from cutlayer.backends.ray.options import RayOptions
from cutlayer.backends.ray.peer import RayPeer
from cutlayer.backends.ray.server import ParallelLearner, check_one_half
from cutlayer.backends.ray.stores import ClusterHalves, ClusterStore
from cutlayer.data.batches import Batches
from cutlayer.errors import ClientUnavailableError, ConfigError, CutlayerError, StateLostError
from cutlayer.method import Method, Training
from cutlayer.records.ledger import Ledger
from cutlayer.records.state_dicts import Store
from cutlayer.training.job import Job
from cutlayer.training.server import Server

log = logging.getLogger("cutlayer.backends.ray")


class RayClients(TrustedClients):
    """Clients divided among actors, the first to the first actor, the second to the second, and so on.

    Attributes:
        shut_down: whether to leave the cluster at the end; for whoever began it.
    """

    can_lose_state: ClassVar[bool] = True

    def __init__(
        self,
        chosen: RayOptions,
        half: nn.Module,
        data: Sequence[ClientData],
        method: Method,
        training: Training,
        ledger: Ledger,
    ) -> None:
        self.chosen, self.ledger, self.shut_down, self.restarts = chosen, ledger, False, 0
        self.group: Group | None = None
        self.handles: list[ActorHandle] = []
        if chosen.workers > 1:
            check_one_half(method, len(data))
        cpus = ray.cluster_resources().get("CPU", 1) - (
            chosen.cpus_per_worker * chosen.workers if chosen.workers > 1 else 0
        )
        room = int(cpus / chosen.cpus_per_actor) if chosen.cpus_per_actor else len(data)
        count = min(chosen.actors or max(1, room), len(data))
        shared = [ray.put(half), method, training, torch.get_num_threads()]
        options = {"num_cpus": chosen.cpus_per_actor, "num_gpus": chosen.gpus_per_actor, "max_restarts": 0}
        for place in range(count):
            numbers = range(place, len(data), count)
            own = ray.put({number: compact(data[number]) for number in numbers})
            self.handles.append(ActorHandle(numbers, options, [own, *shared], chosen.patience))
        try:
            self.descriptions = descriptions_of(self.handles, self._started(self.handles))
        except (ClientUnavailableError, StateLostError) as error:
            self._end_actors()
            raise ConfigError(f"an actor did not begin: {error}") from error
        except BaseException:
            self._end_actors()
            raise
        for number, description in enumerate(self.descriptions):
            if description.inputs != self.descriptions[0].inputs:
                self._end_actors()
                expected = self.descriptions[0].inputs
                got = description.inputs
                raise ConfigError(f"client {number}: expected samples {expected}, as the others', got {got}")
        self._peers = [RayPeer(number, self.handles[number % count], ledger) for number in range(len(data))]
        self._halves = ClusterHalves(self.handles)
        self.peers = self._peers
        self.stores: dict[str, Store] = {"clients": self._halves}
        self.describe(half, method.fleet, training.seed)
        self._tests: list[Batches] = []
        if all(held.tests_here for held in data):
            sizes = [summary.batch_size for summary in self.summaries]
            feeds = [h.test_feed(n, training, size) for n, (h, size) in enumerate(zip(data, sizes, strict=True))]
            self._tests = [feed for feed in feeds if feed is not None]
        for number, description in enumerate(self.descriptions):
            for name in description.stores:
                whole = store_name(name, number, len(data))
                self.stores[whole] = ClusterStore(self.handles[number % count], number, name)

    def _started(self, handles: Sequence[ActorHandle]) -> list[Any]:
        """Begin the actors of these handles, and wait until their clients are built."""
        references = [handle.start() for handle in handles]
        done, waiting = ray.wait(references, num_returns=len(handles), timeout=self.chosen.start_timeout)
        if waiting:
            raise ConfigError(
                f"{len(done)} of {len(handles)} actors began in {self.chosen.start_timeout:.0f} s; the cluster has "
                f"{ray.cluster_resources()}, each actor asks for {self.chosen.cpus_per_actor} CPUs and "
                f"{self.chosen.gpus_per_actor} GPUs: ask for fewer, or for less"
            )
        return references

    def server(self, job: Job, ledger: Ledger) -> Server:
        """A server that trains by itself, or with workers."""
        if self.chosen.workers == 1:
            return super().server(job, ledger)
        rows = job.method.views * sum(summary.samples for summary in self.summaries)
        options = {"num_cpus": self.chosen.cpus_per_worker, "num_gpus": self.chosen.gpus_per_worker}
        self.group = Group(
            self.chosen.workers, options, [rows, ray.put(job), torch.get_num_threads()], self.chosen.start_timeout
        )
        return Server(job, self.summaries, ledger, ParallelLearner(job, self.summaries, ledger, self.group))

    def begin(self) -> None:
        """With patience: make anew the actors that died, their clients as in the last checkpoint."""
        if self.chosen.patience is None:
            return
        pings = {handle.actor.ping.remote(): handle for handle in self.handles if not handle.dead}
        for reference in ray.wait(list(pings), num_returns=len(pings), timeout=1)[0]:
            try:
                ray.get(reference)
            except RayError:
                pings[reference].dead = True
        if dead := [handle for handle in self.handles if handle.dead]:
            self._count_restart(f"the actors of {' and of '.join(map(str, dead))} died")
            with suppress(ClientUnavailableError):  # the epoch goes on without them
                self._revive(dead)
                for handle in dead:
                    self._halves.load_actor(handle)

    def recover(self, reason: StateLostError | ClientUnavailableError) -> None:
        """Make anew the actors that died; what is on its way from the others is forgotten."""
        self._count_restart(str(reason))
        self._revive([handle for handle in self.handles if handle.dead])
        for peer in self._peers:
            peer.reset()
        if self.group is not None:
            self.group.restart()

    def _count_restart(self, reason: str) -> None:
        self.restarts += 1
        if self.restarts > self.chosen.restarts:
            raise CutlayerError(
                f"{reason}; that is more than {self.chosen.restarts} restarts: see why, or raise `restarts`"
            )

    def _revive(self, dead: Sequence[ActorHandle]) -> None:
        for handle in dead:
            log.warning("a new actor for %s", handle)
            handle.kill()
        if dead:
            descriptions_of(dead, self._started(dead))

    def collect(self) -> None:
        """FLOPs and seconds of the clients, added up."""
        for handle in self.handles:
            if (costs := handle.costs()) is not None:
                self.ledger.add(costs)

    def test_batches(self) -> list[Batches]:
        """Those that were given as data, not as functions."""
        return self._tests

    def load_half(self, half: nn.Module) -> None:
        """The first client's half."""
        handle = self.handles[0]
        half.load_state_dict(handle.get(handle.actor.weights.remote(0)))

    def close(self) -> None:
        """End the actors; those that live remove their files before."""
        with suppress(Exception):
            ray.wait([handle.actor.end.remote() for handle in self.handles], num_returns=len(self.handles), timeout=5)
        self._end_actors()
        self._halves.close()
        if self.shut_down:
            ray.shutdown()

    def _end_actors(self) -> None:
        if self.group is not None:
            self.group.kill()
        for handle in self.handles:
            handle.kill()
