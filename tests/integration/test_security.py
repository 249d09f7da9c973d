"""Who may come in, what may be said, and what can be seen from outside. A real server; TLS by gRPC."""

import contextlib
import functools
import logging
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import grpc
import msgspec
import pytest
import torch

from cutlayer import ConfigError, RefusedError
from cutlayer.backends.client_data import ClientData
from cutlayer.backends.grpc.calls import check_health, fetch_config
from cutlayer.backends.grpc.certs import common_name, make_certificates
from cutlayer.backends.grpc.link import CHUNK, CHUNK_BYTES, LAST, Connection
from cutlayer.backends.grpc.rpc import SERVICE, Endpoint
from cutlayer.backends.grpc.session import open_channel
from cutlayer.data.datasets import outline
from cutlayer.runs.choices import with_choices
from cutlayer.runs.config import RunConfig
from cutlayer.runs.join import join
from cutlayer.runs.recipes import digits
from cutlayer.runs.remote_client import Membership, RemoteClient
from cutlayer.runs.serve import Callbacks, Listening, serve
from cutlayer.stop_request import Stop, Stopped
from cutlayer.wire.frames import Frame, pack, unpack
from cutlayer.wire.messages import Hello, Refusal, Welcome
from tests.helpers import processes
from tests.helpers.faults import Proxy

CONFIG = with_choices(digits(), train_samples=128, test_samples=64, epochs=3, schedule="periodic", period=2, threads=1)
CUT = (16, 4, 4)


@pytest.fixture(scope="module")
def tls(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    make_certificates(folder, ["client", "mallory"])
    return folder


@pytest.fixture
def server(tls: Path, tmp_path: Path) -> Iterator[SimpleNamespace]:
    """A server in a thread: its port, what it refused, and what it returned once `thread` has ended."""
    halves, listening, stop = CONFIG.halves(outline("digits")), threading.Event(), Stop()
    state = SimpleNamespace(port=0, served=None, stop=stop)

    def ready(port: int) -> None:
        state.port = port
        listening.set()

    def run() -> None:
        with contextlib.suppress(Stopped):
            state.served = serve(
                halves.server,
                CUT,
                listen=Listening("127.0.0.1:0", tls / "server"),
                run=tmp_path / "server",
                client_half=halves.client,
                method=CONFIG.method,
                training=CONFIG.training,
                config=CONFIG.as_dict(),
                callbacks=Callbacks(on_listening=ready),
                stop=stop,
            )

    state.thread = threading.Thread(target=run)
    state.thread.start()
    assert listening.wait(20)
    yield state
    stop.requested = True
    state.thread.join(30)
    assert not state.thread.is_alive()


def take_part(port: int, tls: Path, folder: Path, config: RunConfig = CONFIG, **more: object) -> torch.nn.Module:
    train, test = CONFIG.datasets()
    half = config.halves(train).client
    return join(
        Endpoint(f"127.0.0.1:{port}", tls / "client"),
        half,
        train,
        test,
        folder=folder,
        method=config.method,
        training=config.training,
        **more,
    )


def say(channel: grpc.Channel, *messages: bytes) -> list[bytes]:
    """Open a stream, send these messages and wait for what comes until the server ends it."""
    return list(channel.stream_stream(f"/{SERVICE}/Exchange")(iter(messages), timeout=20))


@functools.cache
def honest_hello() -> Hello:
    """What `join` says with this config."""
    train, test = CONFIG.datasets()
    half = CONFIG.halves(train).client
    with tempfile.TemporaryDirectory() as folder:
        method, training = CONFIG.method, CONFIG.training
        return RemoteClient(
            Membership("client", half, ClientData(train, test), Path(folder), method, training)
        )._hello()


def hello(**changes: object) -> Hello:
    return msgspec.structs.replace(honest_hello(), **changes)


def test_certificates_name_their_owner_and_keys_are_private(tls: Path) -> None:
    assert common_name((tls / "mallory/own.crt").read_bytes()) == "mallory"
    for key in [*tls.glob("*.key"), *tls.glob("*/*.key")]:
        assert key.stat().st_mode & 0o077 == 0
    before = (tls / "client/own.crt").read_bytes()
    assert make_certificates(tls, ["client"]) == []
    assert (tls / "client/own.crt").read_bytes() == before
    with pytest.raises(ConfigError, match="client's name"):
        make_certificates(tls, ["../up"])


def test_an_expired_certificate_is_named_by_its_owner(tls: Path, tmp_path: Path) -> None:
    for name in ("ca.crt", "ca.key"):
        (tmp_path / name).write_bytes((tls / name).read_bytes())
    make_certificates(tmp_path, ["client"], days=-0.5)
    with pytest.raises(ConfigError, match=r"own.crt: expired on 20\d\d-"):
        check_health("127.0.0.1:1", tmp_path / "client")


def test_without_tls_only_on_this_machine_or_on_demand(tmp_path: Path) -> None:
    for address in ("0.0.0.0:0", "[::]:0", "192.0.2.1:7070", "example.org:7070"):
        with pytest.raises(ConfigError, match="there is no TLS"):
            serve(torch.nn.Identity(), CUT, listen=address, run=tmp_path)
        with pytest.raises(ConfigError, match="there is no TLS"):
            join(address, torch.nn.Identity(), CONFIG.datasets()[0], folder=tmp_path)


@pytest.mark.parametrize("who", ["no certificate", "another authority", "expired"])
def test_refused_in_the_tls_handshake(who: str, server: SimpleNamespace, tls: Path, tmp_path: Path) -> None:
    authority = (tls / "client/ca.crt").read_bytes()
    other = tmp_path / "other"
    if who == "no certificate":
        credentials = grpc.ssl_channel_credentials(authority)
    else:
        if who == "another authority":
            make_certificates(other, ["client"])
        elif who == "expired":
            other.mkdir()
            for name in ("ca.crt", "ca.key"):
                (other / name).write_bytes((tls / name).read_bytes())
            make_certificates(other, ["client"], days=-0.5)
        place = other / "client"
        credentials = grpc.ssl_channel_credentials(
            authority, (place / "own.key").read_bytes(), (place / "own.crt").read_bytes()
        )
    name = ("grpc.ssl_target_name_override", "cutlayer-server")
    with grpc.secure_channel(f"127.0.0.1:{server.port}", credentials, [name]) as channel:
        with pytest.raises(grpc.RpcError) as error:
            say(channel, pack(Frame(hello())))
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
    assert check_health(f"127.0.0.1:{server.port}", tls / "client") == "SERVING"


def test_plain_text_is_refused_where_there_is_tls(server: SimpleNamespace) -> None:
    with pytest.raises(grpc.RpcError):
        fetch_config(f"127.0.0.1:{server.port}", None)


def test_a_client_refuses_a_server_that_is_none(tls: Path, tmp_path: Path) -> None:
    """Another client's certificate does not make a server."""
    credentials = grpc.ssl_server_credentials(
        [((tls / "mallory/own.key").read_bytes(), (tls / "mallory/own.crt").read_bytes())]
    )
    impostor = grpc.server(ThreadPoolExecutor(2))
    port = impostor.add_secure_port("127.0.0.1:0", credentials)
    impostor.start()
    try:
        with pytest.raises(ConfigError, match="shows a client's certificate, not a server's"):
            take_part(port, tls, tmp_path / "client")
    finally:
        impostor.stop(None)


def refusal(answers: list[bytes]) -> str:
    message = unpack(answers[-1]).message
    assert isinstance(message, Refusal), message
    return message.reason


def test_refused_in_the_handshake_by_name(server: SimpleNamespace, tls: Path, caplog) -> None:
    address = f"127.0.0.1:{server.port}"
    with open_channel(address, tls / "mallory") as channel, caplog.at_level(logging.WARNING):
        assert "made out to 'mallory', the client says 'client'" in refusal(say(channel, pack(Frame(hello()))))
        assert "expected one of ['client'], got 'mallory'" in refusal(say(channel, pack(Frame(hello(name="mallory")))))
    assert "mallory" in caplog.text
    with open_channel(address, tls / "server") as channel:
        assert "made out to 'cutlayer-server'" in refusal(say(channel, pack(Frame(hello()))))
    assert check_health(address, tls / "server") == "SERVING"
    with open_channel(address, tls / "client") as channel:
        assert "expected a Hello" in refusal(say(channel, pack(Frame(Welcome(0, "", 0, "", 0)))))
        assert "at least 17 bytes" in refusal(say(channel, b"GET /"))
        assert "samples: expected at least 1" in refusal(say(channel, pack(Frame(hello(samples=0)))))
        assert "batch_size: expected at most" in refusal(say(channel, pack(Frame(hello(batch_size=1 << 40)))))
        reason = refusal(say(channel, pack(Frame(hello(checkpoints=(3,), run="other")))))
        assert "checkpoint: expected one of run" in reason
        assert "after [3] epochs of run other" in reason


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"codec": "fp32"}, "codec of the activations: expected fp8_e4m3, got fp32; codec of the gradients"),
        ({"schedule": "drop"}, "schedule: expected Periodic"),
        ({"width": 2.0}, r"shape at the cut: expected \[16, 4, 4\], got \[32, 4, 4\]; client half: expected"),
        ({"cut": "layer2"}, "shape at the cut"),
        ({"norm_in_b": "eval"}, "norm_in_b: expected calibrated, got eval"),
        ({"epochs": 4}, "epochs: expected 3, got 4"),
        ({"seed": 5}, "seed: expected 0, got 5"),
    ],
)
def test_the_handshake_says_which_field_differs(
    change: dict, named: str, server: SimpleNamespace, tls: Path, tmp_path: Path
) -> None:
    with pytest.raises(RefusedError, match=named):
        take_part(server.port, tls, tmp_path / "client", with_choices(CONFIG, **change))


def test_oversize_and_bombs_are_refused_and_training_goes_on(
    server: SimpleNamespace, tls: Path, tmp_path: Path
) -> None:
    first = pack(Frame(hello()))
    with open_channel(f"127.0.0.1:{server.port}", tls / "client") as channel:
        exchange = channel.stream_stream(f"/{SERVICE}/Exchange")
        for message in (
            b"x" * (CHUNK.size + CHUNK_BYTES + 1),
            b"x" * (4 * CHUNK_BYTES),
            CHUNK.pack(LAST, 0, 0) + b"CUTL\x02" + b"\xff" * 12,
        ):
            with pytest.raises(grpc.RpcError) as error:
                list(exchange(iter([first, message]), timeout=20))
            assert error.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
        bomb = bytes(64 << 20)  # 64 KiB on the wire
        options = [("grpc.max_send_message_length", -1), ("grpc.ssl_target_name_override", "cutlayer-server")]
        parts = [(tls / "client" / name).read_bytes() for name in ("ca.crt", "own.key", "own.crt")]
        credentials = grpc.ssl_channel_credentials(*parts)
        with grpc.secure_channel(
            f"127.0.0.1:{server.port}", credentials, options, compression=grpc.Compression.Gzip
        ) as bomber:
            with pytest.raises(grpc.RpcError) as error:
                list(bomber.stream_stream(f"/{SERVICE}/Exchange")(iter([first, bomb]), timeout=20))
            assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    take_part(server.port, tls, tmp_path / "client")
    server.thread.join(30)
    assert server.served.refusals["client"] >= 2


def test_nothing_but_tls_is_seen_and_neither_images_nor_server_weights_are_in_any_frame(
    server: SimpleNamespace, tls: Path, tmp_path: Path, monkeypatch
) -> None:
    frames: list[bytes] = []
    outgoing = Connection.outgoing

    def recording(self: Connection) -> Iterator[bytes]:
        for message in outgoing(self):
            frames.append(message[CHUNK.size :])
            yield message

    monkeypatch.setattr(Connection, "outgoing", recording)
    proxy = Proxy(server.port, keep=1 << 30)
    half = take_part(proxy.port, tls, tmp_path / "client")
    server.thread.join(30)
    proxy.close()
    seen, said = b"".join(map(bytes, proxy.captured)), b"".join(frames)
    assert len(said) > 50_000
    assert len(seen) > len(said)

    train, _ = CONFIG.datasets()
    images = [image.numpy().tobytes() for image in train.inputs]
    server_weights = [value for value in server.served.half.state_dict().values() if value.numel() >= 16]
    initial = [v for v in CONFIG.halves(train).server.state_dict().values() if v.numel() >= 16 and v.std() > 0]
    client_weights = [value for value in half.state_dict().values() if value.numel() >= 16]
    for what in images + [w.numpy().tobytes()[:64] for w in (*server_weights, *initial, *client_weights)]:
        assert what not in said
        assert what[:32] not in seen
    # The records show that the search would find something: what was sent is in `said`, and not in `seen`.
    assert b"CUTL" in said
    assert b"CUTL" not in seen
    assert b"activations" in said
    assert b"activations" not in seen
    for stream in proxy.captured:
        check_tls_records(bytes(stream))


def check_tls_records(stream: bytes) -> None:
    """Every byte belongs to a TLS record: type 20 to 23, version 3.x, at most 2^14 + 256 bytes."""
    position, types = 0, []
    while position + 5 <= len(stream):
        kind, version, length = (
            stream[position],
            stream[position + 1],
            int.from_bytes(stream[position + 3 : position + 5]),
        )
        assert kind in (20, 21, 22, 23)
        assert version == 3
        assert length <= (1 << 14) + 256
        types.append(kind)
        position += 5 + length
    assert types.count(23) > 3  # application data, encrypted


def test_the_server_command_logs_who_is_refused_in_the_tls_handshake(tls: Path, tmp_path: Path) -> None:
    (tmp_path / "tls").symlink_to(tls)
    with processes.serve(tmp_path) as command:
        port = processes.port_of(command)
        credentials = grpc.ssl_channel_credentials((tls / "client/ca.crt").read_bytes())
        name = ("grpc.ssl_target_name_override", "cutlayer-server")
        with grpc.secure_channel(f"127.0.0.1:{port}", credentials, [name]) as channel, pytest.raises(grpc.RpcError):
            say(channel, pack(Frame(hello())))
        command.wait_for("Handshake failed .*PEER_DID_NOT_RETURN_A_CERTIFICATE", timeout=10)
