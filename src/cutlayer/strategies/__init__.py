"""How several clients train one network together: strategies, named as in their publications, a file for each family.

A strategy is a frozen value with one function, the order of things in an A or a B epoch. It sees the clients as
participants (`protocols`): each gives its next batch of a step, or None at its end, and takes the answer. They are
asked in the order of the clients' numbers, never in the order in which they answer: the result does not depend on who
is faster.

| strategy | the server half sees | client halves |
|---|---|---|
| Sequential | one client after the other | handed on from client to client |
| SplitFedV1 | a half for each client, averaged | averaged |
| SplitFedV2 | clients in turns, batch by batch | averaged |
| ParallelSplit | one batch made of the clients' batches | averaged, after every step |

Averages are weighted by the samples trained on since the last one (FedAvg). Those of client halves are taken in A
epochs only, as nothing else trains them; those of server halves in all epochs. Optimizers are each client's own and are
not averaged. Batch norm's running statistics are averaged with the weights; a B epoch moves them only
under `norm_in_b="train"`, those of the client's copy, until the next weights come.
"""

from cutlayer.errors import ConfigError, unknown
from cutlayer.strategies.base import Averaging, Strategy
from cutlayer.strategies.parallel import ParallelSplit
from cutlayer.strategies.sequential import Sequential
from cutlayer.strategies.splitfed import SplitFedV1, SplitFedV2

__all__ = [
    "STRATEGIES",
    "Averaging",
    "ParallelSplit",
    "Sequential",
    "SplitFedV1",
    "SplitFedV2",
    "Strategy",
    "make_strategy",
]

STRATEGIES: dict[str, type[Strategy]] = {
    "sequential": Sequential,
    "splitfed_v1": SplitFedV1,
    "splitfed_v2": SplitFedV2,
    "parallel": ParallelSplit,
}


def make_strategy(name: str, average_every: int | None = None) -> Strategy:
    """The strategy of this name; with `average_every`, if it averages, or None for its default."""
    if name not in STRATEGIES:
        raise ConfigError(unknown("strategy", name, STRATEGIES))
    kind = STRATEGIES[name]
    if average_every is None:
        return kind()
    if not issubclass(kind, Averaging):
        raise ConfigError(f"strategy {name!r} averages nothing; leave average_every out")
    return kind(average_every=average_every)
