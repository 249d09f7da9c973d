"""A client that comes and one that goes, as their users say it: real processes, and a server that is killed between."""

import json
import signal
import time
from pathlib import Path

from cutlayer.backends.grpc.certs import make_certificates
from cutlayer.cli.entry import main
from cutlayer.runs.findings import view_of
from tests.helpers.processes import Process, join, port_of, records, serve

RUN = {"epochs": 2000, "train_samples": 96, "batch_size": 32, "schedule": "periodic", "period": 4, "threads": 1}


def until_done(server: Process, folder: Path, epochs: int) -> None:
    deadline, file = time.monotonic() + 120, folder / "server" / "metrics.jsonl"
    while not file.exists() or file.read_bytes().count(b"\n") < epochs:
        assert time.monotonic() < deadline, server.output
        assert server.process.poll() is None, server.output
        time.sleep(0.01)


def test_a_client_is_admitted_the_server_killed_and_another_client_leaves(tmp_path: Path) -> None:
    make_certificates(tmp_path / "tls", ["alice", "bob", "carol"])
    names = tmp_path / "admit.txt"
    names.write_text("")

    def start(listen: str) -> Process:
        return serve(tmp_path, "--client", "alice", "bob", "--admit", names, "--linger", 20, listen=listen, **RUN)

    with start("127.0.0.1:0") as first:
        port = port_of(first)
        with join(tmp_path, port, name="alice") as alice, join(tmp_path, port, name="bob") as bob:
            until_done(first, tmp_path, 1)
            with join(tmp_path, port, name="carol") as stranger:
                assert stranger.wait() == 1
                assert "by its name in a file: serve --admit FILE, read again on SIGHUP" in stranger.output
            names.write_text("carol\n")
            first.signal(signal.SIGHUP)
            first.wait_for("admit: carol")
            with join(tmp_path, port, name="carol") as carol:
                first.wait_for(r"client carol was admitted after \d+ epochs")
                first.kill()
                with start(f"127.0.0.1:{port}") as second:
                    since = json.loads((tmp_path / "server" / "admitted.json").read_text())["clients"][0]["since"]
                    until_done(second, tmp_path, since + 2)
                    bob.signal(signal.SIGTERM)
                    assert bob.wait() == 0
                    for _ in range(2):
                        with join(tmp_path, port, "--leave", name="bob") as leaving:
                            assert leaving.wait() == 0, leaving.output
                            assert "left the run for good" in leaving.output
                    with join(tmp_path, port, name="bob") as back:
                        assert back.wait() == 1
                        assert "client bob takes part no more: it left the run by itself" in back.output
                    until_done(second, tmp_path, len(records(tmp_path / "server")) + 5)
                    for process in (second, carol, alice):
                        process.signal(signal.SIGTERM)
                        assert process.wait() == 0, process.output
    done = records(tmp_path / "server")
    samples = [record["samples"] for record in done]
    left = samples.index(192, since + 1)
    assert samples == [192] * since + [288] * (left - since) + [192] * (len(done) - left)
    assert all(record["absent"] == ([1] if number >= left else []) for number, record in enumerate(done)
               if record["exchange"] != "C")  # fmt: skip
    view = view_of(tmp_path / "server")
    assert [line.partition(",")[0] for line in view.changes] == [
        f"after {since} epochs: client carol was admitted",
        "client bob takes part no more: it left the run by itself",
    ]
    assert main(["forget", str(tmp_path / "server"), "--client", "carol"]) == 0  # she is of the run as the others are
