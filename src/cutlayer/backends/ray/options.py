"""The choices of a run on a Ray cluster."""

from __future__ import annotations

from dataclasses import dataclass

from cutlayer.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RayOptions:
    """What a run asks of a Ray cluster.

    Attributes:
        address: the cluster's address, or "auto" for the one that this machine is part of; None for one on this machine
            alone, which begins and ends with the run (unless this process has connected to a cluster already).
        actors: processes that the clients are divided among; None for as many as the cluster has CPUs, at most one for
            each client.
        cpus_per_actor: CPUs that each of them asks the cluster for.
        gpus_per_actor: GPUs that each of them asks the cluster for; clients on a GPU need a share of one.
        workers: processes that train the server half together in B and C epochs; 1 for the server's own process alone.
        cpus_per_worker: CPUs that each worker asks the cluster for.
        gpus_per_worker: GPUs that each worker asks the cluster for.
        patience: seconds after which an epoch goes on without clients of which nothing comes, or that died; the result
            then depends on who was there in time. None waits for all, and takes the run back to its last checkpoint
            if an actor dies, to the same bits.
        restarts: how often in a run actors may be made again.
        start_timeout: seconds in which all actors must have begun.
    """

    address: str | None = None
    actors: int | None = None
    cpus_per_actor: float = 1
    gpus_per_actor: float = 0
    workers: int = 1
    cpus_per_worker: float = 1
    gpus_per_worker: float = 0
    patience: float | None = None
    restarts: int = 10
    start_timeout: float = 300

    def __post_init__(self) -> None:
        least = {"actors": 1, "workers": 1, "restarts": 0}
        least |= {f"{kind}_per_{of}": 0 for kind in ("cpus", "gpus") for of in ("actor", "worker")}
        for name, least_value in least.items():
            value = getattr(self, name)
            if value is not None and value < least_value:
                raise ConfigError(f"{name}: expected at least {least_value}, got {value}")
        if self.patience is not None and self.patience <= 0:
            raise ConfigError(f"patience: expected seconds above 0, or None, got {self.patience}")
