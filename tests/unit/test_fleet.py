"""Who takes part, what is lost and what comes back, what the ledger says of weights, and what is refused."""

from pathlib import Path

import pytest
import torch
from torch import nn

from cutlayer import Always, ConfigError, Fleet, Method, Periodic, RefusedError, Task, Training, fit
from cutlayer.codecs import encode_exactly, get_codec
from cutlayer.records.ledger import Ledger
from cutlayer.schedule import Drop, Exchange
from cutlayer.strategies import STRATEGIES, ParallelSplit, Sequential, SplitFedV1, SplitFedV2, make_strategy
from cutlayer.training.averaging import Average, SharedHalf, load_weights, weights_frame
from cutlayer.training.checks import ClientSummary
from cutlayer.training.job import Job
from cutlayer.training.participants import LiveParticipant
from cutlayer.training.server import Server
from cutlayer.wire.frames import Frame, Received, pack, read
from cutlayer.wire.messages import Done, Step, Weights
from tests.helpers.small import close, data, equal, halves, training

MODE_VALUES = [kind() for kind in STRATEGIES.values()]


def method(schedule=None, **fleet: object) -> Method:
    return Method(schedule or Periodic(period=4), "fp8_e4m3", "fp8_e5m2", fleet=Fleet(**fleet))


@pytest.mark.parametrize("mode", MODE_VALUES)
def test_a_run_that_is_resumed_ends_in_the_bits_of_one_that_was_not_interrupted(mode, tmp_path: Path) -> None:
    class InterruptionError(Exception):
        pass

    def interrupt(record) -> None:
        if record.epoch == 3:
            raise InterruptionError

    chosen = method(strategy=mode, fraction=0.7, dropout=0.2, live=2, state="own")
    sets, options = data((16, 16, 8, 8)), training(6, drop_last=True)
    whole = fit(halves(norm=True), sets, sets[0], method=chosen, training=options)
    with pytest.raises(InterruptionError):
        fit(halves(norm=True), sets, sets[0], method=chosen, training=options, run=tmp_path, on_epoch=interrupt)
    resumed = fit(halves(norm=True), sets, sets[0], method=chosen, training=options, run=tmp_path, resume=True)
    assert equal(resumed.model, whole.model)
    assert resumed.history.losses == whole.history.losses
    assert [r.states for r in resumed.history.epochs] == [r.states for r in whole.history.epochs]
    with pytest.raises(ConfigError, match=r"method\.fleet\.fraction: was 0\.7, now 1\.0"):
        fit(
            halves(norm=True),
            sets,
            sets[0],
            method=method(strategy=mode, dropout=0.2, live=2, state="own"),
            training=options,
            run=tmp_path,
            resume=True,
        )


def test_weights_cross_in_a_epochs_and_are_in_the_ledger() -> None:
    """Up: once from each client in an A epoch. Down: before each plan, once there is an average to send."""
    frame = len(weights_frame(Weights(0, 0), halves().client.state_dict()))
    history = fit(halves(), data(), method=method(), training=training(6)).history
    assert history.exchanges == "ABCCAB"
    weights = [
        tuple(record.bytes[way].get("weights", 0) / frame for way in ("up", "down")) for record in history.epochs
    ]
    # The halves here have no batch norm, so what clients say of it before a B epoch is a header each.
    expected = [(3, 0), (0, 3), (0, 0), (0, 0), (3, 3), (0, 3)]
    assert weights == [pytest.approx(pair, rel=0.05, abs=0.6) for pair in expected]


def test_a_fraction_takes_part_each_epoch_and_everyone_in_the_end() -> None:
    fleet = Fleet(fraction=0.3)
    drawn = [fleet.draw(0, epoch, 10) for epoch in range(40)]
    assert all(len(chosen) == 3 and chosen == sorted(chosen) for chosen in drawn)
    assert {client for chosen in drawn for client in chosen} == set(range(10))
    assert drawn == [fleet.draw(0, epoch, 10) for epoch in range(40)]
    history = fit(halves(), data((8,) * 10), method=method(Always(), fraction=0.3), training=training(4)).history
    assert [record.samples for record in history.epochs] == [24] * 4


def test_a_client_lost_in_an_epoch_leaves_what_it_taught_and_takes_its_weights_along(monkeypatch) -> None:
    """SplitFed V2, one epoch: client 1 of 2 is lost after its first batch of two."""
    sets = data((16, 16))
    monkeypatch.setattr(Fleet, "lost_after", lambda self, seed, epoch, client, steps: 1 if client == 1 else None)
    result = fit(halves(), sets, method=method(Always(), strategy=SplitFedV2()), training=training(1))
    assert result.history.epochs[0].samples == 24  # two batches of client 0, one of client 1
    monkeypatch.undo()
    # The half that is shared is that of client 0 alone, whose server was taught by client 1 between its two batches.
    inputs, labels = sets[1].tensors
    first_only = torch.utils.data.TensorDataset(inputs[:8], labels[:8])
    both = fit(halves(), [sets[0], first_only], method=method(Always(), strategy=SplitFedV2()), training=training(1))
    assert equal(result.halves.server, both.halves.server)
    assert not equal(result.halves.client, both.halves.client)  # there client 1 has its say in the average


def test_a_client_that_was_away_comes_back_with_the_newest_half(monkeypatch) -> None:
    """Client 1 is absent in epoch 0: in epoch 1 it trains on from what client 0 made."""
    sets = data((16, 16))
    monkeypatch.setattr(Fleet, "draw", lambda self, seed, epoch, clients: [0] if epoch == 0 else [1])
    result = fit(halves(), sets, method=method(Always(), strategy=SplitFedV2()), training=training(2))
    monkeypatch.undo()
    handed_on = fit(halves(), sets, method=method(Always(), strategy=Sequential()), training=training(1))
    close(result.halves.client, handed_on.halves.client)
    close(result.halves.server, handed_on.halves.server)


@pytest.mark.parametrize("replay", [True, False])
def test_the_store_speaks_for_the_absent(replay: bool, monkeypatch) -> None:
    present = {0: [0, 1], 1: [0, 1], 2: [0]}
    monkeypatch.setattr(Fleet, "draw", lambda self, seed, epoch, clients: present[epoch])
    chosen = method(Periodic(period=2), replay_absent=replay)
    history = fit(halves(), data((16, 8)), method=chosen, training=training(3)).history
    assert history.exchanges == "ABA"
    assert [record.samples for record in history.epochs] == [24, 24, 24 if replay else 16]


def test_clients_with_states_of_their_own() -> None:
    """Random labels teach a client little: its loss stalls, and it rests while the others go on."""
    sets = data((64, 64, 64))
    draw = torch.Generator().manual_seed(5)
    sets[1] = torch.utils.data.TensorDataset(sets[1].tensors[0], torch.randint(0, 3, (64,), generator=draw))
    chosen = method(Drop(threshold=0.06), state="own", strategy=SplitFedV2())
    history = fit(halves(), sets, method=chosen, training=training(12)).history
    states = [record.states for record in history.epochs]
    assert all(len(state) == 3 for state in states)
    assert [record.exchange for record in history.epochs] == [min(state) for state in states]
    assert states[:4] == ["AAA", "AAA", "ABA", "ACA"]
    # Everyone's samples are trained on in every epoch, from the store if the client rests.
    assert all(record.samples == 192 for record in history.epochs)


class Counted(torch.utils.data.TensorDataset):
    """Counts its reads."""

    reads = 0

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        self.reads += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("evaluate_every", [1, 5])
def test_a_client_that_rests_under_a_state_of_its_own_is_left_alone(evaluate_every: int) -> None:
    """It is evaluated on what it sent before its rest, and reads neither training nor test data."""
    sets = data((64, 64, 64))
    draw = torch.Generator().manual_seed(5)
    sets[1] = torch.utils.data.TensorDataset(sets[1].tensors[0], torch.randint(0, 3, (64,), generator=draw))
    train, test = Counted(*sets[1].tensors), Counted(*sets[1].tensors)
    other, seen = Counted(*sets[0].tensors), []

    def look(record) -> None:
        seen.append((record.states, train.reads, test.reads, other.reads, bool(record.test)))
        train.reads = test.reads = other.reads = 0

    chosen = method(Drop(threshold=0.06), state="own", strategy=SplitFedV2())
    options = training(10, evaluate_every=evaluate_every)
    fit(halves(), [sets[0], train, sets[2]], [other, test], method=chosen, training=options, on_epoch=look)
    resting = [reads for states, *reads, _ in seen if states[1] == "C"]
    assert len(resting) > 2
    assert [reads[:2] for reads in resting] == [[0, 0]] * len(resting)
    before = next(number for number, epoch in enumerate(seen) if epoch[0][1] == "C") - 1
    assert seen[before][2] == 64  # in time
    if evaluate_every == 1:  # who does not rest is
        assert any(states[1] == "C" and states[0] != "C" and reads == 64 for states, _, _, reads, _ in seen)
    assert [epoch[4] for epoch in seen] == [(number + 1) % evaluate_every == 0 for number in range(10)]


@pytest.mark.parametrize("way", ["away", "lost"])
def test_the_state_of_an_absent_client_stays_where_it_is(way: str, monkeypatch) -> None:
    """Under states of their own: what client 1 was to do in epoch 1 it does in epoch 2."""
    if way == "away":
        monkeypatch.setattr(Fleet, "draw", lambda self, seed, epoch, n: [0] if epoch == 1 else [0, 1])
    else:
        lost = {(1, 1): 1}
        monkeypatch.setattr(Fleet, "lost_after", lambda self, seed, epoch, client, n: lost.get((epoch, client)))
    chosen = method(Drop(threshold=100.0), state="own")
    history = fit(halves(), data((16, 16)), method=chosen, training=training(4)).history
    # The first loss is a fall from infinity and so followed by A; every later fall is smaller: B, then C.
    assert [record.states for record in history.epochs] == ["AA", "AA", "BA", "CB"]
    assert [record.absent for record in history.epochs] == [[], [1], [], []]


def test_a_thousand_clients_take_the_memory_of_a_few(monkeypatch) -> None:
    from cutlayer.training.halves import HalfPool

    most: list[int] = []
    take = HalfPool.take

    def watched(self, owner: int):
        body = take(self, owner)
        most.append(self.in_memory)
        return body

    monkeypatch.setattr(HalfPool, "take", watched)
    chosen = method(Always(), strategy=SplitFedV2(), live=4)
    history = fit(halves(), data((2,) * 1000), method=chosen, training=training(1, batch_size=2)).history
    assert history.epochs[0].samples == 2000
    assert max(most) == 4


def test_the_average_is_weighted_and_exact_for_one() -> None:
    average = Average()
    first = {"a": torch.tensor([1.0, 1e-3]), "n": torch.tensor(3)}
    average.add(first, 7)
    alone = average.take()
    assert all(torch.equal(alone[name], value) for name, value in first.items())
    assert average.take() == {}
    average.add(first, 1)
    average.add({"a": torch.tensor([4.0, 0.0]), "n": torch.tensor(2)}, 2)
    both = average.take()
    torch.testing.assert_close(both["a"], torch.tensor([3.0, 1e-3 / 3]))
    assert both["n"] == 3


def test_weights_that_do_not_fit_are_refused_and_change_nothing() -> None:
    half = halves(norm=True).client
    good = half.state_dict()
    before = {name: value.clone() for name, value in good.items()}
    shared = SharedHalf(good)

    def upload(tensors: dict[str, torch.Tensor]) -> Received:
        return read(weights_frame(Weights(0, 0), tensors))

    nan = {**good, "0.bias": torch.full((8,), float("nan"))}
    wrong = {
        "0.bias": [{**good, "0.bias": torch.zeros(9)}, {**good, "0.bias": torch.zeros(8).long()}],
        "1.weight": [{name: value for name, value in good.items() if name != "1.weight"}],
        "more": [{**good, "more": torch.zeros(1)}],
    }
    for name, cases in wrong.items():
        for tensors in cases:
            with pytest.raises(RefusedError, match=rf"client 3: weights: expected those of .*\['{name}'\] differ"):
                shared.add(3, upload(tensors), 1)
            with pytest.raises(RefusedError, match=rf"weights: expected those of the client half, \['{name}'\] differ"):
                load_weights(half, upload(tensors), "client 3")
    with pytest.raises(RefusedError, match=r"weights: expected finite values, got infinities or NaN in \['0.bias'\]"):
        shared.add(3, upload(nan), 1)
    with pytest.raises(RefusedError, match="finite"):
        load_weights(half, upload(nan), "client 3")
    shared.average()
    assert shared.tensors == {}
    assert all(torch.equal(value, before[name]) for name, value in half.state_dict().items())


class Scripted:
    """A client that sends these frames, one after the other; a refusal is an error."""

    number = 0

    def __init__(self, *frames: bytes) -> None:
        self.frames = list(frames)

    def send(self, frame: bytes) -> None:
        pass

    def receive(self) -> bytes:
        return self.frames.pop(0)

    def refuse(self, error: RefusedError) -> None:
        raise error


def server_of_two(schedule=None) -> Server:
    infos = [ClientSummary(8, 0, 8), ClientSummary(8, 0, 8)]
    job = Job(nn.Linear(8, 3), (8,), Method(schedule or Always()), Training(), Task())
    server = Server(job, infos, Ledger())
    server.begin()
    return server


def step(epoch: int, number: int, **more: object) -> bytes:
    activations = get_codec("fp32").encode(torch.ones(8, 8))
    ids = torch.arange(8)
    tensors = {"ids": encode_exactly(ids), "labels": encode_exactly(ids % 3), "activations": activations}
    return pack(Frame(Step(0, epoch, number, **more), tensors))


def after_a_step(server: Server, *then: bytes) -> LiveParticipant:
    """A client whose first step was trained on."""
    party = LiveParticipant(server, Scripted(step(server.states.epoch, 0), *then))
    part = party.next_batch()
    assert part is not None
    party.answer(server.train([part])[0])
    return party


def test_weights_at_the_wrong_time_are_refused() -> None:
    weights = halves().client.state_dict()
    good = weights_frame(Weights(0, 0, 1, True), weights)
    for wrong in (Weights(1, 0, 1, True), Weights(0, 1, 1, True), Weights(0, 0, 2, True), Weights(0, 0, 1, False)):
        server = server_of_two()
        with pytest.raises(RefusedError, match="client 0: expected"):
            after_a_step(server, weights_frame(wrong, weights)).next_batch()
    with pytest.raises(RefusedError, match="client 0: expected"):
        LiveParticipant(
            server_of_two(), Scripted(weights_frame(Weights(0, 0, 0, True), weights))
        ).next_batch()  # before a step
    server = server_of_two()
    with pytest.raises(RefusedError, match="in an A epoch, once"):
        after_a_step(server, good, good).next_batch()
    server = server_of_two(Periodic(period=3))
    server.train([server.take(read(step(0, 0)))])
    server.finish()
    server.begin()
    assert server.states.exchange is Exchange.ACTIVATIONS
    with pytest.raises(RefusedError, match="in an A epoch, once"):
        after_a_step(server, weights_frame(Weights(0, 1, 1, True), weights)).next_batch()
    server.average()
    assert server.shared.tensors == {}


def test_a_client_that_never_ends_is_refused() -> None:
    server = server_of_two()
    party = after_a_step(server, step(0, 1), step(0, 2))
    part = party.next_batch()  # a sampler may make an epoch longer than the data
    assert part is not None
    party.answer(server.train([part])[0])
    with pytest.raises(RefusedError, match="expected the end of its epoch, got another step"):
        party.next_batch()


def test_in_parallel_split_learning_one_clients_labels_do_not_end_the_others() -> None:
    """Labels that the loss does not take; and parts of a step, which would keep the server from its update."""
    infos = [ClientSummary(8, 0, 8), ClientSummary(8, 0, 8)]
    chosen = Method(Always(), fleet=Fleet(strategy=ParallelSplit()))
    task = Task(lambda outputs, labels: nn.functional.nll_loss(outputs.log_softmax(1), labels), {})
    server = Server(Job(nn.Linear(8, 3), (8,), chosen, Training(), task), infos, Ledger())
    server.begin()
    with pytest.raises(RefusedError, match="microbatches: expected 1"):
        server.take(read(step(0, 0, microbatches=2, samples=8)))
    activations = get_codec("fp32").encode(torch.ones(8, 8))
    ids = torch.arange(8)
    frames = []
    for client, labels in ((0, ids), (0, ids % 3), (1, ids % 3)):  # client 0 sends classes up to 7 of 3, then good ones
        tensors = {"ids": encode_exactly(ids), "labels": encode_exactly(labels), "activations": activations}
        frames.append(pack(Frame(Step(client, 0, 0), tensors)))
    refused: list[str] = []

    class Lenient(Scripted):
        def refuse(self, error: RefusedError) -> None:
            refused.append(str(error))

    peers = [Lenient(frames[0], frames[1], pack(Frame(Done(0, 0, 1, {})))), Lenient(frames[2])]
    peers[1].number, peers[1].frames = 1, [frames[2], pack(Frame(Done(1, 0, 1, {})))]
    server.share = None  # halves are not the subject
    server.strategy.train(server, [LiveParticipant(server, peer) for peer in peers])
    assert server.samples == 16
    assert len(refused) == 1
    assert "the loss failed on" in refused[0]


def test_choices_that_cannot_be_are_named() -> None:
    for wrong in (
        lambda: Fleet(fraction=0.0),
        lambda: Fleet(dropout=1.0),
        lambda: Fleet(state="both"),  # type: ignore[arg-type]
        lambda: Fleet(live=0),
        lambda: Fleet(strategy="parallel"),  # type: ignore[arg-type]
        lambda: SplitFedV1(average_every=0),
        lambda: make_strategy("federated"),
        lambda: make_strategy("sequential", 3),
    ):
        with pytest.raises(ConfigError):
            wrong()
    with pytest.raises(ConfigError, match="leave microbatches at 1"):
        fit(halves(), data(), method=method(strategy=ParallelSplit()), training=training(1, microbatches=2))
    with pytest.raises(ConfigError, match="expected training data of at least one client"):
        fit(halves(), [])
    other = torch.utils.data.TensorDataset(torch.randn(8, 5), torch.zeros(8).long())
    with pytest.raises(ConfigError, match=r"client 1: expected samples torch.float32 \[6\], as the others'"):
        fit(halves(), [data()[0], other])
