"""The methods of few exchanges that studies hold against plain split learning: the best known at 100x, 250x and 500x.

The names are of 200 epochs, by the count of activations and gradients; a shorter run has the same exchanges and a
smaller ratio. What is found to be better replaces what is here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from cutlayer.method import Method
from cutlayer.schedule import Settle

FOUR_BITS = "int4+zstd"
VIEWS = 6
AT_ONCE = 1e-9
"""Fraction of a run at which the last B epoch would be, if they need not follow each other."""


def settled(both: int, activations: int, epochs: int) -> Method:
    """So many A epochs, in which the client's rate falls to zero, then so many B epochs; fewer in a run below 60.

    Six views of a sample are stored, from the last A epoch on, as the client half has nearly settled then.
    """
    both = _in_run_of(epochs, both)
    schedule = Settle(both=both, activations=_in_run_of(epochs, activations))
    return Method.of(schedule, FOUR_BITS, views=VIEWS, views_from=both - 1)


def gathered(both: int, activations: int, epochs: int) -> Method:
    """So many A epochs, then so many B epochs one after the other, whose views are all stored: no later one tells more
    than an early one, as the client half stands still, and the server has all of them from the start.
    """
    both, activations = _in_run_of(epochs, both), _in_run_of(epochs, activations)
    return Method.of(Settle(both=both, activations=activations, last=AT_ONCE), FOUR_BITS, views=activations)


def settled_once(both: int, epochs: int) -> Method:
    """So many A epochs, and one B: all that there is to send without augmentation, as the client half stands still."""
    return Method.of(Settle(both=_in_run_of(epochs, both), activations=1), FOUR_BITS)


def _in_run_of(epochs: int, exchanges: int) -> int:
    return max(1, round(exchanges * min(1.0, epochs / 60)))


FEW: dict[str, tuple[str, Callable[[int], Method]]] = {
    "few100": ("settle, 15 A + 33 B, 4 bits, 6 views", partial(settled, 15, 33)),
    "few250": ("settle, 5 A + 14 B, 4 bits, 6 views", partial(settled, 5, 14)),
    "few500": ("settle, 3 A + 5 B, 4 bits, 6 views", partial(settled, 3, 5)),
}
"""By name: the title in tables, and the method from the number of epochs."""
