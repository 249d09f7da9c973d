"""A client half of which nothing, or a part only, is trained: a pretrained backbone on the device."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from cutlayer import ConfigError, Drop, Fleet, Halves, Method, Once, Optimizer, Periodic, Result, Training, fit, split
from cutlayer.data.batches import Batches
from cutlayer.errors import RefusedError
from cutlayer.strategies import STRATEGIES
from cutlayer.wire.frames import Frame, pack, read
from cutlayer.wire.messages import Plan

SAMPLES, WIDTH, EPOCHS = 40, 6, 4
OPTIMIZER = Optimizer(lr=0.1, schedule="constant", weight_decay=0.01)
TRAINING = Training(epochs=EPOCHS, batch_size=16, client=OPTIMIZER, server=OPTIMIZER)
NOTHING, PART = {"0", "2"}, {"0"}
"""Layers that are frozen: the whole client half, or its first layer."""


def model(frozen: set[str]) -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3))
    for name, module in network.named_children():
        module.requires_grad_(name not in frozen)
    return network


def data(seed: int = 1, samples: int = SAMPLES) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(samples, 4, generator=draw), torch.randint(0, 3, (samples,), generator=draw))


PLAIN = Method()


def run(frozen: set[str], method: Method = PLAIN, **more: object) -> Result:
    return fit(split(model(frozen), "2"), data(), data(2), method=method, training=TRAINING, **more)


def total(result: Result, kind: str) -> int:
    return result.history.bytes(kinds=[kind])


@pytest.mark.parametrize("frozen", [NOTHING, PART])
def test_training_equals_uncut_training_bit_for_bit(frozen: set[str]) -> None:
    uncut, feed, expected = model(frozen), Batches(data(), batch_size=16), []
    sgd = torch.optim.SGD(uncut.parameters(), 0.1, 0.9, weight_decay=0.01)
    for epoch in range(EPOCHS):
        summed = torch.zeros((), dtype=torch.float64)
        for batch in feed.epoch(epoch):
            loss = cross_entropy(uncut(batch.inputs), batch.labels)
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            summed += loss.detach().double() * len(batch.labels)
        expected.append(summed.item() / SAMPLES)
    result = run(frozen)
    assert result.history.losses == expected
    weights = result.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in uncut.state_dict().items())


def test_every_a_epoch_of_a_frozen_half_is_a_b_epoch() -> None:
    result = run(NOTHING)
    history = result.history
    assert history.exchanges == "BBBB"
    assert total(result, "activations") == EPOCHS * SAMPLES * WIDTH * 4
    assert total(result, "gradients") == total(result, "weights") == 0
    forward = 2 * SAMPLES * (4 * 5 + 5 * WIDTH)
    assert [record.flops["client"].get("backward", 0) for record in history.epochs] == [0] * EPOCHS
    assert [record.flops["client"]["forward"] for record in history.epochs] == [forward] * EPOCHS
    # Plain split learning of the same network sends no gradients, either.
    assert history.baseline.exchanged_bytes == SAMPLES * WIDTH * 4
    assert history.baseline.client_flops == forward
    assert history.traffic_reduction == history.client_flops_reduction == 1
    assert history.all_bytes_reduction == pytest.approx(1, abs=0.1)  # of so few bytes, evaluation asks for some


def test_one_epoch_sends_all_that_is_ever_needed() -> None:
    result = run(NOTHING, Method(Once()))
    history = result.history
    assert history.exchanges == "BCCC"
    assert total(result, "activations") == SAMPLES * WIDTH * 4
    assert history.traffic_reduction == history.client_flops_reduction == EPOCHS
    assert history.losses[-1] < history.losses[0]
    before, after = model(NOTHING).state_dict(), result.model.state_dict()
    assert [name for name in after if torch.equal(before[name], after[name])] == [
        "0.weight", "0.bias", "2.weight", "2.bias"
    ]  # fmt: skip


@pytest.mark.parametrize("method", [Method(Periodic(period=3)), Method(Drop(threshold=0.01)), Method(Once(warmup=2))])
def test_no_schedule_has_an_a_epoch(method: Method) -> None:
    history = run(NOTHING, method).history
    assert history.exchanges[0] == "B"
    assert "A" not in history.exchanges


def test_a_half_that_is_frozen_in_part_is_trained() -> None:
    result = run(PART, Method(Once()))
    assert result.history.exchanges == "ABCC"
    assert total(result, "gradients") == SAMPLES * WIDTH * 4
    # The backward pass ends at the frozen layer: the gradient of the second layer's weights, none of its inputs.
    assert result.history.epochs[0].flops["client"]["backward"] == 2 * SAMPLES * 5 * WIDTH
    assert result.history.baseline.exchanged_bytes == 2 * SAMPLES * WIDTH * 4
    before, after = model(PART).state_dict(), result.model.state_dict()
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert not torch.equal(before["2.weight"], after["2.weight"])


@pytest.mark.parametrize("state", ["shared", "own"])
@pytest.mark.parametrize("mode", STRATEGIES)
def test_several_clients_send_activations_once_and_no_weights(mode: str, state: str) -> None:
    sets = [data(1, 24), data(2, 16), data(3, 8)]
    method = Method(Once(), fleet=Fleet(strategy=STRATEGIES[mode](), state=state))
    result = fit(split(model(NOTHING), "2"), sets, data(4), method=method, training=TRAINING)
    assert result.history.exchanges == "BCCC"
    assert total(result, "activations") == 48 * WIDTH * 4
    assert total(result, "gradients") == total(result, "weights") == 0
    assert result.history.traffic_reduction == EPOCHS
    assert result.history.losses[-1] < result.history.losses[0]


def test_a_run_is_not_resumed_with_a_half_that_is_no_longer_frozen(tmp_path: Path) -> None:
    run(NOTHING, run=tmp_path / "run")
    with pytest.raises(ConfigError, match="client half"):
        run(set(), run=tmp_path / "run", resume=True)


def test_a_frozen_client_refuses_to_wait_for_gradients() -> None:
    from cutlayer.backends.client_data import ClientData
    from cutlayer.backends.group import build_clients
    from cutlayer.records.ledger import Ledger

    half = split(model(NOTHING), "2").client
    built = build_clients(half, {0: ClientData(data())}, Method(), TRAINING, Ledger(), None)
    with pytest.raises(RefusedError, match="its half is frozen: expected a plan for a B epoch"):
        built.by_number[0].answers(read(pack(Frame(Plan(0, 0, "A")))))


def test_dropout_in_a_frozen_half_still_draws() -> None:
    network = nn.Sequential(nn.Linear(4, WIDTH).requires_grad_(False), nn.Dropout(0.5), nn.Linear(WIDTH, 3))
    halves = Halves(network[:2], copy.deepcopy(network[2:]))
    assert len({*fit(halves, data(), training=TRAINING).history.losses}) == EPOCHS


@pytest.mark.parametrize("norm_in_b", ["calibrated", "eval", "train"])
def test_batch_norm_of_a_frozen_half_stays_as_it_is_unless_asked(norm_in_b: str) -> None:
    client = nn.Sequential(nn.Linear(4, WIDTH), nn.BatchNorm1d(WIDTH)).requires_grad_(False)
    before = copy.deepcopy(client.state_dict())
    halves = Halves(client, nn.Linear(WIDTH, 3))
    after = fit(halves, data(), method=Method(norm_in_b=norm_in_b), training=TRAINING).halves.client.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items()) == (norm_in_b != "train")
