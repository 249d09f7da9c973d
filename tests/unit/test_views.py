"""Several stored views of a sample, and which of them a C epoch learns from."""

from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from cutlayer import (
    ConfigError,
    Drop,
    Fixed,
    Halves,
    Method,
    Optimizer,
    StoreFullError,
    StoreOptions,
    Task,
    Training,
    fit,
)
from cutlayer.memory.views import Views
from cutlayer.privacy.defence import Defence
from cutlayer.records.ledger import Ledger
from cutlayer.strategies.protocols import StepBatch
from cutlayer.training.checks import ClientSummary
from cutlayer.training.job import Job
from cutlayer.training.replay import Replay
from cutlayer.wire.messages import Step

SAMPLES = 12
SGD = Optimizer(lr=0.1, schedule="constant")


class Recording(nn.Module):
    """Writes down, in training, what each sample looks like when the server half gets it: its number and its view."""

    seen: ClassVar[list[dict[int, float]]] = []

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, activations: Tensor) -> Tensor:
        if self.training and activations.device.type != "meta":
            self.seen += [{round(sample): round(view, 4)} for sample, view in activations.tolist()]
        return self.linear(activations)


class Identity(nn.Module):
    """A client half that sends its input as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + 0 * self.weight


def numbered(inputs: Tensor, draw: torch.Generator) -> Tensor:
    """An augmentation that tells every view from every other."""
    return inputs + torch.stack([torch.zeros(len(inputs)), torch.rand(len(inputs), generator=draw)], 1)


def views_by_epoch(exchanges: str, seed: int = 0, **more: object) -> list[dict[int, float]]:
    """What was learned from in each epoch: a view of each sample."""
    inputs = torch.stack([torch.arange(SAMPLES).float(), torch.zeros(SAMPLES)], 1)
    method = Method(Fixed(exchanges=exchanges), **more)
    training = Training(
        epochs=len(exchanges), batch_size=5, client=SGD, server=SGD, augment=numbered, seed=seed, precision="fp32"
    )
    Recording.seen = []
    fit(
        Halves(Identity(), Recording()),
        TensorDataset(inputs, torch.arange(SAMPLES) % 2),
        method=method,
        training=training,
    )
    epochs = [Recording.seen[start : start + SAMPLES] for start in range(0, len(Recording.seen), SAMPLES)]
    return [{sample: view for each in epoch for sample, view in each.items()} for epoch in epochs]


def test_c_epochs_draw_among_the_last_views() -> None:
    first, *sent, replayed, again, newest, third = views_by_epoch("ABBBCCBC", views=2)
    for epoch in (replayed, again):
        assert all(epoch[sample] in (sent[1][sample], sent[2][sample]) for sample in range(SAMPLES))
        assert 0 < sum(epoch[sample] == sent[2][sample] for sample in range(SAMPLES)) < SAMPLES
    assert replayed != again
    assert all(third[sample] in (sent[2][sample], newest[sample]) for sample in range(SAMPLES))
    assert not any(first[sample] in replayed.values() for sample in range(SAMPLES))


def test_fewer_views_than_there_is_room_for() -> None:
    _, sent, replayed = views_by_epoch("ABC", views=5)
    assert replayed == sent


def test_the_seed_names_the_draw() -> None:
    assert views_by_epoch("ABBCC", views=2) == views_by_epoch("ABBCC", views=2) != views_by_epoch("ABBCC", 1, views=2)


def test_a_epochs_fill_the_store_from_an_epoch_on() -> None:
    first, second, replayed = views_by_epoch("AAC", views=3, views_from=1)
    assert replayed == second
    first, second, third, replayed = views_by_epoch("AABC", views=3, views_from=0)
    found = [[epoch[s] for epoch in (first, second, third)].index(replayed[s]) for s in range(SAMPLES)]
    assert set(found) == {0, 1, 2}
    with pytest.raises(ConfigError, match="no B epoch came before it"):
        views_by_epoch("AAC", views=3)


def test_with_one_view_the_newest_is_learned_from() -> None:
    *_, newest, replayed = views_by_epoch("ABBC")
    assert replayed == newest


def test_a_new_view_takes_the_place_of_the_oldest() -> None:
    views, ids = Views(4, 3), torch.tensor([1, 3])
    assert [views.written(ids).tolist() for _ in range(4)] == [[1, 3], [5, 7], [9, 11], [1, 3]]
    assert views.present(0, 4).tolist() == [1, 3]
    again = Views(4, 3)
    again.load_state_dict(views.state_dict())
    assert again.written(ids).tolist() == [5, 7]


def test_of_a_client_that_is_forgotten_no_view_stays() -> None:
    training = Training(epochs=1, batch_size=4, client=SGD, server=SGD)
    job = Job(nn.Linear(2, 2), (2,), Method(views=3), training, Task())
    replay = Replay(job, [ClientSummary(4, 0, 4), ClientSummary(2, 0, 4)], Ledger())
    for view in range(4):
        for client, count in enumerate((4, 2)):
            ids = torch.arange(count) + replay.offsets[client]
            values = torch.full((count, 2), view + 1.0)
            encoded = replay.codec.encode(values)
            replay.put(
                StepBatch(client, values, torch.ones(count, dtype=torch.int64), Step(client, 0, 0), ids, encoded)
            )
    replay.forget(0)
    assert not replay.has(0)
    assert replay.has(1)
    assert list(replay.batches(0, 0)) == []
    assert replay.magnitudes([0, 1]) == {1: 4.0}
    (left,) = replay.batches(0)
    assert left.activations.min() >= 2, "views of the client that stays"
    assert len(replay.store) == 2 * 3


def test_what_they_cost_is_known_before_training() -> None:
    more = {"store": StoreOptions("memory", memory_budget_mib=1)}
    halves = Halves(nn.Linear(2, 1000), nn.Linear(1000, 2))
    data = TensorDataset(torch.randn(200, 2), torch.arange(200) % 2)
    training = Training(epochs=1, client=SGD, server=SGD)
    fit(halves, data, method=Method(Drop(), views=1, **more), training=training)
    with pytest.raises(StoreFullError, match=r"the replay store with 2 views a sample of 400 samples .* takes 1.5 MiB"):
        fit(halves, data, method=Method(Drop(), views=2, **more), training=training)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"views": 0}, "views must be a whole number of at least 1, got 0"),
        ({"views_from": -1}, "expected an epoch from 0, or None, got -1"),
        ({"views_from": 0.5}, "expected an epoch from 0, or None, got 0.5"),
        ({"views_from": 1, "defence": Defence(watch=0.1)}, "false labels .* would store them as true ones"),
        (
            {"schedule": Fixed(exchanges="ABA"), "activations": "delta>fp8_e4m3", "defence": Defence(watch=0.1)},
            "have a B epoch follow each A",
        ),
        ({"views": 2, "activations": "delta>fp8_e4m3"}, "several views gain if they differ. Choose one"),
    ],
)
def test_what_cannot_be(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Method(**wrong)
