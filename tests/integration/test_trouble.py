"""No connection: what can never succeed ends with what to mend, what may yet succeed goes on and says what is amiss."""

import http.server
import logging
import re
import shutil
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from cutlayer import ConfigError
from cutlayer.backends.grpc.certs import make_certificates
from cutlayer.runs.choices import with_choices
from cutlayer.runs.join import Endpoint, join
from cutlayer.runs.recipes import digits
from tests.helpers.processes import Process, port_of, serve
from tests.helpers.processes import join as join_command

CONFIG = with_choices(digits(), train_samples=64, test_samples=8, threads=1)


@pytest.fixture(scope="module")
def tls(tmp_path_factory) -> Path:
    """Two authorities, `ours` and `theirs`, and folders that mix them."""
    folder = tmp_path_factory.mktemp("tls")
    for authority in ("ours", "theirs"):
        make_certificates(folder / authority, ["client"])
    shutil.copytree(folder / "theirs" / "client", folder / "mixed")
    shutil.copy(folder / "ours" / "ca.crt", folder / "mixed" / "ca.crt")
    return folder


@contextmanager
def grpc_server(own: Path | None, authority: Path | None = None) -> Iterator[int]:
    """A gRPC server without any service; with the certificate in `own`, asking for one of `authority`."""
    server = grpc.server(ThreadPoolExecutor(2))
    if own is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        pair = (own / "own.key").read_bytes(), (own / "own.crt").read_bytes()
        root = (authority or own).joinpath("ca.crt").read_bytes()
        credentials = grpc.ssl_server_credentials([pair], root, require_client_auth=True)
        port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


@contextmanager
def web_server() -> Iterator[int]:
    class Silent(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def take_part(address: str, tls: Path | None, folder: Path, **more: object) -> None:
    train, _ = CONFIG.datasets()
    chosen = {"method": CONFIG.method, "training": CONFIG.training, **more}
    server = Endpoint(address, tls, insecure_plaintext=True)
    join(server, CONFIG.halves(train).client, train, folder=folder, **chosen)


NOT_OURS = "what answers there is no cutlayer server"


@pytest.mark.parametrize(
    ("server", "mine", "message"),
    [
        (lambda tls: grpc_server(tls / "ours/server"), "theirs/client", r"is not of the authority in .*ca.crt"),
        (lambda tls: grpc_server(tls / "ours/client"), "ours/client", "shows a client's certificate, not a server's"),
        (lambda tls: grpc_server(tls / "ours/server"), None, r"the server wants TLS; give .*--tls"),
        (lambda tls: grpc_server(None), "ours/client", "the server is without TLS: leave out --tls, or start it with"),
        (lambda tls: grpc_server(None), None, NOT_OURS),
        (lambda tls: grpc_server(tls / "ours/server"), "ours/client", NOT_OURS),
        (lambda tls: web_server(), None, NOT_OURS),
        (lambda tls: web_server(), "ours/client", NOT_OURS),
    ],
    ids=[
        "the server's authority",
        "a client's certificate",
        "plain to TLS",
        "TLS to plain",
        "another service",
        "another service with TLS",
        "web",
        "web with TLS",
    ],
)
def test_what_can_never_succeed_ends_at_once(server, mine: str | None, message: str, tls: Path, tmp_path: Path) -> None:
    with server(tls) as port, pytest.raises(ConfigError, match=message):
        take_part(f"127.0.0.1:{port}", tls / mine if mine else None, tmp_path)


def test_a_name_that_is_none_ends_when_it_has_had_time_to_become_one(tmp_path: Path, caplog, monkeypatch) -> None:
    """As the name of a service has, which is not up yet."""
    caplog.set_level(logging.WARNING)
    with pytest.raises(TimeoutError, match="there is no machine of the name no-such-machine"):
        take_part("no-such-machine.invalid:7070", None, tmp_path, give_up_after=1.5)
    assert "no-such-machine.invalid; look at the address; trying again for 30 s" in caplog.text
    monkeypatch.setattr("cutlayer.backends.grpc.trouble.PATIENCE_SECONDS", 0.5)
    began = time.monotonic()
    with pytest.raises(ConfigError, match="there is no machine of the name no-such-machine"):
        take_part("no-such-machine.invalid:7070", None, tmp_path)
    assert time.monotonic() - began >= 0.5


def test_a_connection_that_ends_without_a_word_may_be_a_server_going_down(
    tls: Path, tmp_path: Path, caplog, monkeypatch
) -> None:
    """gRPC sends no alert, neither then nor if it refuses the client's certificate, which is so here."""
    caplog.set_level(logging.WARNING)
    with grpc_server(tls / "ours/server", tls / "theirs/server") as port:
        address = f"127.0.0.1:{port}"
        with pytest.raises(TimeoutError, match="If it is not going down, it refuses the certificate"):
            take_part(address, tls / "ours/client", tmp_path, give_up_after=1.5)
        assert "trying again for 30 s" in caplog.text
        monkeypatch.setattr("cutlayer.backends.grpc.trouble.PATIENCE_SECONDS", 0.5)
        with pytest.raises(ConfigError, match=r"refuses the certificate .*ours/client/own\.crt: it is of another auth"):
            take_part(address, tls / "ours/client", tmp_path)


def test_a_folder_of_two_authorities_is_named(tls: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mixed/own.crt is not of the authority in .*mixed/ca.crt"):
        take_part("127.0.0.1:1", tls / "mixed", tmp_path)


@pytest.mark.parametrize("listens", [False, True], ids=["nothing listens", "ends connections"])
def test_what_may_yet_succeed_goes_on_and_says_why(listens: bool, tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.WARNING)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def end_connections() -> None:
            while True:
                try:
                    listener.accept()[0].close()
                except OSError:
                    return

        if listens:
            threading.Thread(target=end_connections, daemon=True).start()
        else:
            listener.close()
        with pytest.raises(TimeoutError):
            take_part(f"127.0.0.1:{port}", None, tmp_path, give_up_after=1.5)
    assert ("nothing listens there" in caplog.text) != listens
    assert ("closed as soon as it is made" in caplog.text) == listens
    assert caplog.text.count("no connection to") == 1


def test_the_join_command_ends_with_the_mend(tls: Path, tmp_path: Path) -> None:
    for name, authority in (("server", "ours"), ("client", "theirs")):
        shutil.copytree(tls / authority / name, tmp_path / "tls" / name)
    with serve(tmp_path) as server, join_command(tmp_path, port_of(server)) as client:
        assert client.wait() == 2
        assert "Both machines need folders from the same `cutlayer certs`" in client.output
        server.wait_for(r"ssl_transport_security.*Handshake failed")
        assert "not suitable for production" not in server.output
    for output in (client.output, server.output):
        assert "Traceback" not in output


def test_the_join_command_waits_for_a_server_and_tells_the_truth_when_stopped(tmp_path: Path) -> None:
    with Process("join", "127.0.0.1:1", "--run-dir", tmp_path / "client") as client:
        client.wait_for("no connection to 127.0.0.1:1: nothing listens there, so the server is not up; trying again")
        client.signal(signal.SIGTERM)
        assert client.wait() == 0
        assert "stopped before the run began here; the same command goes on" in client.output
        assert "UNAVAILABLE" not in client.output


def test_serve_says_whom_it_waits_for_and_both_say_what_is_saved_when_stopped(tmp_path: Path) -> None:
    started = time.monotonic()
    with serve(tmp_path, epochs=1000, schedule="always", checkpoint_every=1) as server:
        port = port_of(server)
        server.wait_for(r"epoch 1/1000: waiting for client \(not there yet\) since \d\d:\d\d:\d\d")
        with join_command(tmp_path, port) as client:
            client.wait_for("epoch 2: A")
        # It was killed.
        lost = r"\nalways: (epoch \d+/1000: waiting for client \(its connection is lost\) since \d\d:\d\d:\d\d)"
        found = server.wait_for(lost)
        assert f"cutlayer.server: {found[1]}" in server.output  # the log
        with join_command(tmp_path, port) as client:
            server.wait_for(r"goes on after \d+ s")
            client.wait_for(r"epoch \d+: A")
            client.signal(signal.SIGTERM)
            assert client.wait() == 0
            last = re.findall(r"epoch (\d+): A", client.output)[-1]
            assert re.search(rf"stopped; (epochs 1 to )?(epoch )?{last} complete and saved", client.output)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
        assert re.search(r"stopped; epochs 1 to \d+ complete and saved; the same command goes on", server.output)
        # Twice for each reason, to the console and to the log, and again only after half a minute.
        said = Counter(re.findall(r"waiting for client \((.*?)\)", server.output))
        assert max(said.values()) <= 2 * (1 + (time.monotonic() - started) / 30)
