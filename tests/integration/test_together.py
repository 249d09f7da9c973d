"""Several clients, and clients that are away in C epochs. Server and clients are threads here, connected over gRPC."""

import contextlib
import threading
import time
from pathlib import Path

import torch

from cutlayer import Halves
from cutlayer.config import Config
from cutlayer.data import Images, outline
from cutlayer.history import EpochRecord
from cutlayer.remote import Served, Stop, join, serve
from cutlayer.remote.signals import Stopped
from cutlayer.training import fit

CUT = (16, 4, 4)


class Together:
    """A server in a thread, without TLS, on this machine."""

    def __init__(self, config: Config, folder: Path, clients: tuple[str, ...], on_epoch=None) -> None:
        self.config, self.folder = config, folder
        self.served: Served | None = None
        listening = threading.Event()

        def ready(port: int) -> None:
            self.port = port
            listening.set()

        def run() -> None:
            self.served = serve(
                config.halves(outline("digits")).server,
                CUT,
                listen="127.0.0.1:0",
                run=folder / "server",
                clients=clients,
                method=config.method(),
                training=config.training(),
                on_epoch=on_epoch,
                on_listening=ready,
            )

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        assert listening.wait(20)

    def join(self, name: str, train: Images, test: Images, **more: object) -> torch.nn.Module:
        halves: Halves = self.config.halves(train)
        return join(
            f"127.0.0.1:{self.port}",
            halves.client,
            train,
            test,
            folder=self.folder / name,
            name=name,
            method=self.config.method(),
            training=self.config.training(),
            **more,
        )


def part(data: Images, start: int, end: int) -> Images:
    return Images(data.inputs[start:end], data.labels[start:end], data.mean, data.std, data.classes)


def test_several_clients_take_turns_and_speed_does_not_matter(tmp_path: Path) -> None:
    config = Config(epochs=3, batch_size=32, schedule="periodic", period=3, threads=1)
    train, test = config.datasets()
    # The second client has fewer batches than the first, and a smaller last one.
    data = {"alice": (part(train, 0, 128), part(test, 0, 40)), "bob": (part(train, 128, 200), part(test, 40, 60))}

    def run(folder: Path, late: str) -> tuple[dict[str, torch.Tensor], list[EpochRecord]]:
        together = Together(config, folder, ("alice", "bob"))
        halves: dict[str, torch.nn.Module] = {}

        def take_part(name: str) -> None:
            time.sleep(0.5 * (name == late))
            halves[name] = together.join(name, *data[name])

        threads = [threading.Thread(target=take_part, args=(name,), daemon=True) for name in data]
        for thread in threads:
            thread.start()
        for thread in (*threads, together.thread):
            thread.join(60)
        assert together.served is not None
        weights = {f"{name}.{key}": value for name, half in halves.items() for key, value in half.state_dict().items()}
        return {**weights, **together.served.half.state_dict()}, list(together.served.history.epochs)

    first, records = run(tmp_path / "first", "alice")
    second, _ = run(tmp_path / "second", "bob")
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert [record.exchange for record in records] == ["A", "B", "C"]
    assert [record.samples for record in records] == [200, 200, 200]
    # As in one process, and as `SplitFedV2` says: at the end all have the average.
    sets, tests = ([pair[place] for pair in data.values()] for place in (0, 1))
    expected = fit(config.halves(train), sets, tests, method=config.method(), training=config.training())
    state = expected.halves.client.state_dict()
    assert all(torch.equal(first[f"{name}.{key}"], state[key]) for name in data for key in state)
    assert [record.loss for record in records] == expected.history.losses
    assert [record.test for record in records] == [record.test for record in expected.history.epochs]


def test_a_client_may_be_away_in_c_epochs(tmp_path: Path) -> None:
    config = Config(epochs=6, train_samples=128, test_samples=40, schedule="periodic", period=6, threads=1)
    train, test = config.datasets()
    seen: list[str] = []
    left, stop = threading.Event(), Stop()

    def note(record: EpochRecord) -> None:
        seen.append(record.exchange)
        if record.exchange == "C":  # these epochs are so short that they could be over before the client has left
            left.wait(20)

    together = Together(config, tmp_path, ("client",), on_epoch=note)

    def leave(exchange: str, epoch: int) -> None:
        stop.requested = exchange == "B"

    with contextlib.suppress(Stopped):
        together.join("client", train, test, on_epoch=leave, stop=stop)
    assert stop.requested
    assert len(seen) < 6
    left.set()
    deadline = time.monotonic() + 30
    while len(seen) < 6 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "".join(seen) == "ABCCCC"  # without the client
    half = together.join("client", train, test)  # which comes back to hear that the run has ended
    together.thread.join(30)
    assert together.served is not None
    expected = fit(config.halves(train), train, test, method=config.method(), training=config.training())
    weights = {**half.state_dict(), **together.served.half.state_dict()}
    assert all(torch.equal(value, weights[name]) for name, value in expected.model.state_dict().items())
