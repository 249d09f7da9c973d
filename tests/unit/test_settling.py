"""The client half's learning rate over its own updates, if the schedule lets it settle."""

import math

import pytest
import torch

from cutlayer import CustomOptimizer, Fleet, Method, Settle, Training, fit, with_choices
from cutlayer.errors import ConfigError, RefusedError
from cutlayer.runs.recipes import digits
from cutlayer.schedule import Fixed
from cutlayer.training.halves import TrainedHalf
from cutlayer.wire.frames import Frame, pack, read
from cutlayer.wire.messages import Plan
from tests.helpers.small import data, equal, halves


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


class Remembering(torch.optim.SGD):
    """Remembers the weights after every update."""

    def __init__(self, parameters, seen: list[list[torch.Tensor]]) -> None:
        self.seen = seen
        super().__init__(parameters, 0.1)

    def step(self, closure=None) -> None:
        super().step(closure)
        self.seen.append([parameter.detach().clone() for parameter in self.param_groups[0]["params"]])


def remembered(averaged: float, sizes: tuple[int, ...] = (24,), **more: object):
    """The client half at the end, and each client's weights after each of its updates."""
    seen: list[list[list[torch.Tensor]]] = []

    def make(parameters):
        seen.append([])
        return Remembering(parameters, seen[-1])

    server = CustomOptimizer(lambda parameters: torch.optim.SGD(parameters, 0.1))
    training = Training(epochs=4, batch_size=8, client=CustomOptimizer(make), server=server, **more)
    method = Method(Settle(both=2, activations=1, averaged=averaged), fleet=Fleet())
    result = fit(halves(), data(sizes), method=method, training=training)
    return list(result.halves.client.parameters()), [updates for updates in seen if updates]


@pytest.mark.parametrize(("averaged", "last"), [(0.5, 3), (0.2, 1), (1.0, 6), (0.01, 0)])
@pytest.mark.parametrize("more", [{}, {"microbatches": 2}])
def test_the_mean_of_the_last_weights_stands_still(averaged: float, last: int, more: dict) -> None:
    """Two A epochs of three updates. With a part below one update, nothing is averaged."""
    half, (updates,) = remembered(averaged, **more)
    assert len(updates) == 6
    for got, *values in zip(half, *updates[6 - max(1, last) :], strict=True):
        torch.testing.assert_close(got, torch.stack(values).mean(0))
    if last > 1:
        assert not torch.allclose(half[0], updates[-1][0], atol=1e-6), "the last weights differ from their mean"


def test_clients_share_the_mean_of_their_means() -> None:
    half, updates = remembered(0.5, (24, 16))
    assert [len(each) for each in updates] == [6, 4]
    means = [[torch.stack(values).mean(0) for values in zip(*each[len(each) // 2 :], strict=True)] for each in updates]
    for got, first, second in zip(half, *means, strict=True):
        torch.testing.assert_close(got, (24 * first + 16 * second) / 40)


def test_an_average_under_way_is_in_the_state() -> None:
    """Between the A epochs: the mean goes on from what was saved, to the same bits."""
    plan = Plan(0, 0, "A", settling=(0.0, 1.0), averaging=0.0)

    def trained() -> TrainedHalf:
        return TrainedHalf(halves().client, CustomOptimizer(lambda p: torch.optim.SGD(p, 0.1)), Training(epochs=2))

    def update(half: TrainedHalf, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        half.optimizer.zero_grad()
        half.half(torch.randn(4, 6, generator=draw)).square().sum().backward()
        half.update(plan, seed / 4)

    undisturbed, first, second = trained(), trained(), trained()
    for seed in range(4):
        update(undisturbed, seed)
    for seed in range(2):
        update(first, seed)
    second.load_state_dict(first.state_dict())
    for seed in range(2, 4):
        update(second, seed)
    for half in (undisturbed, second):
        assert half.average.updates == 4
        half.end(plan)
        assert half.average.updates == 0
    assert equal(second.half, undisturbed.half)


def test_other_averages_are_refused() -> None:
    for wrong in (-0.1, 1.5, math.nan, "a half"):
        with pytest.raises(ConfigError, match="averaged: expected a part"):
            Settle(averaged=wrong)
    with pytest.raises(RefusedError, match="header cannot be read"):
        read(pack(Frame(Plan(0, 1, "A", settling=(0, 1), averaging=1.5))))


@pytest.mark.parametrize("norm", ["eval", "train"])
def test_a_mean_of_weights_needs_statistics_that_are_measured_for_it(norm: str) -> None:
    for schedule in (Settle(averaged=0.5), Fixed(exchanges="AAB", settles=2, averaged=0.5)):
        with pytest.raises(ConfigError, match=f"expected norm_in_b 'calibrated', got '{norm}': the statistics"):
            Method(schedule, norm_in_b=norm)
    assert Method(Settle(), norm_in_b=norm).norm_in_b == norm
    base = with_choices(digits(), schedule="settle", norm_in_b=norm)
    with pytest.raises(ConfigError, match="expected norm_in_b 'calibrated'"):
        with_choices(base, averaged_updates=0.5)
    assert with_choices(base, averaged_updates=0.5, norm_in_b="calibrated").method.schedule.averaged == 0.5


@pytest.mark.parametrize("wrong", [(-0.1, 0.5), (0.5, 1.1), (math.nan, 1.0)])
def test_a_server_that_names_a_rate_beyond_its_bounds_is_refused(wrong: tuple[float, float]) -> None:
    with pytest.raises(RefusedError, match="header cannot be read"):
        read(pack(Frame(Plan(0, 1, "A", settling=wrong))))
