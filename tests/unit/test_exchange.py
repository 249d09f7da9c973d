"""What crosses the wire, what is computed, and what the ledger says of it, in each of the three states."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from cutlayer import Always, Halves, Method, Optimizer, Periodic, Training, fit
from cutlayer.backends.local import LocalPeer
from cutlayer.wire.frames import unpack
from cutlayer.wire.messages import Done, Evaluate

SAMPLES, BATCH, FEATURES, CUT = 50, 16, 12, 8
BATCHES = math.ceil(SAMPLES / BATCH)


class Reads(Dataset):
    """Random features and labels; counts how often a sample is read."""

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(SAMPLES, FEATURES, generator=draw)
        self.labels = torch.randint(0, 10, (SAMPLES,), generator=draw)
        self.count = 0

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.count += 1
        return self.inputs[index], self.labels[index]


def halves() -> Halves:
    torch.manual_seed(0)
    return Halves(
        nn.Sequential(nn.Linear(FEATURES, CUT), nn.BatchNorm1d(CUT), nn.ReLU()),
        nn.Sequential(nn.Linear(CUT, 16), nn.ReLU(), nn.Linear(16, 10)),
    )


def training(epochs: int) -> Training:
    return Training(epochs=epochs, batch_size=BATCH, client=Optimizer(lr=0.02), server=Optimizer(lr=0.02))


# Multiply-adds of the two linear layers, twice; the client's first layer needs no gradient of its input.
CLIENT_FORWARD = 2 * SAMPLES * FEATURES * CUT
CLIENT_BACKWARD = CLIENT_FORWARD
SERVER_FORWARD = 2 * SAMPLES * (CUT * 16 + 16 * 10)
SERVER_BACKWARD_TO_CUT = 2 * SERVER_FORWARD
SERVER_BACKWARD = SERVER_BACKWARD_TO_CUT - 2 * SAMPLES * CUT * 16


@pytest.mark.parametrize("evaluate_every", [1, 3, 6])
def test_each_state_sends_and_computes_what_it_needs_and_nothing_else(evaluate_every: int) -> None:
    pair, data, test = halves(), Reads(), Reads()
    passes: list[tuple[bool, bool]] = []
    half: list[nn.Module] = []

    def watch(module: nn.Module, inputs: object, output: Tensor) -> None:
        passes.append((module.training, output.requires_grad))
        half[:] = [module]

    pair.client.register_forward_hook(watch)
    weights, seen = [], []

    def look(record) -> None:
        weights.append(half[0].get_parameter("0.weight").detach().clone())
        seen.append((record.exchange, data.count + (test.count if record.exchange == "C" else 0), list(passes)))
        data.count, test.count = 0, 0
        passes.clear()

    history = fit(
        pair,
        data,
        test,
        method=Method(Periodic(period=4), "fp8_e4m3", "fp8_e5m2", norm_in_b="eval"),
        training=dataclasses.replace(training(6), evaluate_every=evaluate_every),
        on_epoch=look,
    ).history
    assert history.exchanges == "ABCCAB"

    for record, (exchange, reads, calls) in zip(history.epochs, seen, strict=True):
        training_calls = [call for call in calls if call[0]]
        up, down = record.bytes["up"], record.bytes["down"]
        if exchange == "C":
            # No client at all: no pass (evaluation included), no sample read, not one byte in either direction.
            assert (reads, calls, up, down, record.flops["client"]) == (0, [], {}, {}, {})
            assert record.flops["server"]["forward"] == SERVER_FORWARD
            assert record.flops["server"]["backward"] == SERVER_BACKWARD
            continue
        assert up["activations"] == SAMPLES * CUT + BATCHES * 4
        assert up["labels"] == SAMPLES
        assert record.flops["client"]["forward"] == CLIENT_FORWARD
        if exchange == "A":
            assert training_calls == [(True, True)] * BATCHES
            assert down["gradients"] == SAMPLES * CUT + BATCHES * 4
            assert record.flops["client"]["backward"] == CLIENT_BACKWARD
            assert record.flops["server"]["backward"] == SERVER_BACKWARD_TO_CUT
        else:
            assert training_calls == [(True, False)] * BATCHES  # no autograd graph
            assert "gradients" not in down
            assert "backward" not in record.flops["client"]
            assert record.flops["server"]["backward"] == SERVER_BACKWARD
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(weights)]
    assert changed == [False, False, False, True, False]
    assert history.losses[3] < history.losses[2] < history.losses[1]  # the server goes on learning in C
    assert [bool(record.test) for record in history.epochs] == [(n + 1) % evaluate_every == 0 for n in range(6)]


@pytest.mark.parametrize(("codec", "exact"), [("fp32", True), ("hfp8", True), ("fp8", False)])
def test_the_ledger_equals_the_closed_form(codec: str, exact: bool) -> None:
    """reduction = (bits before / after) x 2E / (2a + b)."""
    method = Method.of(Periodic(period=4), codec, norm_in_b="eval")
    history = fit(halves(), Reads(), method=method, training=training(10)).history
    a, b, bits = history.exchanges.count("A"), history.exchanges.count("B"), 32 if codec == "fp32" else 8
    assert (a, b) == (3, 3)
    expected = 32 / bits * 2 * 10 / (2 * a + b)
    assert history.traffic_reduction == (expected if exact else pytest.approx(expected, rel=0.05))
    assert history.client_flops_reduction == 10 * 2 / (2 * a + b)
    plain = fit(halves(), Reads(), method=Method(Always()), training=training(10)).history
    exchanged = ("activations", "gradients")
    assert plain.bytes(kinds=exchanged) / history.bytes(kinds=exchanged) == history.traffic_reduction
    assert (plain.traffic_reduction, plain.client_flops_reduction) == (1.0, 1.0)


def test_the_papers_106_7() -> None:
    """A run of 200 epochs with 5 A and 5 B at 8 bits, in the code path of every run."""
    method = Method.of(Periodic(period=40), "hfp8", norm_in_b="eval")
    history = fit(halves(), Reads(), method=method, training=training(200)).history
    assert (history.exchanges.count("A"), history.exchanges.count("B")) == (5, 5)
    assert round(history.traffic_reduction, 1) == 106.7
    assert history.client_flops_reduction == 200 * 2 / 15


def test_every_c_epoch_draws_its_batches_afresh() -> None:
    pair, batches = halves(), []
    pair.server.register_forward_pre_hook(lambda module, inputs: batches.append(inputs[0].detach().clone()))
    epochs: list[list[set[bytes]]] = []

    def look(record) -> None:
        epochs.append([{sample.numpy().tobytes() for sample in batch} for batch in batches])
        batches.clear()

    history = fit(pair, Reads(), method=Method(Periodic(period=5)), training=training(5), on_epoch=look).history
    assert history.exchanges == "ABCCC"
    for first, second in itertools.combinations(epochs[1:], 2):
        assert set().union(*first) == set().union(*second)  # the same samples
        assert not any(batch in second for batch in first)  # in other company


@pytest.fixture
def sent(monkeypatch) -> list[bytes]:
    """The frames that clients send in a test, as they come."""
    frames_sent: list[bytes] = []
    original = LocalPeer.receive

    def recording(self) -> bytes:
        frames_sent.append(original(self))
        return frames_sent[-1]

    monkeypatch.setattr(LocalPeer, "receive", recording)
    return frames_sent


def test_nothing_but_ids_labels_and_activations_leaves_the_client(sent: list[bytes]) -> None:
    data, test = Reads(), Reads()
    trained = fit(halves(), data, test, method=Method(Periodic(period=3)), training=training(3)).halves
    assert {type(unpack(frame).message).__name__ for frame in sent} == {"Step", "Evaluate", "Done"}
    for frame in sent:
        if isinstance(unpack(frame).message, Done):
            continue
        tensors = unpack(frame).tensors
        assert set(tensors) == {"ids", "labels", "activations"}
        assert tensors["activations"].shape == (CUT,)
    everything = b"".join(sent)
    secret = [*data.inputs, *test.inputs, *trained.client.state_dict().values(), *trained.server.state_dict().values()]
    secret = [value for value in secret if value.dim() > 0]  # all but batch norm's counters
    assert not any(value.numpy().tobytes() in everything for value in secret)
    with torch.no_grad():  # the search finds what is there: test activations that were sent last
        sent_activations = trained.client.eval()(test.inputs[:BATCH])
    assert sent_activations[3].numpy().tobytes() in everything


def test_evaluation_is_the_same_each_time_where_training_draws(sent: list[bytes]) -> None:
    pair = Halves(nn.Linear(FEATURES, CUT), nn.Linear(CUT, 10))
    method = Method(Periodic(period=2), "randtopk0.5>fp16", "mxfp4:stochastic")
    fit(pair, Reads(), Reads(), method=method, training=training(2))
    evaluations: list[list[bytes]] = [[], []]  # B leaves the client's weights alone
    for frame in map(unpack, sent):
        if isinstance(frame.message, Evaluate):
            evaluations[frame.message.epoch].append(frame.tensors["activations"].rows.numpy().tobytes())
    assert evaluations[0] == evaluations[1]


def test_bytes_of_the_ledger_are_the_lengths_of_the_frames(monkeypatch) -> None:
    lengths = {"up": 0, "down": 0}
    send, receive = LocalPeer.send, LocalPeer.receive

    def measuring(self) -> bytes:
        data = receive(self)
        lengths["up"] += len(data)
        return data

    def measuring_down(self, data: bytes) -> None:
        lengths["down"] += len(data)
        send(self, data)

    monkeypatch.setattr(LocalPeer, "receive", measuring)
    monkeypatch.setattr(LocalPeer, "send", measuring_down)
    history = fit(halves(), Reads(), Reads(), method=Method(Periodic(period=3)), training=training(5)).history
    for direction, length in lengths.items():
        assert sum(sum(record.bytes[direction].values()) for record in history.epochs) == length


def test_the_same_seed_gives_the_same_bits_whatever_the_loader() -> None:
    data = Reads()
    stored = TensorDataset(data.inputs, data.labels)

    def weights(source, seed: int = 0) -> bytes:
        model = halves()
        model.client.append(nn.Dropout(0.2))
        chosen = Training(epochs=3, batch_size=BATCH, seed=seed)
        torch.manual_seed(torch.seed())  # whatever the global generator holds must not matter
        result = fit(model, source, method=Method(Periodic(period=3)), training=chosen)
        return result.model.state_dict()["client.0.weight"].numpy().tobytes()

    assert weights(data) == weights(stored) == weights(data)
    assert weights(data) != weights(data, seed=1)
    loader = DataLoader(stored, batch_size=10, shuffle=True)
    assert weights(loader) == weights(loader)
    own = DataLoader(stored, batch_size=10, shuffle=True, generator=torch.Generator())
    assert weights(own) == weights(own)
    workers = DataLoader(stored, batch_size=10, shuffle=True, num_workers=1)
    assert weights(workers) == weights(loader)


@pytest.mark.parametrize("mode", ["train", "eval", "calibrated"])
def test_batch_norm_in_forward_only_epochs(mode: str) -> None:
    pair, means, dropped = halves(), [], []
    norms: list[Tensor] = []
    pair.client.append(nn.Dropout(0.5))
    pair.client.register_forward_hook(lambda m, i, out: norms.__setitem__(slice(None), [m[1].running_mean.clone()]))
    pair.client[3].register_forward_hook(lambda m, i, out: dropped.append(m.training))
    fit(
        pair,
        Reads(),
        method=Method(Periodic(period=3), norm_in_b=mode),
        training=training(3),
        on_epoch=lambda record: means.append(norms[0]),
    )
    assert all(dropped)  # the choice is about batch norm alone
    assert torch.equal(means[0], means[1]) == (mode == "eval")
    assert torch.equal(means[1], means[2])  # C leaves it alone in any case
