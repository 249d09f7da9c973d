"""How far a server goes back for a client that has lost its newest checkpoint, and how often.

Client and server each store a few checkpoints. If a client's newest is damaged, the client goes on from an older one:
the server goes back to the newest of its own that goes with one of the client's, and all train the epochs since then
again, to the same bits. As a client may say anything of its checkpoints, this happens a few times for each and no more.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from cutlayer.errors import DamagedError, RefusedError
from cutlayer.records.checkpoint import Checkpoints
from cutlayer.records.noted import Noted
from cutlayer.wire.messages import Hello

log = logging.getLogger("cutlayer.server")


class WayBack:
    """Whether a client's checkpoints go with the server's, and which of the server's do if the newest does not.

    Args:
        run: the run's id.
        checkpoints: the server's.
        most: times that the server goes back for one client.
        times: how often it has, by the client's name, also in earlier processes.

    Attributes:
        over: whether the run is at its end, so that no epoch is trained again.
    """

    def __init__(self, run: str, checkpoints: Checkpoints, most: int, times: Noted) -> None:
        self.run, self.most, self.over = run, most, False
        self._checkpoints, self._noted = checkpoints, times
        self._times = {name: int(count) for name, count in times.read().items() if count.isdecimal()}
        self._wanted: int | None = None

    def fits(self, number: int, hello: Hello, restore: int) -> bool:
        """Whether a client has its checkpoint after `restore` epochs; if not, the server is to go back for it.

        Raises RefusedError if the server does not.
        """
        if restore in hello.checkpoints and (restore == 0 or hello.run == self.run):
            return True
        lacks = (
            f"checkpoint: expected one of run {self.run} after {restore} epochs, the client has those "
            f"after {list(hello.checkpoints[:100])} epochs of run {hello.run[:32] or '(none)'}"
        )
        if restore == 0:  # as for one that was admitted later, if the operator went back to before: any run's will do
            raise RefusedError(f"{lacks}; give it an empty folder: it has nothing to go on from")
        if hello.run != self.run:
            raise RefusedError(f"{lacks}; give it the folder it had in this run, or an empty one and begin a new run")
        else_ = f"restore its folder, or go on without it: stop the server, cutlayer forget RUN --client {hello.name}"
        if self.over:
            raise RefusedError(f"{lacks}; the run is at its end, no epoch is trained again: restore its folder")
        own = self._checkpoints.states()
        if not (fitting := [epochs for epochs, state in own.items() if _took_part(state, number) in hello.checkpoints]):
            raise RefusedError(f"{lacks}; none of the server's, after {list(own)} epochs, goes with them: {else_}")
        times = self._times.get(hello.name, 0) + 1
        if times > self.most:
            raise RefusedError(f"{lacks}; the server went back for it {self.most} times and does no more: {else_}")
        self._noted.add(hello.name, str(times))
        self._times[hello.name] = times
        self._wanted = max(fitting)
        log.warning(
            "client %s has lost its checkpoint after %d epochs: the server goes back from the one after %d epochs to "
            "the one after %d (%d of at most %d times for this client)",
            hello.name,
            restore,
            max(own),
            self._wanted,
            times,
            self.most,
        )
        return False

    def epochs_before_exchange(self, took_part: Sequence[int]) -> list[int]:
        """The newest of the server's checkpoints from before the last exchange, in which clients saved theirs."""
        last = max(took_part, default=0)
        older = [epochs for epochs, state in self._checkpoints.states().items() if max(state["took_part"]) < last]
        return older[-1:]

    def take(self) -> None:
        """Make the checkpoint that is wanted, if there is one, the newest; the server then loads that."""
        wanted, self._wanted = self._wanted, None
        if wanted is None:
            return
        try:
            if wanted not in self._checkpoints.epochs() or self._checkpoints.read(wanted) is None:
                return
        except DamagedError as error:  # it stays where it was; the client is told when it comes again
            log.warning("not gone back further: %s", error)
            return
        self._checkpoints.prune(range(wanted + 1))


def _took_part(state: Mapping[str, Any], number: int) -> int:
    """After how many epochs of a checkpoint a client did something last; 0 for one that was admitted later."""
    return (*state["took_part"], *(0,) * number)[number]
