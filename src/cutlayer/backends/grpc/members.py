"""Who is of a run: since when, and who takes part in it no more. What is for good is written into its folder."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from cutlayer.backends.grpc.admission import Admission
from cutlayer.backends.grpc.claims import as_json, from_json
from cutlayer.backends.grpc.name_files import REVOKED
from cutlayer.errors import ConfigError, DamagedError, RefusedError
from cutlayer.records.admitted import Admitted, AdmittedClient
from cutlayer.records.noted import Noted
from cutlayer.wire.messages import Hello

log = logging.getLogger("cutlayer.server")


def known_from(begun: Sequence[str], saved: Sequence[Mapping[str, Any]], admitted: Admitted) -> dict[str, Hello]:
    """What is known of a run's clients, by name: from its newest checkpoint, and from those that were admitted since.

    Raises DamagedError if the checkpoint has clients that neither the run was begun with nor the record has.
    """
    came = {client.name: from_json(client.hello) for client in admitted.read()}
    if len(saved) > len(begun) + len(came):
        raise DamagedError(
            f"{admitted.file}: expected {len(saved) - len(begun)} clients, as the newest checkpoint has, got "
            f"{len(came)}; restore it"
        )
    return dict(zip(begun, map(from_json, saved), strict=False)) | came


class Members:
    """The clients of a run.

    A client that is admitted takes part in the epochs after so many, and has the next number: those that take part in
    an epoch are always the first so many. A client that is left out for good is let in no more, whether its certificate
    is revoked as well or not.

    Args:
        admitted: the record of those that were admitted.
        left_out: the record of those that take part no more.

    Attributes:
        names: of all clients, by number.
        epochs: how many are done.
        forgotten: those of which nothing is to stay stored, by number.
    """

    def __init__(self, admission: Admission, admitted: Admitted, left_out: Noted) -> None:
        self.admission, self.names, self.epochs = admission, admission.names, 0
        self._admitted, self._left_out, self._lock = admitted, left_out, threading.Lock()
        self._came = admitted.read()  # as on the disk, where no one else writes meanwhile; so are the reasons
        self._reasons: dict[str, str] = {}
        self._revoked: set[str] = set()
        self._bar()

    # --- who comes ---

    @property
    def grown(self) -> bool:
        """Whether anyone was admitted."""
        return bool(self._came)

    def count(self, epochs: int) -> int:
        """How many take part in the epoch after so many."""
        return len(self.admission.claims.run.names) + sum(client.since <= epochs for client in self._came)

    def newcomer(self) -> Hello | None:
        """Who is to be admitted now, if anyone; no one while epochs from before the last are trained again."""
        again = bool(self._came) and self.epochs < self._came[-1].since
        return None if again else self.admission.newcomers.first()

    def admit(self, hello: Hello) -> None:
        """A newcomer takes part from the coming epoch on. It is on the disk before the client hears of it."""
        client = AdmittedClient(hello.name, self.epochs, as_json(hello))
        self._admitted.add(client)
        self._came.append(client)
        self.admission.newcomers.admit(hello)
        log.warning("client %s was admitted after %d epochs", hello.name, self.epochs)

    # --- who goes ---

    @property
    def gone(self) -> set[int]:
        """Those that take part no more, by number."""
        return self.forgotten | {number for number, name in enumerate(self.names) if name in self._revoked}

    def leave_out(self, number: int, why: str) -> None:
        """Go on without a client for good."""
        with self._lock:
            self._left_out.add(self.names[number], f"{why}; after {self.epochs} epochs")
            self._bar()

    def leave(self, name: str) -> None:
        """A client leaves by itself, for good. From any thread; again, it changes nothing.

        Raises RefusedError if it cannot.
        """
        with self._lock:
            if name not in self.names:
                raise RefusedError(f"name: expected one of {self.names}, got {name!r}")
            if len(self.admission.hellos) < len(self.names):
                raise RefusedError(
                    "leave: there is no run to leave, it has not begun; whoever does not come is not in it"
                )
            gone, number = self.gone, self.names.index(name)
            if number in self.forgotten:
                return
            if gone | {number} == set(range(len(self.names))):
                raise RefusedError(f"client {name} is the last one of the run, which the server's operator ends")
            log.warning("client %s leaves the run", name)
            self._left_out.add(name, f"it left the run by itself, after {self.epochs} epochs")
            self._bar()

    def revoke(self, names: set[str]) -> None:
        """Let these in no more, nor any others in place of them that were revoked before. From any thread."""
        with self._lock:
            before, self._revoked = self._revoked, set(names)
            for name in before | names:
                if name in names:
                    self.admission.bar(name, REVOKED)
                elif name in self._reasons:  # and stays so, whether it was revoked as well or not
                    self.admission.bar(name, self._reasons[name])
                else:
                    self.admission.barred.pop(name, None)

    def _bar(self) -> None:
        """Let those in no more that left_out.json names."""
        reasons = self._reasons = self._left_out.read()
        self.forgotten = {number for number, name in enumerate(self.names) if name in reasons}
        if len(self.forgotten) == len(self.names):
            raise ConfigError(f"all clients of the run are left out, as {self._left_out.file} says")
        for number in self.forgotten:
            if self.names[number] not in self._revoked:
                self.admission.bar(self.names[number], reasons[self.names[number]])

    def said(self) -> list[str]:
        """Who came and who went, for the run's manifest."""
        came = [
            f"after {each.since} epochs: client {each.name} was admitted, with {each.hello['samples']} samples and "
            f"{each.hello['test_samples']} test samples; scores count these from then on"
            for each in self._came
        ]
        return [*came, *(f"client {name} takes part no more: {why}" for name, why in self._reasons.items())]
