"""The server half that is trained: one for all clients, or one for each client, which are averaged."""

from __future__ import annotations

from torch import nn

from cutlayer.models.cut import copied
from cutlayer.training.averaging import Average
from cutlayer.training.halves import HalfPool, TrainedHalf
from cutlayer.training.job import Job


class ServerHalves:
    """The server's half and optimizer, or those for each client, if the strategy wants that.

    Attributes:
        main: the half for all clients; with one for each, their average.
        pool: the halves by client; None with one for all.
    """

    def __init__(self, job: Job, clients: int) -> None:
        method, training = job.method, job.training
        self.pool: HalfPool | None = None
        if clients > 1 and method.fleet.strategy.own_server_halves:
            options = {"owners": clients, "live": method.fleet.live, "folder": method.store.folder}
            self.pool = HalfPool(copied(job.half), training.server, training, **options)
        self.main = TrainedHalf(job.half, training.server, training)
        self._epoch = 0
        self._samples: dict[int, int] = {}
        """Samples that each client's own half was trained on since the last average, which it began with."""

    @property
    def half(self) -> nn.Module:
        """The half for all clients, or the average."""
        return self.main.half

    def begin(self, epoch: int) -> None:
        """Begin an epoch."""
        self.half.train()
        self.main.optimizer.begin(epoch)
        self._epoch = epoch
        self._samples.clear()

    def owner(self, client: int | None) -> int:
        """Whose half trains on this client's samples; 0 with one for all."""
        return client if self.pool is not None and client is not None else 0

    def of(self, client: int | None) -> TrainedHalf:
        """The half and optimizer that train on this client's samples."""
        if self.pool is None or client is None:
            return self.main
        own = self.pool.take(client)
        if client not in self._samples:
            self._samples[client] = 0
            own.half.load_state_dict(self.half.state_dict())
            own.optimizer.begin(self._epoch)
        own.half.train()
        return own

    def count(self, client: int | None, samples: int) -> None:
        """Count samples of a client that were trained on."""
        if client in self._samples:
            self._samples[client] += samples

    def average(self) -> None:
        """Put the average of the clients' own halves, by the samples they were trained on, in the place of `half`."""
        if self.pool is None:
            return
        average = Average()
        for client, samples in sorted(self._samples.items()):
            if samples:
                average.add(self.pool.take(client).half.state_dict(), samples)
        if average.weight:
            self.half.load_state_dict(average.take())
        self._samples.clear()
