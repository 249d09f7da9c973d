"""The bytes and FLOPs that a plan predicts are those that a run of it counts, to the byte."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from cutlayer import (
    Fleet,
    Halves,
    Method,
    Optimizer,
    Periodic,
    Task,
    Training,
    fit,
    run_experiment,
    split,
    with_choices,
)
from cutlayer.backends.client_data import client_data_of
from cutlayer.models.flops import FlopTable
from cutlayer.planning.choice import plan_of
from cutlayer.planning.load import Load
from cutlayer.planning.recipe import load_of
from cutlayer.planning.traffic import Traffic
from cutlayer.runs.client_half import LocalLoss
from cutlayer.runs.recipes import digits
from cutlayer.schedule import Always, Once, Outlook, Schedule, Settle
from cutlayer.strategies import ParallelSplit, Sequential, SplitFedV1, SplitFedV2

SIZES = (300, 41, 24)
SGD = Optimizer(lr=1e-4, schedule="constant")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(108, 4)
    )


def dataset(samples: int) -> TensorDataset:
    draw = torch.Generator().manual_seed(samples)
    inputs = torch.randn(samples, 1, 8, 8, generator=draw)
    return TensorDataset(inputs, torch.randint(0, 4, (samples,), generator=draw))


def agree(
    halves: Halves, method: Method, training: Training, clients: int | tuple[int, ...], tests: int | None = 37
) -> None:
    parts = [dataset(size) for size in (SIZES[:clients] if isinstance(clients, int) else clients)]
    test = dataset(tests) if tests else None
    training = dataclasses.replace(training, client=SGD, server=SGD)
    result = fit(halves, parts, test, method=method, training=training)
    load = Load(client_data_of(parts, test), method, training)
    with torch.no_grad():
        shape = tuple(halves.client.eval()(dataset(2).tensors[0]).shape[1:])
    table = FlopTable(halves.client, (1, 8, 8), torch.float32)
    schedule = method.schedule.for_run(Outlook(training.epochs))
    predicted = list(Traffic(load, halves.client, shape, schedule).epochs())
    for record, epoch in zip(result.history.epochs, predicted, strict=True):
        assert (epoch.exchange, epoch.bytes) == (record.exchange, record.bytes), f"epoch {record.epoch}"
        assert epoch.client_flops(table) == record.flops["client"], f"epoch {record.epoch}"


SCHEDULES = [Always(), Periodic(period=4), Once(warmup=2), Settle(both=2, activations=2, averaged=0.5)]


@pytest.mark.parametrize("codec", ["fp32", "fp8", "hfp8", "mxfp4", "nvfp4", "int4", "topk0.1>fp16/ef>int8"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_codecs_and_schedules(codec: str, schedule: Schedule) -> None:
    agree(split(network(), "2"), Method.of(schedule, codec), Training(epochs=6, batch_size=32), 1)


@pytest.mark.parametrize("cut", ["0", "2", "3", "4"])
def test_cuts(cut: str) -> None:
    agree(split(network(), cut), Method.of(Periodic(period=3), "fp8"), Training(epochs=4, batch_size=40), 1, None)


STRATEGIES = [Sequential(), SplitFedV1(), SplitFedV2(average_every=2), ParallelSplit(), ParallelSplit(average_every=3)]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: f"{type(s).__name__}{s.share}")
def test_clients(strategy: object) -> None:
    for norm in ("calibrated", "eval", "train") if strategy == STRATEGIES[2] else ("calibrated",):
        clients(strategy, norm)


def clients(strategy: object, norm: str) -> None:
    method = Method.of(Periodic(period=4), "fp8", norm_in_b=norm, fleet=Fleet(strategy=strategy))
    agree(split(network(), "2"), method, Training(epochs=9, batch_size=8, evaluate_every=2), 3)


def test_some_of_the_clients_each_with_a_state_of_its_own() -> None:
    method = Method.of(Periodic(period=3), "fp8", fleet=Fleet(fraction=0.5, state="own"))
    agree(split(network(), "2"), method, Training(epochs=9, batch_size=16), 3)


def test_counters_and_numbers_that_take_more_bytes_as_they_grow() -> None:
    method = Method.of(Periodic(period=26), "fp8")
    agree(split(network(), "2"), method, Training(epochs=2, batch_size=1), 1, None)
    agree(split(network(), "2"), method, Training(epochs=131, batch_size=12, evaluate_every=50), (24, 24))


@pytest.mark.parametrize("change", [{"narrow": 4}, {"padding": 2}, {"narrow": 2, "padding": 2}], ids=str)
def test_what_a_recipe_has_at_its_cut(change: dict[str, int]) -> None:
    config = with_choices(
        digits(), schedule="periodic", period=3, epochs=4, train_samples=80, test_samples=20, **change
    )
    load, network = load_of(config)[0], config.network(config.data.outline())
    at_cut = lambda halves: config.at_cut(halves, config.data.outline())  # noqa: E731
    planned = plan_of(network, load, Task(), ["layer3"], None, None, at_cut=at_cut)["layer3"]
    history = run_experiment(config, progress=False).history
    assert planned.run_bytes["up"] + planned.run_bytes["down"] == history.bytes()
    assert planned.run_bytes["evaluation"] == history.bytes(kinds=("evaluation",))
    assert planned.client_flops == history.flops("client")
    assert planned.evaluation_flops == history.evaluation_flops > 0
    others = plan_of(network, load, Task(), None, None, None, at_cut=at_cut)
    assert {"layer1", "layer4"} <= {each.cut for each in others.cuts}
    assert ("pool" in others.left_out) == ("padding" in change)  # one value of a map, of which there is no window


@pytest.mark.parametrize(
    "special",
    [{"bind": 4}, {"bind": 4, "microbatches": 2}, {"client_half": LocalLoss(every=3)}, {"client_half": LocalLoss(1)}],
    ids=str,
)
def test_samples_that_cross_as_one_and_clients_that_train_by_themselves(special: dict[str, Any]) -> None:
    """C3-SL and CSE-FSL: 5 batches an epoch, the last of which is neither whole nor a multiple."""
    chosen = {"schedule": "always", "codec": "fp8", "epochs": 3, "batch_size": 32, "evaluate_every": 2}
    half = special.pop("client_half", None)
    config = with_choices(digits(), **chosen, **special, train_samples=150, test_samples=45, width=0.5)
    config = dataclasses.replace(config, client_half=half)
    load, network = load_of(config)[0], config.network(config.data.outline())
    at_cut = lambda halves: config.at_cut(halves, config.data.outline())  # noqa: E731
    planned = plan_of(network, load, Task(), ["layer3"], None, None, at_cut=at_cut)["layer3"]
    history = run_experiment(config, progress=False).history
    assert planned.exact
    assert [planned.run_bytes[way] for way in ("up", "down")] == [history.bytes(way) for way in ("up", "down")]
    assert planned.run_bytes["evaluation"] == history.bytes(kinds=("evaluation",)) > 0
    assert planned.client_flops == history.flops("client")
    assert planned.evaluation_flops == history.evaluation_flops > 0
    # Who trains by itself has to in every epoch, and what it sends is stored.
    assert (planned.client_memory[0] == planned.client_memory[1]) == (half is not None)
    assert (planned.store_bytes > 0) == (half is not None)


def test_microbatches_and_a_frozen_half() -> None:
    training = Training(epochs=4, batch_size=30, microbatches=4)
    agree(split(network(), "2"), Method.of(Periodic(period=2), "fp8"), training, 2)
    halves = split(network(), "2")
    halves.client.requires_grad_(False)
    agree(halves, Method.of(Periodic(period=2), "fp8"), Training(epochs=4, batch_size=30), 2)
