"""Several clients: each mode against a plain loop written out by hand, and against the run with one client."""

import copy
import dataclasses
import itertools

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from cutlayer import Always, CustomOptimizer, Fleet, Halves, Method, Periodic, StoreOptions, Training, fit
from cutlayer.seeds import generator
from cutlayer.strategies import STRATEGIES, ParallelSplit, Sequential, SplitFedV1, SplitFedV2, Strategy
from tests.helpers.small import SGD, close, data, equal, halves, training


def train(
    mode: Strategy, sets: list[TensorDataset], chosen: Training, *, norm: bool = False, **fleet: object
) -> Halves:
    return fit(
        halves(norm),
        sets,
        method=Method(Always(), norm_in_b="eval", fleet=Fleet(strategy=mode, **fleet)),
        training=chosen,
    ).halves


class Learner:
    """A module with its optimizer, as one writes it."""

    def __init__(self, module: nn.Module, momentum: float = 0.9) -> None:
        self.module = copy.deepcopy(module)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=0.1, momentum=momentum, weight_decay=5e-4)


def joint_step(client: Learner, server: Learner, inputs: torch.Tensor, labels: torch.Tensor) -> None:
    loss = cross_entropy(server.module(client.module(inputs)), labels)
    for learner in (client, server):
        learner.optimizer.zero_grad()
    loss.backward()
    for learner in (client, server):
        learner.optimizer.step()


def average(learners: list[Learner], weights: list[int]) -> None:
    """FedAvg of the modules, in place."""
    states = [learner.module.state_dict() for learner in learners]
    mean = {
        name: sum(w * state[name].double() for w, state in zip(weights, states, strict=True)) / sum(weights)
        for name in states[0]
        if states[0][name].is_floating_point()
    }
    for learner in learners:
        learner.module.load_state_dict(mean, strict=False)


def batches(part: TensorDataset, size: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    inputs, labels = part.tensors
    return list(zip(inputs.split(size), labels.split(size), strict=True))


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("state", ["shared", "own"])
def test_with_one_client_every_mode_is_plain_split_learning_bit_for_bit(name: str, state: str) -> None:
    results = []
    for sets, fleet in ((data((40,))[0], Fleet()), (data((40,)), Fleet(strategy=STRATEGIES[name](), state=state))):
        method = Method.of(Periodic(period=4), "fp8")
        method = Method(method.schedule, method.activations, method.gradients, fleet=fleet)
        results.append(fit(halves(norm=True), sets, sets, method=method, training=training(6)))
    plain, alone = results
    assert equal(alone.model, plain.model)
    assert alone.history.losses == plain.history.losses
    assert [r.bytes for r in alone.history.epochs] == [r.bytes for r in plain.history.epochs]
    assert alone.history.bytes(kinds=["weights"]) == 0


@pytest.mark.parametrize(
    ("sizes", "batch_size", "momentum"),
    [((24, 16, 8), 24, 0.9), ((24, 24, 24), 8, 0.9), ((24, 16, 8), 8, 0.0), ((24, 24, 12), 8, 0.0)],
)
def test_parallel_split_learning_is_uncut_training_on_the_whole_batch(
    sizes: tuple[int, ...], batch_size: int, momentum: float
) -> None:
    """Up to float addition. Without momentum small clients may run out of batches earlier than others."""
    sets = data(sizes)
    uncut = Learner(nn.Sequential(*halves().client, *halves().server), momentum)
    queues = [batches(part, batch_size) for part in sets]
    for _ in range(10):
        for step in range(max(map(len, queues))):
            parts = [queue[step] for queue in queues if len(queue) > step]
            inputs, labels = (torch.cat([part[place] for part in parts]) for place in (0, 1))
            loss = cross_entropy(uncut.module(inputs), labels)
            uncut.optimizer.zero_grad()
            loss.backward()
            uncut.optimizer.step()
    chosen = dataclasses.replace(SGD, momentum=momentum)
    options = dataclasses.replace(training(10, batch_size), client=chosen, server=chosen)
    result = train(ParallelSplit(), sets, options)
    close(nn.Sequential(*result.client, *result.server), uncut.module)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("every", [None, 1, 2])
@pytest.mark.parametrize("version", [1, 2])
def test_splitfed_against_a_plain_loop(version: int, every: int | None, norm: bool) -> None:
    """Clients of 3, 2 and 1 batches, which end at different times, and momentum of their own."""
    initial, sets = halves(norm), data()
    clients = [Learner(initial.client) for _ in sets]
    servers = [Learner(initial.server) for _ in sets] if version == 1 else [Learner(initial.server)] * len(sets)
    evaluated = servers[0]
    for _ in range(2):
        queues, since = [batches(part) for part in sets], [0] * len(sets)
        for done in itertools.count(1):
            working = [c for c, queue in enumerate(queues) if len(queue) >= done]
            for c in working:
                inputs, labels = queues[c][done - 1]
                joint_step(clients[c], servers[c], inputs, labels)
                since[c] += len(labels)
            over = done == 3
            if over or (every and done % every == 0):
                for group in (clients, servers) if version == 1 else (clients,):
                    chosen = [c for c in range(len(sets)) if since[c]]
                    average([group[c] for c in chosen], [since[c] for c in chosen])
                    for c in range(len(sets)):  # those that are done hear of it when they come again
                        group[c].module.load_state_dict(group[chosen[0]].module.state_dict())
                since = [0] * len(sets)
            if over:
                break
    kind = SplitFedV1 if version == 1 else SplitFedV2
    result = train(kind(average_every=every), sets, training(), norm=norm)
    counters = ["1.num_batches_tracked"] if norm else []
    for got, expected in ((result.client, clients[0].module), (result.server, evaluated.module)):
        state = expected.state_dict()
        for name, value in got.state_dict().items():
            if name not in counters:
                torch.testing.assert_close(value, state[name], rtol=1e-4, atol=1e-6)


def test_sequential_against_a_plain_loop() -> None:
    initial, sets = halves(), data()
    clients, server = [Learner(initial.client) for _ in sets], Learner(initial.server)
    newest = initial.client.state_dict()
    for _ in range(2):
        for client, part in zip(clients, sets, strict=True):
            client.module.load_state_dict(newest)
            for inputs, labels in batches(part):
                joint_step(client, server, inputs, labels)
            newest = copy.deepcopy(client.module.state_dict())
    result = train(Sequential(), sets, training())
    assert equal(result.client, clients[-1].module)
    assert equal(result.server, server.module)


@pytest.mark.parametrize("mode", [SplitFedV1(), ParallelSplit()])
def test_the_order_of_the_clients_does_not_matter_where_the_mode_says_so(mode: Strategy) -> None:
    sets = data()
    first, second = train(mode, sets, training()), train(mode, sets[::-1], training())
    close(first.client, second.client)
    close(first.server, second.server)


@pytest.mark.parametrize("mode", [kind() for kind in STRATEGIES.values()])
@pytest.mark.parametrize("state", ["shared", "own"])
def test_halves_on_the_disk_give_the_same_bits_as_halves_in_memory(mode: Strategy, state: str, tmp_path) -> None:
    # Adagrad has a state from the beginning.
    adagrad = CustomOptimizer(lambda parameters: torch.optim.Adagrad(parameters, 0.05))
    chosen = dataclasses.replace(training(6), client=adagrad, server=adagrad)
    results = []
    for live in (1, 16):
        fleet = Fleet(strategy=mode, live=live, fraction=0.7, dropout=0.3, state=state)
        store = StoreOptions(folder=str(tmp_path))
        method = Method(Periodic(period=4), "fp8_e4m3", "fp8_e5m2", store=store, fleet=fleet)
        results.append(fit(halves(norm=True), data((16, 16, 8, 8)), method=method, training=chosen))
    assert equal(results[0].model, results[1].model)
    assert results[0].history.losses == results[1].history.losses


@pytest.mark.parametrize("every", [None, 1, 2])
def test_splitfed_v1_averages_its_server_halves_at_the_same_steps_in_every_epoch(every: int | None) -> None:
    """A, B, C by hand: client halves are averaged in A, server halves in B and C, too."""
    sizes = (32, 32)
    sets = data(sizes)
    method = Method(Periodic(period=3), fleet=Fleet(strategy=SplitFedV1(average_every=every)))
    got = fit(halves(), sets, method=method, training=training(3)).halves
    clients, servers = ([Learner(half) for _ in sets] for half in (halves().client, halves().server))
    stored: list[TensorDataset] = []
    for epoch in range(3):
        if epoch == 1:
            with torch.no_grad():
                stored = [TensorDataset(clients[0].module(part.tensors[0]), part.tensors[1]) for part in sets]
        for step in range(4):
            for number, server in enumerate(servers):
                if epoch == 0:
                    joint_step(clients[number], server, *batches(sets[number])[step])
                    continue
                order = torch.arange(32)
                if epoch == 2:
                    name = ("replay", epoch, *((number,) if number else ()))
                    order = torch.randperm(32, generator=generator(0, *name))
                inputs, labels = stored[number][order[8 * step : 8 * step + 8]]
                server.optimizer.zero_grad()
                cross_entropy(server.module(inputs), labels).backward()
                server.optimizer.step()
            if step == 3 or (every and (step + 1) % every == 0):
                average(servers, [1, 1])
                if epoch == 0:
                    average(clients, [1, 1])
    close(got.client, clients[0].module)
    close(got.server, servers[0].module)
