"""The actor of some clients as the server's process sees it: how to call it, and what its death means."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from cutlayer.backends.description import ClientDescription
from cutlayer.backends.ray.actor import ClientActor
from cutlayer.errors import ClientUnavailableError, CutlayerError, StateLostError
from cutlayer.records.ledger import EpochCosts

log = logging.getLogger("cutlayer.backends.ray")


class ActorHandle:
    """A place on the cluster for some clients. If its actor dies, another takes the handle.

    Args:
        clients: their numbers.
        options: what the actor asks the cluster for.
        arguments: of `ClientActor.build`, as references to what lies in the cluster's memory.
        patience: as in `RayOptions`.

    Attributes:
        dead: whether the actor is known to have died.
        calls: counts those that change clients, so that a checkpoint knows whether it must ask for them.
    """

    def __init__(
        self, clients: Sequence[int], options: dict[str, Any], arguments: list[Any], patience: float | None
    ) -> None:
        self.clients, self.options, self.arguments, self.patience = list(clients), options, arguments, patience
        self.dead, self.calls = False, 0
        self._collected = 0

    def start(self) -> Any:
        """Begin an actor; a reference to the facts of its clients, which come once they are built."""
        make: Any = ray.remote(ClientActor)
        self.actor: Any = make.options(**self.options).remote()
        self.dead = False
        return self.actor.build.remote(*self.arguments)

    def get(self, references: Any, *, patient: bool = False) -> Any:
        """What the actor returns.

        Raises ClientUnavailableError if the run goes on without it, StateLostError if the run goes back; and what the
        client raised.
        """
        try:
            return ray.get(references, timeout=None if patient else self.patience)
        except GetTimeoutError:
            self._gone(f"nothing in {self.patience} s from the actor of {self}")
        except RayTaskError as error:
            if isinstance(error.cause, CutlayerError):
                raise error.cause from None
            raise
        except RayError as error:
            self.dead = True
            self._gone(f"the actor of {self} died: {str(error).splitlines()[0]}")

    def _gone(self, reason: str) -> NoReturn:
        if self.patience is None:
            raise StateLostError(reason)
        log.warning("%s; the epoch goes on without them", reason)
        raise ClientUnavailableError(reason)

    def costs(self) -> EpochCosts | None:
        """What was spent since the last call; None if nothing was, or the actor has died."""
        if self.calls == self._collected:
            return None
        self._collected = self.calls
        with suppress(ClientUnavailableError):
            return self.get(self.actor.costs.remote())
        return None

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Names and contents of the files with the clients' halves."""
        for reference in self.actor.state_dict.options(num_returns="streaming").remote():
            yield self.get(reference)

    def load_files(self, files: Iterable[tuple[str, bytes]]) -> None:
        """Bring the clients to what `files` gave."""
        for name, content in files:
            self.get(self.actor.stage.remote(name, content), patient=True)
        self.get(self.actor.load_state_dict.remote(), patient=True)

    def kill(self) -> None:
        """End the actor, if it lives."""
        with suppress(Exception):
            ray.kill(self.actor)

    def __str__(self) -> str:
        some = ", ".join(map(str, self.clients[:5]))
        return f"clients {some}{', ...' if len(self.clients) > 5 else ''}" if self.clients[1:] else f"client {some}"


def descriptions_of(handles: Sequence[ActorHandle], references: Sequence[Any]) -> list[ClientDescription]:
    """The facts of all clients, by number."""
    facts: dict[int, ClientDescription] = {}
    for handle, reference in zip(handles, references, strict=True):
        facts |= handle.get(reference, patient=True)
    return [facts[number] for number in sorted(facts)]
