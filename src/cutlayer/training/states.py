"""What each epoch exchanges with whom: one state of the schedule for all clients, or a state for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Container, Iterable, Mapping
from typing import Any

from cutlayer.errors import ConfigError
from cutlayer.schedule import NOTHING, Budget, Cost, Exchange, Outlook, Schedule, State


class States:
    """The states of a run's schedule, of the epoch that comes or is under way.

    Args:
        schedule: moves them on.
        owners: how many clients have a state of their own; 0 if one from the loss over all is for all.
        frozen: whether the client half is. No gradients are of use to it, so every A epoch is a B epoch.

    Attributes:
        owing: clients that were admitted in the midst of the run and of which nothing is stored yet.
    """

    def __init__(self, schedule: Schedule, owners: int = 0, *, frozen: bool = False) -> None:
        self.schedule, self.frozen = schedule, frozen
        self.state = self._useful(schedule.start())
        self.own: list[State] = [self.state] * owners
        self.owing: set[int] = set()
        self._called: frozenset[int] = frozenset()

    def fit_to(self, outlook: Outlook) -> None:
        """Begin with the schedule as it is in a run with this outlook. Raises ConfigError if it cannot be followed."""
        if self.own and isinstance(self.schedule, Budget):
            raise ConfigError('a budget is for all clients together: expected state="shared", got "own"')
        self.schedule = self.schedule.for_run(outlook)
        self.state = self._useful(self.schedule.start())
        self.own = [self.state] * len(self.own)

    @property
    def epoch(self) -> int:
        """The epoch's number, from 0."""
        return self.state.epoch

    @property
    def scheduled(self) -> Exchange:
        """What the schedule has the epoch exchange; if clients differ, the most that any does."""
        return min((state.exchange for state in self.own), default=self.state.exchange)

    @property
    def exchange(self) -> Exchange:
        """What the epoch exchanges, with what clients send that are called."""
        return min(self.scheduled, Exchange.ACTIVATIONS) if self._called else self.scheduled

    def of(self, client: int) -> Exchange:
        """What the epoch exchanges with a client."""
        return Exchange.ACTIVATIONS if client in self._called else self.state_of(client).exchange

    def welcome(self, clients: Iterable[int]) -> None:
        """These take part from the coming epoch on.

        With a state of its own, a client begins as one that rests, so that its first epoch is B.
        """
        for client in clients:
            if self.own:
                self.own.append(State(Exchange.NONE, self.epoch))
            self.owing.add(client)

    def rest(self, client: int) -> None:
        """One takes part no more."""
        self.owing.discard(client)
        if self.own:
            self.own[client] = dataclasses.replace(self.own[client], exchange=Exchange.NONE)

    def call(self, clients: Collection[int]) -> frozenset[int]:
        """Have those of these clients that owe activations, and would rest in the coming epoch, send them in it.

        Nothing is stored of them, and in a schedule that is in its C epochs for good nothing ever would be. None is
        called if no budget is left for it. Returns those that are called.
        """
        if not self.schedule.affords(self.state):
            clients = ()
        resting = {client for client in clients if self.state_of(client).exchange is Exchange.NONE}
        self._called = frozenset(resting & self.owing)
        return self._called

    def each(self, clients: int) -> list[Exchange]:
        """What the epoch exchanges with each of so many clients."""
        return [self.of(client) for client in range(clients)]

    def letters(self, clients: int) -> str:
        """The exchanges of so many clients, by number, if they may differ."""
        return "".join(self.each(clients)) if self.own or self._called else ""

    def state_of(self, client: int) -> State:
        """A client's state, which may be that of all."""
        return self.own[client] if self.own else self.state

    def finish(self, loss: float, losses: Mapping[int, float], absent: Container[int], spent: Cost = NOTHING) -> None:
        """Move on to the next epoch.

        Args:
            loss: mean training loss of the epoch that ends.
            losses: the same of single clients, if they have states of their own.
            absent: clients that did not do what was planned, and are to do it in the next epoch.
            spent: what the epoch cost.
        """
        self._called = frozenset()
        if not self.own:
            self.state = self._useful(self.schedule.next(self.state, loss, spent))
            return
        self.own = [
            self._useful(self.schedule.next(state, losses[client]))
            if client in losses and client not in absent
            else dataclasses.replace(state, epoch=state.epoch + 1)
            for client, state in enumerate(self.own)
        ]
        self.state = State(self.scheduled, self.epoch + 1, loss)

    def _useful(self, state: State) -> State:
        if self.frozen and state.exchange is Exchange.BOTH:
            return dataclasses.replace(state, exchange=Exchange.ACTIVATIONS)
        return state

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """The state of the schedule, and those of single clients as "own"; facts all of them."""
        owing = {"owing": sorted(self.owing)} if self.owing else {}
        return {**self.state.as_dict(), "own": [state.as_dict() for state in self.own], **owing}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.state = State.from_dict(state)
        self.own = [State.from_dict(own) for own in state.get("own", [])]
        self.owing, self._called = set(state.get("owing", ())), frozenset()
