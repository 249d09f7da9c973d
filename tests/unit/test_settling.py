"""The client half's learning rate over its own updates, if the schedule lets it settle."""

import math

import pytest
import torch

from cutlayer import CustomOptimizer, Fleet, Method, Settle, Training, fit
from cutlayer.errors import RefusedError
from cutlayer.schedule import Fixed
from cutlayer.wire.frames import Frame, pack, read
from cutlayer.wire.messages import Plan
from tests.helpers.small import data, halves


class Watched(torch.optim.SGD):
    """Writes down the rate of every update."""

    rates: list[float]

    def __init__(self, parameters, rates: list[float]) -> None:
        self.rates = rates
        super().__init__(parameters, 0.1)

    def step(self, closure=None) -> None:
        self.rates.append(self.param_groups[0]["lr"])
        super().step(closure)


def rates(schedule, sizes: tuple[int, ...] = (24,), **more: object) -> list[float]:
    found: list[float] = []
    client = CustomOptimizer(lambda parameters: Watched(parameters, found), lambda epoch, epochs: 1 - epoch / epochs)
    server = CustomOptimizer(lambda parameters: torch.optim.SGD(parameters, 0.1))
    training = Training(epochs=6, batch_size=8, client=client, server=server, **more)
    fit(halves(), data(sizes), method=Method(schedule, fleet=Fleet()), training=training)
    return found


@pytest.mark.parametrize("more", [{}, {"microbatches": 2}])
def test_it_falls_to_zero_update_by_update(more: dict) -> None:
    """Two A epochs of three updates: six on half a cosine, whatever the optimizer says of epochs."""
    found = rates(Settle(both=2, activations=1), **more)
    assert found == pytest.approx([0.05 * (1 + math.cos(math.pi * update / 6)) for update in range(6)])


def test_each_client_counts_its_own() -> None:
    found = rates(Settle(both=1, activations=1), (24, 16))
    expected = [0.05 * (1 + math.cos(math.pi * update / steps)) for steps in (3, 2) for update in range(steps)]
    assert sorted(found) == pytest.approx(sorted(expected))


def test_otherwise_it_follows_the_epochs() -> None:
    assert rates(Fixed(exchanges="AAB")) == pytest.approx([0.1] * 3 + [0.1 * 5 / 6] * 3)


@pytest.mark.parametrize("wrong", [(-0.1, 0.5), (0.5, 1.1), (math.nan, 1.0)])
def test_a_server_that_names_a_rate_beyond_its_bounds_is_refused(wrong: tuple[float, float]) -> None:
    with pytest.raises(RefusedError, match="header cannot be read"):
        read(pack(Frame(Plan(0, 1, "A", settling=wrong))))
