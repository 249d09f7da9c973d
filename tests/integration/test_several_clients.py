"""Several clients, and clients that are away in C epochs. Server and clients are threads here, connected over gRPC."""

import contextlib
import threading
import time
from pathlib import Path

import pytest
import torch

from cutlayer.data.images import Images
from cutlayer.records.history import EpochRecord
from cutlayer.runs.choices import with_choices
from cutlayer.runs.fit import fit
from cutlayer.runs.recipes import digits
from cutlayer.runs.run import Run
from cutlayer.runs.serve import Waits
from cutlayer.stop_request import Stop, Stopped
from tests.helpers.threads import Together, in_process, part, shares


def test_several_clients_take_turns_and_speed_does_not_matter(tmp_path: Path) -> None:
    config = with_choices(digits(), epochs=3, batch_size=32, schedule="periodic", period=3, threads=1)
    train, test = config.datasets()
    # The second client has fewer batches than the first, and a smaller last one.
    data = {"alice": (part(train, 0, 128), part(test, 0, 40)), "bob": (part(train, 128, 200), part(test, 40, 60))}

    def run(folder: Path, late: str) -> tuple[dict[str, torch.Tensor], list[EpochRecord]]:
        together = Together(config, folder, ("alice", "bob"))
        halves = together.join_all(data, late, 60)
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
    expected = fit(config.halves(train), sets, tests, method=config.method, training=config.training)
    state = expected.halves.client.state_dict()
    assert all(torch.equal(first[f"{name}.{key}"], state[key]) for name in data for key in state)
    assert [record.loss for record in records] == expected.history.losses
    history = Run(tmp_path / "first" / "server").history()
    assert history.baseline == expected.history.baseline
    assert history.all_bytes_reduction == pytest.approx(expected.history.all_bytes_reduction, rel=0.01)
    assert expected.history.merged
    assert (history.merged, history.given_up) == ({}, {})
    assert [record.test for record in records] == [record.test for record in expected.history.epochs]


SEVERAL = {
    "sequential": {"strategy": "sequential"},
    "splitfed_v1": {"strategy": "splitfed_v1", "average_every": 2},
    "splitfed_v2": {"strategy": "splitfed_v2", "state": "own", "schedule": "drop", "threshold": 0.5},
    "parallel": {"strategy": "parallel"},
    "some": {"strategy": "splitfed_v2", "fraction": 0.5, "codec": "delta>mxfp4+zstd/ef>mxfp4"},
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_clients_between_processes_give_the_bits_of_one_process(name: str, tmp_path: Path) -> None:
    """The conformance of test_backends.py, for several clients."""
    settings = {"schedule": "periodic", "period": 4, **SEVERAL[name]}
    config = with_choices(digits(), epochs=6, batch_size=32, test_samples=100, threads=1, **settings)
    data = shares(config, ("alice", "bob", "carol"))
    together = Together(config, tmp_path, tuple(data))
    halves = together.join_all(data)
    assert together.served is not None
    expected = in_process(config, data)
    for half in halves.values():
        assert all(torch.equal(v, half.state_dict()[k]) for k, v in expected.halves.client.state_dict().items())
    server = together.served.half.state_dict()
    assert all(torch.equal(value, server[key]) for key, value in expected.halves.server.state_dict().items())
    assert len(halves) == 3
    for got, wanted in zip(together.served.history.epochs, expected.history.epochs, strict=True):
        assert (got.loss, got.exchange, got.states) == (wanted.loss, wanted.exchange, wanted.states)
        assert (got.test, got.flops) == (wanted.test, wanted.flops)
        for way in ("up", "down"):
            told = ("control", "evaluation")  # between processes clients tell of their FLOPs
            kinds = [{k: v for k, v in each.bytes[way].items() if k not in told} for each in (got, wanted)]
            assert kinds[0] == kinds[1]


def test_with_patience_the_others_go_on_and_the_lost_one_comes_back(tmp_path: Path) -> None:
    """Bob's process dies in the midst of epoch 1; it is started again, and takes part to the end."""
    # Reads are counted, and measuring batch norm's statistics would add to them.
    config = with_choices(
        digits(), epochs=8, batch_size=32, test_samples=40, schedule="always", norm_in_b="eval", threads=1
    )
    data = shares(config, ("alice", "bob"))
    seen: list[EpochRecord] = []
    again = threading.Event()

    def note(record: EpochRecord) -> None:
        seen.append(record)
        if len(seen) == 4:
            again.set()
            time.sleep(2.0)  # for bob to be there in the next epoch

    together = Together(config, tmp_path, tuple(data), on_epoch=note, waits=Waits(patience=1.0))

    class Cut(Exception):  # noqa: N818
        pass

    def bob() -> None:
        train = data["bob"][0]
        dying = DyingSet(train)
        with pytest.raises(Cut):
            together.join("bob", dying, None)
        assert again.wait(60)
        together.join("bob", train, None)

    class DyingSet(torch.utils.data.Dataset):
        def __init__(self, images: Images) -> None:
            self.images, self.reads = images, 0

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            self.reads += 1
            if self.reads > 180:  # a batch of the second epoch has been answered, the next is in hand
                raise Cut
            return self.images[index]

    threads = [threading.Thread(target=together.join, args=("alice", *data["alice"]), daemon=True)]
    threads.append(threading.Thread(target=bob, daemon=True))
    for thread in threads:
        thread.start()
    for thread in (*threads, together.thread):
        thread.join(120)
    assert together.served is not None
    samples = [record.samples for record in seen]
    assert samples[0] == 200
    assert min(samples) == 96  # alice alone
    assert samples[-1] == 200  # bob is back
    assert samples[1] == 96 + 32  # what he sent before he died counts
    assert [record.absent for record in seen][:3] == [[], [1], [1]]
    assert len(samples) == 8


def test_a_client_may_be_away_in_c_epochs(tmp_path: Path) -> None:
    config = with_choices(
        digits(), epochs=6, train_samples=128, test_samples=40, schedule="periodic", period=6, threads=1
    )
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
    expected = fit(config.halves(train), train, test, method=config.method, training=config.training)
    weights = {**half.state_dict(), **together.served.half.state_dict()}
    assert all(torch.equal(value, weights[name]) for name, value in expected.model.state_dict().items())
