"""A frozen client half on every backend: the same bits, and nothing but activations on the wire."""

import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from cutlayer import Fleet, Halves, Method, Once, Training, fit
from cutlayer.backends.ray import Ray
from cutlayer.records.history import History
from cutlayer.runs.join import join
from cutlayer.runs.serve import Callbacks, serve
from cutlayer.strategies import STRATEGIES

pytestmark = pytest.mark.xdist_group("ray")

TRAINING = Training(epochs=4, batch_size=8)
SIZES = (24, 16)
RAY = {"ray": {}, "ray, two workers": {"workers": 2, "cpus_per_worker": 0.5, "cpus_per_actor": 0.5, "actors": 1}}


def halves() -> Halves:
    torch.manual_seed(0)
    client = nn.Sequential(nn.Linear(4, 6), nn.ReLU()).requires_grad_(False)
    return Halves(client, nn.Linear(6, 3))


def sets() -> list[TensorDataset]:
    draw = torch.Generator().manual_seed(1)
    return [TensorDataset(torch.randn(n, 4, generator=draw), torch.randint(0, 3, (n,), generator=draw)) for n in SIZES]


def counted(history: History) -> list[tuple]:
    bytes_ = [
        {way: {**kinds, "control": 0, "evaluation": 0} for way, kinds in record.bytes.items()}
        for record in history.epochs
    ]
    return [(r.exchange, r.loss, r.test, sent, r.flops) for r, sent in zip(history.epochs, bytes_, strict=True)]


def over_grpc(method: Method, clients: int, folder: Path) -> tuple[History, nn.Module]:
    names = tuple(f"client{number}" for number in range(clients))
    ready, port, served = threading.Event(), [], []

    def on_listening(number: int) -> None:
        port.append(number)
        ready.set()

    def hold() -> None:
        half = halves().server
        served.append(
            serve(
                half, (6,), listen="127.0.0.1:0", run=folder / "run", clients=names, method=method, training=TRAINING,
                client_half=halves().client, callbacks=Callbacks(on_listening=on_listening),
            )
        )  # fmt: skip

    def take_part(number: int, name: str) -> None:
        data = sets()[number]
        join(
            f"127.0.0.1:{port[0]}", halves().client, data, data, folder=folder / name, name=name, method=method,
            training=TRAINING,
        )  # fmt: skip

    threads = [threading.Thread(target=hold, daemon=True)]
    threads[0].start()
    assert ready.wait(20)
    threads += [threading.Thread(target=take_part, args=pair, daemon=True) for pair in enumerate(names)]
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(60)
    return served[0].history, served[0].half


@pytest.mark.parametrize("clients", [1, 2])
@pytest.mark.parametrize("backend", ["grpc", "ray", "ray, two workers"])
def test_as_in_process(backend: str, clients: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    method = Method(Once(), fleet=Fleet(strategy=STRATEGIES["splitfed_v2"]()))
    data = sets()[:clients]
    expected = fit(halves(), data, data, method=method, training=TRAINING)
    assert expected.history.exchanges == "BCCC"
    assert expected.history.bytes("down", ["gradients", "weights"]) == 0
    if backend == "grpc":
        history, server = over_grpc(method, clients, tmp_path)
    else:
        request.getfixturevalue("cluster")
        result = fit(halves(), data, data, method=method, training=TRAINING, backend=Ray(**RAY[backend]))
        history, server = result.history, result.halves.server
    assert history.baseline == expected.history.baseline
    if "two" in backend:  # workers add floats in another order
        assert history.losses == pytest.approx(expected.history.losses)
        assert [epoch.bytes for epoch in history.epochs] == [epoch.bytes for epoch in expected.history.epochs]
        return
    assert counted(history) == counted(expected.history)
    for name, value in expected.halves.server.state_dict().items():
        assert torch.equal(server.state_dict()[name], value)
