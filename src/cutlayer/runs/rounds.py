"""The loop of a served run, begun anew from its checkpoint when other clients take part from some epoch on."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable

from cutlayer.backends.grpc.clients import GrpcClients
from cutlayer.errors import ConfigError, StoreFullError
from cutlayer.records.folder import RunFolder
from cutlayer.records.history import EpochRecord
from cutlayer.runs.loop import Loop

log = logging.getLogger("cutlayer.server")


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
        loop = self.loop  # another thread may ask, such as that of the metrics
        return loop.records if loop is not None else self._records

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
        newcomers, loop = self.clients.admission.newcomers, None
        try:
            loop = self._make()
        except (ConfigError, StoreFullError) as error:
            log.warning("client %s cannot be admitted: %s", newcomer.name, error)
            full = isinstance(error, StoreFullError)
            newcomers.turn_away(newcomer.name, "the server's store has no room for it" if full else str(error))
        if loop is not None and newcomers.waits(newcomer):
            self.clients.members.admit(newcomer)
            return loop
        # What was made with it goes before the disk and the memory are asked for the same again.
        loop = None
        self.clients.let_go()
        gc.collect()
        self.clients.group(epochs)
        return self._make()

    def drop_leavers(self, loop: Loop) -> None:
        """Of those that left in or after the last epoch nothing stays, either."""
        if self.clients.between_epochs():
            loop.save()
            self._note(loop)

    def _note(self, loop: Loop) -> None:
        """Have the run's manifest say who came and who went."""
        self.clients.members.epochs = len(loop.records)
        said = self.clients.members.said()
        if said != self._noted:
            self.folder.note(said, loop.baseline)
            self._noted = said
