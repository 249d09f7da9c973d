"""The loop of a served run, begun anew from its checkpoint when other clients take part from some epoch on."""

from __future__ import annotations

import gc
from collections.abc import Callable

from cutlayer.backends.grpc.clients import GrpcClients
from cutlayer.errors import ConfigError, StoreFullError
from cutlayer.records.folder import RunFolder
from cutlayer.records.history import EpochRecord
from cutlayer.runs.loop import Loop


class Rounds:
    """A served run from its beginning, or its newest checkpoint, to its end.

    A client is admitted as a restart of the server would do it: a checkpoint is written, and loaded into a server of
    one client more, whose stores have rows for it behind those of the others. Only if that can be is the client noted
    as a member. The others stay connected and notice nothing.

    Args:
        make: the loop, with the clients that take part, at the newest checkpoint.
        folder: who came and went is noted in its manifest.

    Attributes:
        loop: of the round; None between two.
    """

    def __init__(self, clients: GrpcClients, folder: RunFolder, make: Callable[[], Loop]) -> None:
        self.clients, self.folder, self._make = clients, folder, make
        self.loop: Loop | None = None
        self._records: list[EpochRecord] = []
        self._noted: list[str] = []

    @property
    def records(self) -> list[EpochRecord]:
        """Of the epochs that are done."""
        return self.loop.records if self.loop is not None else self._records

    def train(self, listener: Callable[[EpochRecord], None]) -> Loop:
        """Train to the end; the loop that came to it."""
        loop = self.loop = self._make()
        while True:
            self._note(loop)
            if loop.ended:
                return loop
            loop.train([lambda record, loop=loop: self._note(loop), listener])
            if not loop.ended:
                self._records, self.loop = loop.records, None
                del loop
                loop = self.loop = self._regrouped()

    def _regrouped(self) -> Loop:
        """The loop with the clients of the coming epoch, with a newcomer if one waits."""
        self.clients.let_go()
        gc.collect()  # of a large store there is to be one only
        epochs, newcomer = len(self._records), self.clients.members.newcomer()
        self.clients.group(epochs, newcomer)
        if newcomer is None:
            return self._make()
        try:
            loop = self._make()
        except (ConfigError, StoreFullError) as error:
            self.clients.admission.newcomers.turn_away(newcomer.name, str(error))
            self.clients.group(epochs)
            return self._make()
        self.clients.members.admit(newcomer)
        return loop

    def _note(self, loop: Loop) -> None:
        """Have the run's manifest say who came and who went."""
        self.clients.members.epochs = len(loop.records)
        said = self.clients.members.said()
        if said != self._noted:
            self.folder.note(said, loop.baseline)
            self._noted = said
