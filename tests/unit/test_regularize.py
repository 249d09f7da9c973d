"""What the server does against learning stored activations by heart."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import TensorDataset

from cutlayer import Always, ConfigError, Fixed, Halves, Method, Optimizer, Result, Schedule, Task, Training, fit
from cutlayer.regularize import Regularize, dropped, mixed, smoothed
from cutlayer.seeds import seeded

SGD = Optimizer(lr=0.1, schedule="constant", weight_decay=0.0)
ALL = {"mixup": 0.4, "cutmix": 1.0, "label_smoothing": 0.1, "dropout": 0.2, "channel_dropout": 0.2}


def network() -> Halves:
    torch.manual_seed(0)
    server = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    return Halves(nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh()), server)


def images(count: int = 24) -> TensorDataset:
    draw = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(count, 1, 6, 6, generator=draw), torch.arange(count) % 3)


def trained(schedule: Schedule, **chosen: float) -> Result:
    training = Training(
        epochs=3, batch_size=8, client=SGD, server=SGD, shuffle=False, regularize=Regularize(**chosen), seed=5
    )
    return fit(network(), images(), images(9), method=Method(schedule), training=training)


def test_mixup_mixes_values_and_losses_by_the_same_share() -> None:
    activations, outputs, labels = torch.randn(32, 2, 4, 4), torch.randn(32, 3), torch.arange(32) % 3
    mixture = mixed(Regularize(mixup=1.0), activations, 0, 7)
    share, others = mixture.share, mixture.others
    torch.testing.assert_close(mixture.activations, share * activations + (1 - share) * activations[others])
    own, other = (nn.functional.one_hot(each, 3) for each in (labels, labels[others]))
    loss = mixture.loss(cross_entropy(outputs, labels), cross_entropy, outputs, labels)
    torch.testing.assert_close(loss, cross_entropy(outputs, share * own + (1 - share) * other))
    shares = [mixed(Regularize(mixup=1.0), activations, 0, step).share for step in range(300)]
    assert sum(shares) / 300 == pytest.approx(0.5, abs=0.06)  # Beta(1, 1) is uniform
    assert min(shares) < 0.1
    assert max(shares) > 0.9


def test_cutmix_puts_a_box_of_one_map_into_another() -> None:
    activations = torch.arange(6.0)[:, None, None, None].expand(6, 2, 8, 8)
    sizes = []
    for step in range(200):
        mixture = mixed(Regularize(cutmix=1.0), activations, 0, step)
        others, moved = activations[mixture.others], mixture.activations != activations
        assert torch.equal(mixture.activations, torch.where(moved, others, activations))
        sample = next((i for i in range(6) if mixture.others[i] != i), None)
        if sample is None or not moved[sample].any():
            continue
        box = moved[sample, 0].nonzero()
        (top, left), (bottom, right) = box.min(0).values, box.max(0).values
        assert len(box) == (bottom - top + 1) * (right - left + 1)  # a whole rectangle, the same in each channel
        assert torch.equal(moved[sample, 0], moved[sample, 1])
        assert mixture.share == pytest.approx(1 - len(box) / 64)
        sizes.append(len(box))
    assert min(sizes) <= 4
    assert max(sizes) >= 40


def test_with_both_a_coin_decides() -> None:
    activations = torch.arange(64.0).reshape(4, 1, 4, 4)
    both = Regularize(mixup=1.0, cutmix=1.0)
    boxed = [bool(torch.isin(mixed(both, activations, 0, n).activations, activations).all()) for n in range(200)]
    assert 60 < sum(boxed) < 140


def test_smoothing() -> None:
    outputs, labels = torch.randn(8, 3), torch.arange(8) % 3
    spread = 0.9 * nn.functional.one_hot(labels, 3) + 0.1 / 3
    torch.testing.assert_close(smoothed(cross_entropy, 0.1)(outputs, labels), cross_entropy(outputs, spread))
    with pytest.raises(ConfigError, match="expected the task's default loss"):
        smoothed(mse_loss, 0.1)


def test_dropout_of_values_and_of_channels() -> None:
    with seeded(0, "dropout"):
        values = dropped(Regularize(dropout=0.25), torch.ones(50, 4, 5, 5))
        channels = dropped(Regularize(channel_dropout=0.25), torch.ones(500, 4, 5, 5))
    assert (values == 0).double().mean().item() == pytest.approx(0.25, abs=0.03)
    assert values.mean().item() == pytest.approx(1, abs=0.04)
    gone = (channels == 0).flatten(2)
    assert torch.equal(gone.all(2), gone.any(2))
    assert gone.double().mean().item() == pytest.approx(0.25, abs=0.03)
    assert channels.max().item() == pytest.approx(1 / 0.75)


@pytest.mark.parametrize("name", ALL)
def test_each_is_at_work_in_each_exchange_and_never_in_evaluation(name: str) -> None:
    usual, changed, again = (
        trained(Fixed(exchanges="ABC"), **chosen) for chosen in ({}, {name: ALL[name]}, {name: ALL[name]})
    )
    assert all(a != b for a, b in zip(usual.history.losses, changed.history.losses, strict=True))
    assert again.history.losses == changed.history.losses
    # What is evaluated is the network itself.
    assert changed.history.test("loss") == pytest.approx(changed.history.merged["loss"], rel=1e-5)


@pytest.mark.parametrize("exchanges", ["B", "C"])
def test_mixing_is_at_work_where_no_gradients_go(exchanges: str) -> None:
    """From the same half after one plain step: the loss of a B and of a C epoch is that of what was mixed."""
    found = trained(Fixed(exchanges="AB" if exchanges == "B" else "ABC"), mixup=5.0).history.losses
    usual = trained(Fixed(exchanges="AB" if exchanges == "B" else "ABC")).history.losses
    assert found[-1] > usual[-1] + 0.01  # mixed samples are harder


def test_gradients_at_the_cut_are_those_of_the_uncut_network() -> None:
    """By hand: the whole network in one process, mixed and dropped at the same place by the same draws."""
    chosen = Regularize(**ALL)
    halves, loss = network(), smoothed(cross_entropy, chosen.label_smoothing)
    optimizer = torch.optim.SGD([*halves.client.parameters(), *halves.server.parameters()], 0.1, 0.9)
    inputs, labels = images().tensors
    for epoch in range(3):
        for step in range(3):
            batch = slice(8 * step, 8 * step + 8)
            mixture = mixed(chosen, halves.client(inputs[batch]), 5, epoch, step, 0)
            with seeded(5, "server", epoch, step):
                outputs = halves.server(dropped(chosen, mixture.activations))
            optimizer.zero_grad()
            mixture.loss(loss(outputs, labels[batch]), loss, outputs, labels[batch]).backward()
            optimizer.step()
    got = trained(Always(), **ALL).halves
    for mine, theirs in ((halves.client, got.client), (halves.server, got.server)):
        for name, value in mine.state_dict().items():
            torch.testing.assert_close(theirs.state_dict()[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mixup": -1}, "mixup: expected 0 or a positive number, got -1"),
        ({"dropout": 1.0}, "dropout: expected a number from 0 to below 1, got 1.0"),
        ({"label_smoothing": float("nan")}, "label_smoothing: expected a number from 0 to below 1, got nan"),
    ],
)
def test_wrong_values(wrong: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Regularize(**wrong)


def test_what_does_not_fit_the_task_or_the_cut() -> None:
    vectors = TensorDataset(torch.randn(8, 4), torch.arange(8) % 2)
    halves = Halves(nn.Linear(4, 4), nn.Linear(4, 2))
    training = Training(epochs=1, batch_size=4, regularize=Regularize(cutmix=1.0))
    with pytest.raises(ConfigError, match=r"cutmix: expected feature maps .* got \[4\]"):
        fit(halves, vectors, training=training)

    def own(outputs: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(outputs, labels)

    smooth = dataclasses.replace(training, regularize=Regularize(label_smoothing=0.1))
    with pytest.raises(ConfigError, match="with a loss of your own, smooth the labels in it"):
        fit(halves, vectors, training=smooth, task=Task(loss=own, classes=2))
