"""Batch norm in B epochs: what is measured, how it is pooled, and what of it is refused."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from cutlayer import Always, Fleet, Halves, Method, Once, Optimizer, Periodic, RefusedError, Training, fit
from cutlayer.data.batches import Batches
from cutlayer.records.ledger import Ledger
from cutlayer.strategies import STRATEGIES
from cutlayer.training.averaging import SharedHalf, load_statistics, weights_frame
from cutlayer.training.calibration import CALIBRATION_BATCHES, calibrate, pooled, statistics
from cutlayer.training.client import Client
from cutlayer.training.halves import TrainedHalf
from cutlayer.training.job import ClientJob
from cutlayer.wire.frames import Frame, Received, pack, read
from cutlayer.wire.messages import Calibrate, Weights

BATCH, WIDTH = 8, 5


def halves() -> Halves:
    torch.manual_seed(0)
    return Halves(
        nn.Sequential(nn.Linear(6, WIDTH), nn.BatchNorm1d(WIDTH)), nn.Sequential(nn.Tanh(), nn.Linear(WIDTH, 3))
    )


def data(sizes: tuple[int, ...]) -> list[TensorDataset]:
    """Clients whose inputs differ: each has a mean and a spread of its own."""
    draw = torch.Generator().manual_seed(1)
    sets = []
    for client, size in enumerate(sizes):
        inputs = torch.randn(size, 6, generator=draw) * (1 + client) + 3 * client
        sets.append(TensorDataset(inputs, inputs[:, :3].argmax(1)))
    return sets


def training(epochs: int) -> Training:
    return Training(epochs=epochs, batch_size=BATCH, client=Optimizer(lr=0.1), server=Optimizer(lr=0.1), shuffle=False)


@pytest.mark.parametrize("mode", [kind() for kind in STRATEGIES.values()])
@pytest.mark.parametrize("sizes", [(40,), (40, 16, 24)])
def test_after_a_b_epoch_the_statistics_are_those_of_all_clients_data(mode, sizes: tuple[int, ...]) -> None:
    sets = data(sizes)
    method = Method(Periodic(period=4), fleet=Fleet(strategy=mode))
    client = fit(halves(), sets, method=method, training=training(3)).halves.client
    with torch.no_grad():
        inputs = torch.cat([part.tensors[0] for part in sets])
        outputs = client[0](inputs).double()
    norm = client[1]
    torch.testing.assert_close(norm.running_mean.double(), outputs.mean(0), rtol=1e-4, atol=1e-4)
    # The mean of the batches' variances leaves out that of the batches' means, which is small within a client.
    ratio = norm.running_var.double() / outputs.var(0)
    assert bool(((ratio > 0.75) & (ratio < 1.25)).all())


def test_what_is_stored_is_what_evaluation_would_send(monkeypatch) -> None:
    """The half is one function in B and in evaluation, so the server half learns on what it will meet."""
    sets, stored = data((40, 16)), {}
    from cutlayer.memory.store import ReplayStore

    put = ReplayStore.put

    def recording(self, ids: Tensor, activations, labels=None) -> None:
        stored.update(
            zip(ids.tolist(), activations.rows.clone().view(torch.float32).reshape(len(ids), -1), strict=True)
        )
        put(self, ids, activations, labels)

    monkeypatch.setattr(ReplayStore, "put", recording)
    client = fit(halves(), sets, method=Method(Periodic(period=4)), training=training(2)).halves.client.eval()
    with torch.no_grad():
        expected = client(torch.cat([part.tensors[0] for part in sets]))
    torch.testing.assert_close(torch.stack([stored[row] for row in range(56)]), expected, rtol=1e-4, atol=1e-5)


def test_measuring_costs_a_few_batches_once_after_the_last_a_epoch() -> None:
    (many,) = data((BATCH * 40,))
    history = fit(halves(), many, method=Method(Periodic(period=2)), training=training(5)).history
    assert history.exchanges == "ABABA"
    forward = [record.flops["client"]["forward"] for record in history.epochs]
    assert forward[1] / forward[0] == 1 + CALIBRATION_BATCHES / 40

    class BTwice(Periodic):
        def rule(self, state, loss):
            return super().rule(state, loss) if state.epoch % 3 != 1 else state.exchange

    history = fit(halves(), many, method=Method(BTwice(period=9)), training=training(3)).history
    assert history.exchanges == "ABB"
    forward = [record.flops["client"]["forward"] for record in history.epochs]
    assert forward[2] == forward[0]


parts = st.lists(st.tuples(st.integers(2, 30), st.floats(-5, 5), st.floats(0.1, 4)), min_size=1, max_size=5)


@given(parts, st.integers(0, 2**32 - 1))
def test_pooled_statistics_are_those_of_the_samples_together(chosen, seed: int) -> None:
    draw = np.random.default_rng(seed)
    samples = [draw.normal(mean, spread, (count, 3)) for count, mean, spread in chosen]
    named = [
        (len(x), {"a.running_mean": torch.tensor(x.mean(0)), "a.running_var": torch.tensor(x.var(0))}) for x in samples
    ]
    whole = np.concatenate(samples)
    got = pooled(named)
    np.testing.assert_allclose(got["a.running_mean"], whole.mean(0), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(got["a.running_var"], whole.var(0), rtol=1e-9, atol=1e-9)


def test_calibration_leaves_momentum_counters_and_weights_alone() -> None:
    half = halves().client.train()
    half(torch.randn(4, 6))
    weights = {name: value.clone() for name, value in half.state_dict().items()}
    inputs = torch.randn(64, 6)
    calibrate(half, lambda: half(inputs))
    for name, value in half.state_dict().items():
        assert torch.equal(value, weights[name]) != name.endswith(("running_mean", "running_var")), name
    assert half[1].momentum == 0.1
    torch.testing.assert_close(half[1].running_mean, half[0](inputs).mean(0))


def encoded(tensors: dict[str, Tensor]) -> Received:
    return read(weights_frame(Weights(0, 0, statistics=True), tensors))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"1.running_mean": torch.full((WIDTH,), float("nan"))}, "finite"),
        ({"1.running_var": torch.full((WIDTH,), -1.0)}, "variances from 0"),
        ({"1.running_mean": torch.full((WIDTH,), 3e38)}, "of at most"),
        ({"1.running_mean": torch.zeros(WIDTH + 1)}, "differ"),
        ({"2.running_mean": torch.zeros(WIDTH)}, "differ"),
        ({"1.running_var": None}, "a mean and a variance of each layer"),
        ({"0.weight": torch.zeros(WIDTH, 6)}, "a mean and a variance of each layer"),
    ],
)
def test_statistics_that_do_not_fit_are_refused_and_change_nothing(change: dict, reason: str) -> None:
    half = halves().client
    sent = {**statistics(half), **change}
    sent = encoded({name: value for name, value in sent.items() if value is not None})
    shared = SharedHalf(half.state_dict())
    shared.tensors = dict(half.state_dict())
    before = {name: value.clone() for name, value in half.state_dict().items()}
    with pytest.raises(RefusedError, match=reason):
        shared.add_statistics(0, sent, 10)
    assert shared.pool_statistics() == {}
    with pytest.raises(RefusedError):
        load_statistics(half, sent, "client 0")
    assert all(torch.equal(value, before[name]) for name, value in half.state_dict().items())


def test_one_client_that_measured_less_or_the_most_extreme_that_is_taken_harms_no_other() -> None:
    half, other = (
        nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(3)),
        nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(3)),
    )
    shared = SharedHalf(half.state_dict())
    shared.tensors = dict(half.state_dict())
    few = {"0.running_mean": torch.full((2,), 1e18), "0.running_var": torch.full((2,), 1e36)}
    shared.add_statistics(0, encoded(few), 10)
    shared.add_statistics(1, encoded(statistics(half)), 30)
    pool = shared.pool_statistics()
    assert all(bool(value.isfinite().all()) for value in pool.values())
    torch.testing.assert_close(pool["1.running_mean"], half[1].running_mean)
    load_statistics(other, encoded(pool), "client 1")


def test_a_client_measures_and_shares_as_its_own_choices_say_only() -> None:
    """A server that asks for more than the run needs is refused, and nothing has changed."""
    half = halves().client
    body = TrainedHalf(half, Optimizer(), Training(epochs=1))
    (train,) = data((40,))

    def client(**choices) -> Client:
        job = ClientJob(0, Batches(train, batch_size=BATCH), None, Method(**choices), training(1))
        return Client(job, lambda: body, Ledger())

    before = {name: value.clone() for name, value in half.state_dict().items()}
    wrong = [
        (client(norm_in_b="eval"), Calibrate(0, 1)),
        (client(), Calibrate(7, 1)),
        (client(), Calibrate(0, 1, share=True)),  # it has never had a half that others share
    ]
    for asked, message in wrong:
        with pytest.raises(RefusedError, match="expected to measure statistics"):
            list(asked.answers(read(pack(Frame(message)))))
    with pytest.raises(RefusedError, match="expected pooled statistics that it asked for"):
        list(client().answers(read(weights_frame(Weights(0, 1, statistics=True), statistics(half)))))
    assert all(torch.equal(value, before[name]) for name, value in half.state_dict().items())


def test_a_run_that_ends_in_an_a_epoch_delivers_a_half_with_its_own_statistics() -> None:
    """The clients' running statistics lag behind, and their weights were averaged since."""
    sets = data((40, 16, 24))
    result = fit(halves(), sets, sets[0], method=Method(Always()), training=training(2))
    assert result.history.exchanges == "AA"
    client = result.halves.client
    with torch.no_grad():
        outputs = client[0](torch.cat([part.tensors[0] for part in sets]))
    torch.testing.assert_close(client[1].running_mean, outputs.mean(0), rtol=1e-4, atol=1e-4)
    record = result.history.epochs[-1]
    assert record.bytes["up"]["evaluation"] > 0
    lagging = fit(halves(), sets, sets[0], method=Method(Always(), norm_in_b="eval"), training=training(2))
    assert lagging.history.losses == result.history.losses  # training itself is the same
    assert lagging.history.bytes() == result.history.bytes()  # and what it costs


def test_a_client_is_lost_after_a_step_also_if_it_measured_before() -> None:
    """Dropout of clients that would otherwise be lost before they taught anything, all of them at once."""
    for seed in range(6):
        chosen = Method(Once(), fleet=Fleet(dropout=0.7))
        options = dataclasses.replace(training(3), batch_size=8, seed=seed)
        history = fit(halves(), data((8, 8)), method=chosen, training=options).history
        assert all(record.samples == 16 for record in history.epochs)


@pytest.mark.parametrize("stop", range(5))
def test_a_run_of_several_clients_is_resumed_to_the_same_bits_after_every_epoch(stop: int, tmp_path) -> None:
    def interrupt(record) -> None:
        if record.epoch == stop:
            raise KeyboardInterrupt

    sets, method = data((16, 16, 24)), Method(Periodic(period=3))
    whole = fit(halves(), sets, sets[0], method=method, training=training(6))
    with pytest.raises(KeyboardInterrupt):
        fit(halves(), sets, sets[0], method=method, training=training(6), run=tmp_path, on_epoch=interrupt)
    resumed = fit(halves(), sets, sets[0], method=method, training=training(6), run=tmp_path, resume=True)
    state = whole.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in resumed.model.state_dict().items())
