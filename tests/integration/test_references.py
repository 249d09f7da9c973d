"""References of both sides in real runs: parts of batches, damage and loss on either side, kills."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from cutlayer import Fleet, StoreOptions, fit
from cutlayer.backends.grpc.certs import make_certificates
from cutlayer.memory.store import Placement
from cutlayer.runs.choices import with_choices
from cutlayer.runs.recipes import digits
from tests.helpers import faults
from tests.helpers.processes import CONFIG, join, port_of, run_in_process, serve

CODEC = "delta0.2>mxfp4+zstd/ef>topk0.2>fp8_e5m2"
SMALL = {**CONFIG, "codec": CODEC, "schedule": "always", "epochs": 5}
WARNING = "references differ from the server's: all activations of this epoch are sent in full"


def run(folder: Path, stop: int = -1, **changes: object) -> list[dict]:
    """A run in process, interrupted after the epoch `stop`; its records."""
    config = with_choices(digits(), **{**SMALL, **changes})
    train, test = config.datasets()

    def stopping(record) -> None:
        if record.epoch == stop:
            raise KeyboardInterrupt

    arguments = {"method": config.method, "training": config.training, "run": folder, "on_epoch": stopping}
    with suppress(KeyboardInterrupt):
        fit(config.halves(train), train, test, resume=True, **arguments)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def sent_up(records: list[dict]) -> list[int]:
    return [record["bytes"]["up"]["activations"] for record in records]


def rows(place: Path) -> np.ndarray:
    return np.load(place / "rows.npy")


def flip_a_bit(place: Path) -> None:
    """Damage that a checksum of the file system would have seen, in the middle of a reference."""
    file = next(place.rglob("rows.npy"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()  # checkpoints may share it
    file.write_bytes(bytes(content))


def remove(place: Path) -> None:
    shutil.rmtree(place)


@pytest.mark.parametrize(("microbatches", "placement"), [(1, "memory"), (3, "disk")])
def test_both_sides_end_with_the_same_references(microbatches: int, placement: Placement, tmp_path: Path) -> None:
    records = run(tmp_path, microbatches=microbatches, store=StoreOptions(placement))
    last = max((tmp_path / "checkpoints").iterdir())
    assert np.array_equal(rows(last / "references"), rows(last / "store"))
    assert min(sent_up(records)) < max(sent_up(records))  # some samples were not sent


@pytest.mark.parametrize("damage", [flip_a_bit, remove])
def test_references_that_differ_are_sent_anew(
    damage: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The client's; if the server's are damaged the run goes back behind them, as with anything else of it."""
    undisturbed = run(tmp_path / "a")
    run(tmp_path / "b", stop=2)
    damage(max((tmp_path / "b" / "checkpoints").iterdir()) / "references")
    with caplog.at_level(logging.WARNING, "cutlayer.client"):
        records = run(tmp_path / "b")
    assert [record.message for record in caplog.records].count(WARNING) == 1
    assert records[:3] == undisturbed[:3] or sent_up(records)[:3] == sent_up(undisturbed)[:3]
    assert sent_up(records)[3] > 1.2 * sent_up(undisturbed)[3]
    assert sent_up(records)[4] < sent_up(records)[3]  # in step again
    last = max((tmp_path / "b" / "checkpoints").iterdir())
    assert np.array_equal(rows(last / "references"), rows(last / "store"))


def test_kills_of_client_and_server_change_nothing(tmp_path: Path) -> None:
    weights, records, _ = run_in_process(tmp_path / "here", codec=CODEC)
    got_weights, got_records, kills = faults.killed(tmp_path / "there", kills=3, seed=5, codec=CODEC)
    assert len(kills) == 3
    assert got_weights == weights
    assert got_records == records


@pytest.mark.parametrize("damage", [flip_a_bit, remove])
def test_a_client_that_lost_its_references_sends_all_anew(damage: Callable[[Path], None], tmp_path: Path) -> None:
    make_certificates(tmp_path / "tls", ["client"])
    port = faults.free_port()
    config = {name: value for name, value in SMALL.items() if name not in CONFIG or CONFIG[name] != value}
    with serve(tmp_path, listen=f"127.0.0.1:{port}", **config) as server:
        port_of(server)
        with join(tmp_path, port) as client:
            client.wait_for("epoch 2: A")
            client.kill()
        checkpoints = tmp_path / "client" / "checkpoints"
        for references in checkpoints.glob("epoch-*/references"):  # whichever the server names
            if any(references.glob("rows.npy")):  # there are none before the first epoch
                damage(references)
        with join(tmp_path, port) as client:
            assert client.wait() == 0, client.output
            assert WARNING in client.output
        assert server.wait() == 0, server.output
    here, there = max(checkpoints.iterdir()), max((tmp_path / "server" / "checkpoints").iterdir())
    assert np.array_equal(rows(here / "references"), rows(there / "store"))


def test_each_of_several_clients_has_its_references(tmp_path: Path) -> None:
    """Also if clients are lost in the midst of epochs."""
    config = with_choices(digits(), **{**SMALL, "epochs": 8})
    train, test = config.datasets()
    parts = [train.first(150), train.first(60)]
    method = dataclasses.replace(config.method, fleet=Fleet(dropout=0.3))
    assert any(method.fleet.lost_after(0, epoch, 0, 3) is not None for epoch in range(8))
    result = fit(config.halves(train), parts, test, method=method, training=config.training, run=tmp_path)
    assert result.history.losses[-1] < result.history.losses[0]
    last = next((tmp_path / "checkpoints").iterdir())
    for number, kept in enumerate(np.split(rows(last / "store"), [150])):
        assert np.array_equal(rows(last / f"references_{number}"), kept)
