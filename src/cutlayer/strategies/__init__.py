"""Ways of working together, each named for its publication.

A strategy is a frozen value with one function, the order of things in an A or a B epoch. It sees the clients as
participants: each gives its next batch of a step, or None at its end, and takes the answer. They are asked in the
order of the clients' numbers, never in the order in which they answer: the result does not depend on who is faster.

| mode | the server half sees | client halves |
|---|---|---|
| Sequential | one client after the other | handed on from client to client |
| SplitFedV1 | a half for each client, averaged | averaged |
| SplitFedV2 | clients in turns, batch by batch | averaged |
| ParallelSplit | one batch made of the clients' parts | averaged, after every step |

Averages are weighted by the samples trained on since the last one (FedAvg). Those of client halves are taken in A
epochs only, as nothing else trains them; those of server halves in all epochs. Optimizers are each client's own and are
not averaged. Batch norm's running statistics are averaged with the weights; a B epoch moves those of the client's copy
only, until the next weights come.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from cutlayer.errors import ConfigError, RefusedBatchError, RefusedError, unknown

if TYPE_CHECKING:
    from cutlayer.training.participants import Participant
    from cutlayer.training.server import Server


@dataclass(frozen=True, kw_only=True)
class Strategy(ABC):
    """A way of working together."""

    joint: ClassVar[bool] = False
    """Whether the clients' parts of a step make one batch."""
    own_server_halves: ClassVar[bool] = False
    """Whether the server has a half for each client, to be averaged."""

    @property
    def share(self) -> int:
        """Steps after which clients share their weights, beside the end of the epoch; 0 for the end alone."""
        return 0

    @abstractmethod
    def train(self, server: Server, participants: Sequence[Participant]) -> None:
        """Train for an epoch with these participants, which are in the order of their clients' numbers."""


@dataclass(frozen=True, kw_only=True)
class Averaging(Strategy):
    """Base of the modes in which client halves are averaged.

    Attributes:
        average_every: steps of a client after which halves are averaged, beside the end of the epoch; None for the end
            alone.
    """

    average_every: int | None = None

    def __post_init__(self) -> None:
        if self.average_every is not None and self.average_every < 1:
            raise ConfigError(f"average_every: expected at least 1 step, or None, got {self.average_every}")

    @property
    def share(self) -> int:
        """As `average_every`."""
        return self.average_every or 0

    def rounds(
        self,
        server: Server,
        participants: Sequence[Participant],
        step: Callable[[Sequence[Participant]], list[Participant]],
    ) -> None:
        """Rounds in which `step` has each party that still has data train once; it returns those that had any."""
        for party in participants:
            party.begin()
        active, done = list(participants), 0
        while active:
            active = step(active)
            done += 1
            if active and server.share and done % server.share == 0:
                for party in active:
                    party.collect_weights()
                server.settle()
                active = [party for party in active if not party.finished]
                for party in active:
                    party.deliver_weights()
        server.settle()


@dataclass(frozen=True, kw_only=True)
class Sequential(Strategy):
    """One client after the other; each begins with the client half that the one before it ended with.

    Source: Gupta and Raskar, "Distributed learning of deep neural network over multiple agents" (Journal of Network and
    Computer Applications 116, 2018, arXiv 1810.06060). The weights go through the server.
    """

    def train(self, server: Server, participants: Sequence[Participant]) -> None:
        """All batches of a client, then all of the next."""
        for party in participants:
            party.begin()
            while _turn(server, party):
                pass
            server.settle()


@dataclass(frozen=True, kw_only=True)
class SplitFedV2(Averaging):
    """Clients take turns, batch by batch; the server half is updated after each, client halves are averaged.

    Source: Thapa et al., "SplitFed: When Federated Learning Meets Split Learning" (AAAI 2022, arXiv 2004.12088), V2.
    There a client's batches follow each other in a random order of clients; turns in a fixed order, as in public code
    of the authors of loss-based exchange, let all clients compute at the same time.
    """

    def train(self, server: Server, participants: Sequence[Participant]) -> None:
        """A batch of each client in turn, until all are at their end."""

        def step(active: Sequence[Participant]) -> list[Participant]:
            return [party for party in active if _turn(server, party)]

        self.rounds(server, participants, step)


@dataclass(frozen=True, kw_only=True)
class SplitFedV1(SplitFedV2):
    """As SplitFedV2, but the server has a half for each client.

    It averages them at the end of each epoch and after every `average_every` steps, whatever the epoch exchanges.

    Source: Thapa et al., as there, V1. The server half that is evaluated is the average.
    """

    own_server_halves: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class ParallelSplit(Averaging):
    """The clients' parts of a step make one batch, on which the server half is updated once.

    Each client gets the gradient of its own part's mean loss. With halves averaged after every step, and SGD, this
    equals training the uncut network on the whole batch, up to float addition (and but for the client's batch norm,
    which sees a part only): without momentum always, with momentum while the clients' shares of a step stay the same,
    as their momenta are not averaged.

    Source: Jeon and Kim, "Privacy-Sensitive Parallel Split Learning" (ICOIN 2020). There mini-batches have sizes in
    proportion to the clients' data; here all have the same, so those with fewer samples are at their end earlier.
    """

    joint: ClassVar[bool] = True
    average_every: int | None = 1

    def train(self, server: Server, participants: Sequence[Participant]) -> None:
        """One batch from all clients that have data left, until none has."""

        def step(active: Sequence[Participant]) -> list[Participant]:
            parts = {party: part for party in active if (part := party.part()) is not None}
            while parts:
                try:
                    replies = server.train(list(parts.values()))
                except RefusedBatchError as error:  # of one of them: it may send another in its place
                    whose = next(party for party, part in parts.items() if part is error.part)
                    whose.refuse(error)
                    if (part := whose.part()) is None:
                        del parts[whose]
                    else:
                        parts[whose] = part
                    continue
                for party, reply in zip(parts, replies, strict=True):
                    party.answer(reply)
                break
            return list(parts)

        self.rounds(server, participants, step)


def _turn(server: Server, party: Participant) -> bool:
    """A party's next step, with all its parts; whether it had one."""
    while (part := party.part()) is not None:
        try:
            (reply,) = server.train([part])
        except RefusedError as error:  # labels that the loss does not take
            party.refuse(error)
            continue
        party.answer(reply)
        if part.ends_step:
            return True
    return False


STRATEGIES: dict[str, type[Strategy]] = {
    "sequential": Sequential,
    "splitfed_v1": SplitFedV1,
    "splitfed_v2": SplitFedV2,
    "parallel": ParallelSplit,
}


def make_strategy(name: str, average_every: int | None = None) -> Strategy:
    """The strategy of this name; `average_every` if it has that, and None for its default."""
    if name not in STRATEGIES:
        raise ConfigError(unknown("strategy", name, STRATEGIES))
    kind = STRATEGIES[name]
    if average_every is None:
        return kind()
    if not issubclass(kind, Averaging):
        raise ConfigError(f"strategy {name!r} averages nothing; leave average_every out")
    return kind(average_every=average_every)
