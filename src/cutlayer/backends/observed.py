"""Clients in this process whose frames someone else sees, too: what a server, or a wire, is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from cutlayer.backends.base import TrustedClients
from cutlayer.backends.client_data import ClientData
from cutlayer.backends.local import LocalClients, LocalPeer
from cutlayer.method import Method, Training
from cutlayer.records.ledger import Ledger
from cutlayer.training.client import Client


class Observed:
    """All clients in this process, as `Local`, to the same bits.

    Args:
        listener: called with each frame that a client sends, in their order.
    """

    def __init__(self, listener: Callable[[bytes], object]) -> None:
        self.listener = listener

    def open(
        self, half: nn.Module, data: Sequence[ClientData], method: Method, training: Training, ledger: Ledger
    ) -> TrustedClients:
        """As in `Backend`."""
        return _OverheardClients(self.listener, half, data, method, training, ledger)


class _OverheardClients(LocalClients):
    def __init__(self, listener: Callable[[bytes], object], *given: Any) -> None:
        self.listener = listener
        super().__init__(*given)

    def peer(self, client: Client) -> LocalPeer:
        return _OverheardPeer(client, self.listener)


class _OverheardPeer(LocalPeer):
    def __init__(self, client: Client, listener: Callable[[bytes], object]) -> None:
        super().__init__(client)
        self.listener = listener

    def receive(self) -> bytes:
        frame = super().receive()
        self.listener(frame)
        return frame
