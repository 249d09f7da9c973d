"""The backend on a Ray cluster, with the cluster joined or begun."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from cutlayer.backends.base import TrustedClients
from cutlayer.backends.client_data import ClientData
from cutlayer.backends.ray.options import RayOptions
from cutlayer.errors import ConfigError
from cutlayer.method import Method, Training
from cutlayer.records.ledger import Ledger


@dataclass(frozen=True, kw_only=True)
class Ray(RayOptions):
    """Clients are actors on a Ray cluster: `fit(..., backend=Ray())`. Frames, weights and costs are as in one process.

    Attributes: as in `RayOptions`.
    """

    def open(
        self, half: nn.Module, data: Sequence[ClientData], method: Method, training: Training, ledger: Ledger
    ) -> TrustedClients:
        """As in `Backend`. Raises ConfigError if there is no such cluster, or it has no room."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anyone
        try:
            import ray
        except ModuleNotFoundError:
            raise ConfigError("the backend ray needs Ray: pip install 'cutlayer[ray]'") from None
        from cutlayer.backends.ray.clients import RayClients

        own = not ray.is_initialized()
        if own:
            try:
                ray.init(self.address, include_dashboard=False if self.address is None else None)
            except ConnectionError as error:
                raise ConfigError(
                    f"address {self.address!r}: no Ray cluster there; begin one with `ray start --head` ({error})"
                ) from None
        try:
            clients = RayClients(self, half, data, method, training, ledger)
        except BaseException:
            if own:
                ray.shutdown()
            raise
        clients.shut_down = own
        return clients
