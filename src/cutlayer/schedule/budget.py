"""What may be spent is given; which epochs exchange follows from it, and from the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cutlayer.errors import ConfigError
from cutlayer.schedule.base import NOTHING, Cost, Exchange, Outlook, Schedule, State, check_loss
from cutlayer.schedule.settle import check_last


@dataclass(frozen=True, kw_only=True)
class Budget(Schedule):
    """As many A and B epochs as a budget pays for. The run's ledger ends at or below it.

    A share of the budget goes to A epochs at the start, in which the client's learning rate falls to zero (see
    `Settle`); the rest to B epochs, the first of which follows at once. From then on the loss decides when: a B epoch
    comes if an epoch's loss fell by less than `threshold`, which is the `plateau` reading of Chen, Li and Chakrabarti
    (SiPS 2021, arXiv 2107.09786), but not before half of an even distance to the last, and at the latest after a whole
    one. An epoch is chosen only if the most that it may cost is left; what it did cost, which a lossless stage makes
    less, is counted.

    Attributes:
        megabytes: of all training frames in both directions, in 10^6 bytes; None for no limit. Evaluation, and epochs
            that are trained again after a failure, are not counted.
        client_gflops: of the clients' training, forward and backward, in 10^9 FLOPs; None for no limit.
        share: fraction of the budget that is for A epochs.
        threshold: the fall of the loss in an epoch for which it pays to go on with what is stored.
        last: the last B epoch, as a fraction of the run, as in `Settle`.
    """

    megabytes: float | None = None
    client_gflops: float | None = None
    share: float = 0.5
    threshold: float = 0.01
    last: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        limits = [limit for limit in (self.megabytes, self.client_gflops) if limit is not None]
        if not limits or not all(limit > 0 for limit in limits):
            raise ConfigError(
                f"budget: expected megabytes, client_gflops or both, above 0, got {self.megabytes} and "
                f"{self.client_gflops}"
            )
        if not 0 < self.share <= 1:
            raise ConfigError(
                f"share: expected the fraction of the budget that is for A epochs, up to 1, got {self.share}"
            )
        if not self.threshold >= 0:
            raise ConfigError(f"threshold must be a number of at least 0, got {self.threshold!r}")
        check_last(self.last)

    def for_run(self, outlook: Outlook) -> Spending:
        """This budget in a run with these costs. Raises ConfigError if it pays for less than an A and a B epoch."""
        spending = Spending(warmup=self.warmup, budget=self, outlook=outlook)
        both, activations = outlook.most
        least = both + activations if outlook.epochs > 1 else both
        if not spending.pays(least, NOTHING):
            raise ConfigError(
                f"budget: {_amounts(*spending.limits)} do not pay for the first epochs, an A and a B, which take up to "
                f"{_amounts(least.bytes, least.flops)}: give more, or choose fewer bits, a later cut or fewer samples"
            )
        return spending

    def rule(self, state: State, loss: float) -> Exchange:
        """Not known without the run's costs."""
        raise ConfigError("Budget depends on what epochs of a run cost: ask for_run(Outlook(...)) first")


@dataclass(frozen=True, kw_only=True)
class Spending(Schedule):
    """A budget in a run whose costs are known."""

    budget: Budget
    outlook: Outlook

    @property
    def limits(self) -> tuple[float, float]:
        """Bytes and FLOPs that may be spent; infinite for no limit."""
        megabytes, gflops = self.budget.megabytes, self.budget.client_gflops
        return math.inf if megabytes is None else megabytes * 1e6, math.inf if gflops is None else gflops * 1e9

    def pays(self, more: Cost, spent: Cost, part: float = 1.0) -> bool:
        """Whether a part of the budget pays for some more beside what was spent."""
        total = spent + more
        return total.bytes <= part * self.limits[0] and total.flops <= part * self.limits[1]

    def affords(self, state: State) -> bool:
        """As in `Schedule`. With an A epoch, for the B epoch as well that is to follow it."""
        both, activations = self.outlook.most
        if state.exchange is Exchange.BOTH:
            activations = both + (activations if self.outlook.epochs - state.epoch > 1 else NOTHING)
        return self.pays(activations, state.spent[0] + state.spent[1])

    def start(self) -> State:
        """The state of the first epoch, which is A."""
        return State(settling=self._settling(0, 0.0, (NOTHING, NOTHING)))

    def next(self, state: State, loss: float, spent: Cost = NOTHING) -> State:
        """As in `Schedule`."""
        check_loss(state, loss)
        epoch, (both, activations) = state.epoch + 1, state.spent
        if state.exchange is Exchange.BOTH:
            both += Cost(spent.bytes, spent.flops, 1)
        else:  # in a C epoch hardly anything crosses, but it counts
            activations += Cost(spent.bytes, spent.flops, int(state.exchange is Exchange.ACTIVATIONS))
        so_far = both, activations
        exchanged = state.exchanged if state.exchange is Exchange.NONE else state.epoch
        settling = None
        if state.exchange is Exchange.BOTH:
            settling = self._settling(epoch, state.settling[1] if state.settling else 0.0, so_far)
        if settling is not None:
            return State(Exchange.BOTH, epoch, loss, settling, exchanged=exchanged, spent=so_far)
        stalled = state.reference - loss < self.budget.threshold
        exchange = Exchange.ACTIVATIONS if self._renews(epoch, exchanged, stalled, so_far) else Exchange.NONE
        return State(exchange, epoch, loss, exchanged=exchanged, spent=so_far)

    def rule(self, state: State, loss: float) -> Exchange:
        """As `next` says."""
        return self.next(state, loss).exchange

    def _settling(self, epoch: int, fallen: float, spent: tuple[Cost, Cost]) -> tuple[float, float] | None:
        """From where to where the client's rate falls in this epoch if it is A; None if it is not.

        Args:
            epoch: its number.
            fallen: how far the rate has fallen before it.
            spent: on A and on B epochs.
        """
        most, most_of_b = self.outlook.most
        left = self.outlook.epochs - epoch
        following = most_of_b if left > 1 else NOTHING
        if left < 1 or not self.pays(most + following, spent[0] + spent[1]):
            return None
        each = self._expected(spent)[0]
        more = min(
            _times(self.budget.share * limit - done, price)
            for limit, done, price in zip(
                self.limits, (spent[0].bytes, spent[0].flops), (each.bytes, each.flops), strict=True
            )
        )
        count = min(left, max(more, self.warmup - epoch))
        return (fallen, 1.0 if count == 1 else fallen + (1 - fallen) / count) if count >= 1 else None

    def _renews(self, epoch: int, exchanged: int, stalled: bool, spent: tuple[Cost, Cost]) -> bool:
        """Whether an epoch that is not A is B."""
        total, most = spent[0] + spent[1], self.outlook.most[1]
        last = min(max(round(self.budget.last * self.outlook.epochs), spent[0].epochs), self.outlook.epochs - 1)
        if epoch > last or not self.pays(most, total):
            return False
        if spent[1].epochs == 0:  # there is nothing yet to learn from alone
            return True
        each = self._expected(spent)[1]
        left = (self.limits[0] - total.bytes, each.bytes), (self.limits[1] - total.flops, each.flops)
        count = max(1, min(_times(amount, price) for amount, price in left))
        distance = (last - exchanged) / count
        waited = epoch - exchanged
        return waited >= distance - 1e-9 or (stalled and 2 * waited >= distance)

    def _expected(self, spent: tuple[Cost, Cost]) -> tuple[Cost, Cost]:
        """What an A and a B epoch are expected to cost: as much as those so far, and at the start the most."""
        both, activations = self.outlook.most
        if spent[0].epochs:
            seen = Cost(_mean(spent[0].bytes, spent[0].epochs), _mean(spent[0].flops, spent[0].epochs))
            # What a lossless stage made of one's bytes it will make of the other's.
            ratio = seen.bytes / both.bytes if both.bytes else 1.0
            both, activations = seen, Cost(math.ceil(activations.bytes * ratio), activations.flops)
        if spent[1].epochs:
            activations = Cost(_mean(spent[1].bytes, spent[1].epochs), _mean(spent[1].flops, spent[1].epochs))
        return both, activations


def _mean(total: int, count: int) -> int:
    return -(-total // count)


def _times(amount: float, price: int) -> int:
    """How often an amount pays a price; a number beyond all epochs if it is infinite or nothing is to be paid."""
    return int(amount // price) if price > 0 and math.isfinite(amount) else 1 << 30


def _amounts(size: float, flops: float) -> str:
    parts = [f"{size / 1e6:.6g} MB"] if math.isfinite(size) else []
    return " and ".join([*parts, *([f"{flops / 1e9:.6g} GFLOP"] if math.isfinite(flops) else [])])
