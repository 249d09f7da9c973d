"""Kills and lost connections change nothing: the same bits, and every step once. The short form of `faults`."""

import re
import signal
import time
from pathlib import Path

import pytest

from cutlayer.backends.grpc.certs import make_certificates
from tests.helpers import faults
from tests.helpers.processes import join, port_of, records, serve, weights


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> tuple[dict, list[dict]]:
    found = faults.undisturbed(tmp_path_factory.mktemp("undisturbed"))
    assert "".join(record["exchange"] for record in found[1]) == "ABCCABCC"
    return found


def test_killed_client_and_server_resume_to_the_same_bits(expected, tmp_path: Path) -> None:
    got_weights, got_records, kills = faults.killed(tmp_path, kills=3, seed=3)
    assert len(kills) == 3
    assert got_weights == expected[0]
    assert got_records == expected[1]


def test_lost_connections_lose_no_step_and_repeat_none(expected, tmp_path: Path) -> None:
    got_weights, got_records, drops = faults.dropped(tmp_path, drops=12)
    assert drops >= 5
    assert got_weights == expected[0]
    assert got_records == expected[1]


def test_a_black_hole_is_noticed_on_both_sides_and_costs_no_step(expected, tmp_path: Path) -> None:
    """In the middle of the first A epoch, whose frames are some 80,000 bytes upwards, all bytes begin to vanish."""
    make_certificates(tmp_path / "tls", ["client"])
    with serve(tmp_path, "--keepalive", 2) as server:
        proxy = faults.Proxy(port_of(server), hole_after=30_000)
        with join(tmp_path, proxy.port, "--keepalive", 2) as client:
            assert proxy.hole.wait(60), client.output
            started = time.monotonic()
            client.wait_for("no connection to", timeout=10)
            server.wait_for("client: disconnected", timeout=10)
            noticed = time.monotonic() - started
            assert faults.epochs_done(tmp_path) == 0
            proxy.heal()
            assert client.wait() == 0, client.output
            assert server.wait() == 0, server.output
        proxy.close()
    assert noticed < 5, noticed  # by default it would take 10 s at least
    assert "back to the last checkpoint" not in server.output  # the same session went on
    assert weights(tmp_path) == expected[0]
    assert records(tmp_path / "server") == expected[1]


def test_a_client_that_stands_still_is_disconnected_and_may_come_back(expected, tmp_path: Path) -> None:
    make_certificates(tmp_path / "tls", ["client"])
    with serve(tmp_path, "--deadline", 2) as server, join(tmp_path, port_of(server)) as client:
        client.wait_for("epoch 1: A")
        client.signal(signal.SIGSTOP)
        server.wait_for("nothing in 2 s; disconnected", timeout=10)
        server.wait_for("client: disconnected", timeout=10)
        assert faults.epochs_done(tmp_path) < len(expected[1])
        client.signal(signal.SIGCONT)
        assert client.wait() == 0, client.output
        assert server.wait() == 0, server.output
    assert "back to the last checkpoint" not in server.output
    assert weights(tmp_path) == expected[0]
    assert records(tmp_path / "server") == expected[1]


def test_signals_end_both_sides_with_a_checkpoint_and_a_later_start_goes_on(expected, tmp_path: Path) -> None:
    make_certificates(tmp_path / "tls", ["client"])
    port = faults.free_port()
    with serve(tmp_path, listen=f"127.0.0.1:{port}") as server:
        port_of(server)
        with join(tmp_path, port) as client:
            client.wait_for("epoch 1: A")
            client.signal(signal.SIGTERM)
            assert client.wait() == 0
            assert "stopped" in client.output
        server.signal(signal.SIGINT)
        assert server.wait() == 0
        assert re.search("stopped.*goes on with", server.output)
    done = faults.epochs_done(tmp_path)
    assert done < len(expected[1])
    with serve(tmp_path, listen=f"127.0.0.1:{port}") as server, join(tmp_path, port) as client:
        assert client.wait() == 0, client.output
        assert server.wait() == 0, server.output
    assert weights(tmp_path) == expected[0]
    assert records(tmp_path / "server") == expected[1]
