"""What the wire costs beside raw sockets, over loopback, in two processes.

    python benchmarks/wire.py                 # a table on the terminal, and under benchmarks/results/wire.md

A step's exchange (one frame up, one down) over this package's links on gRPC, in plain text and with mutual TLS, beside
raw TCP sockets that carry the same bytes, in plain text and with mutual TLS by Python's `ssl`, all in one run and in
turn, so that whatever else the machine does hits all of them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import ssl
import statistics
import struct
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import torch

from cutlayer.errors import CutlayerError
from cutlayer.formats import encode_exactly, get_codec
from cutlayer.run import environment
from cutlayer.wire.certs import SERVER_NAME, make_certificates
from cutlayer.wire.frames import Frame, Hello, Step, Update, Welcome, pack
from cutlayer.wire.link import Link
from cutlayer.wire.listener import Listener, Refusals
from cutlayer.wire.session import Session

LIMIT = 64 << 20


def frames(codec_up: str, codec_down: str, values: int) -> tuple[bytes, bytes]:
    """A step's frame and its reply, with so many values each."""
    batch = 128
    tensor = torch.randn(batch, values // batch)
    labels = torch.randint(0, 10, (batch,))
    up = {"ids": encode_exactly(torch.arange(batch)), "labels": encode_exactly(labels)}
    up["activations"] = get_codec(codec_up).encode(tensor)
    down = {"gradients": get_codec(codec_down).encode(tensor)}
    return pack(Frame(Step(0, 0, 0), up)), pack(Frame(Update(0, 0, 0), down))


# --- the other process: answers each frame with the reply for its length -------------------------------------------


def answer_links(tls: str | None, ports: multiprocessing.Queue, replies: dict[int, bytes]) -> None:
    link = Link(LIMIT)

    def admit(hello: Hello):
        return Welcome(0, "session", link.received, "run", 0), link.attach(hello.received)

    listener = Listener("127.0.0.1:0", tls, admit, "", Refusals(), 4)
    ports.put(listener.port)
    try:
        while data := link.receive(600):
            link.send(replies[len(data)])
    except (CutlayerError, TimeoutError):
        pass
    listener.close()


def receive_exactly(sock: socket.socket, buffer: bytearray) -> memoryview:
    header = sock.recv(4, socket.MSG_WAITALL) if not isinstance(sock, ssl.SSLSocket) else recv_all(sock, 4)
    (size,) = struct.unpack("<I", header)
    view = memoryview(buffer)[:size]
    done = 0
    while done < size:
        got = sock.recv_into(view[done:])
        if not got:
            raise EOFError
        done += got
    return view


def recv_all(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def send_framed(sock: socket.socket, data: bytes) -> None:
    sock.sendall(struct.pack("<I", len(data)))
    sock.sendall(data)


def answer_sockets(tls: str | None, ports: multiprocessing.Queue, replies: dict[int, bytes]) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    ports.put(listener.getsockname()[1])
    sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(Path(tls) / "own.crt", Path(tls) / "own.key")
        context.load_verify_locations(Path(tls) / "ca.crt")
        context.verify_mode = ssl.CERT_REQUIRED
        sock = context.wrap_socket(sock, server_side=True)
    buffer = bytearray(LIMIT)
    try:
        while True:
            data = receive_exactly(sock, buffer)
            send_framed(sock, replies[len(data)])
    except (EOFError, OSError, struct.error):
        pass


# --- this process -----------------------------------------------------------------------------------------------------


def link_exchange(port: int, tls: str | None) -> Callable[[bytes], object]:
    session = Session(f"127.0.0.1:{port}", tls, Hello("client"), LIMIT)
    assert session.wait_welcome(20) is not None

    def exchange(data: bytes) -> object:
        session.link.send(data)
        return session.link.receive(60)

    return exchange


def socket_exchange(port: int, tls: str | None) -> Callable[[bytes], object]:
    sock = socket.create_connection(("127.0.0.1", port))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_cert_chain(Path(tls) / "own.crt", Path(tls) / "own.key")
        context.load_verify_locations(Path(tls) / "ca.crt")
        sock = context.wrap_socket(sock, server_hostname=SERVER_NAME)
    buffer = bytearray(LIMIT)

    def exchange(data: bytes) -> object:
        send_framed(sock, data)
        return receive_exactly(sock, buffer)

    return exchange


WAYS = {
    "raw TCP": (answer_sockets, socket_exchange, False),
    "raw TCP, mutual TLS": (answer_sockets, socket_exchange, True),
    "gRPC link, plain text": (answer_links, link_exchange, False),
    "gRPC link, mutual TLS": (answer_links, link_exchange, True),
}


def measure(repeats: int) -> tuple[dict[str, dict[str, list[float]]], dict[str, int]]:
    """Seconds of each exchange, by way and payload, and the payloads' bytes up and down."""
    torch.manual_seed(0)
    pairs = {
        "fp32, 8 + 8 MiB": frames("fp32", "fp32", 2 << 20),
        "fp8, the same values": frames("fp8_e4m3", "fp8_e5m2", 2 << 20),
        "empty": (pack(Frame(Step(0, 0, 0))), pack(Frame(Update(0, 0, 0)))),
    }
    replies = {len(up): down for up, down in pairs.values()}
    found: dict[str, dict[str, list[float]]] = {way: {name: [] for name in pairs} for way in WAYS}
    context = multiprocessing.get_context("spawn")
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        make_certificates(folder, ["client"])
        exchanges = {}
        for way, (answer, connect, encrypted) in WAYS.items():
            ports = context.Queue()
            server_tls = f"{folder}/server" if encrypted else None
            process = context.Process(target=answer, args=(server_tls, ports, replies), daemon=True)
            process.start()
            processes.append(process)
            exchanges[way] = connect(ports.get(), f"{folder}/client" if encrypted else None)
        for repeat in range(-3, repeats):
            for way, exchange in exchanges.items():
                for name, (up, _) in pairs.items():
                    for _ in range(10 if name == "empty" else 1):
                        started = time.perf_counter()
                        exchange(up)
                        spent = time.perf_counter() - started
                        if repeat >= 0:
                            found[way][name].append(spent)
        for process in processes:
            process.terminate()
    return found, {name: len(up) + len(down) for name, (up, down) in pairs.items()}


def table(found: dict[str, dict[str, list[float]]], sizes: dict[str, int]) -> str:
    names = list(sizes)
    about = environment()
    lines = [
        "# The wire over loopback: a step's exchange, milliseconds",
        "",
        "Median (5th to 95th percentile). The last column: the first over raw TCP with mutual TLS in the same run.",
        "",
        "| | " + " | ".join(f"{name} ({sizes[name]} bytes)" for name in names) + " | fp32 against raw TLS |",
        "|---|" + "---|" * (len(names) + 1),
    ]
    base = statistics.median(found["raw TCP, mutual TLS"][names[0]])
    for way, by_name in found.items():
        cells = []
        for name in names:
            times = sorted(1e3 * t for t in by_name[name])
            low, high = times[len(times) // 20], times[-1 - len(times) // 20]
            cells.append(f"{statistics.median(times):.2f} ({low:.2f} to {high:.2f})")
        ratio = statistics.median(by_name[names[0]]) / base
        lines.append(f"| {way} | " + " | ".join(cells) + f" | {ratio:.2f}x |")
    n = {name: len(next(iter(found.values()))[name]) for name in names}
    lines += [
        "",
        f"n = {', '.join(f'{count} ({name})' for name, count in n.items())}; {about['processor']}, {about['cores']} "
        f"cores shared with other work, Python {about['python']}, grpcio {grpc.__version__}, {ssl.OPENSSL_VERSION}.",
        "",
        "Command: `python benchmarks/wire.py`",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "wire.md")
    chosen = parser.parse_args()
    found, sizes = measure(chosen.repeats)
    text = table(found, sizes)
    print(text)
    chosen.output.parent.mkdir(exist_ok=True)
    chosen.output.write_text(text)


if __name__ == "__main__":
    main()
