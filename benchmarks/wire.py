"""What the wire costs beside raw sockets, over loopback, in two processes.

    python benchmarks/wire.py                 # a table on the terminal, and under benchmarks/results/wire.md

A step's exchange (one frame up, one down) over this package's links on gRPC, in plain text and with mutual TLS, beside
raw TCP sockets that carry the same bytes, in plain text and with mutual TLS by Python's `ssl`, all in one run and in
turn, so that whatever else the machine does hits all of them. Then real A steps, `cutlayer serve` and `cutlayer join`
with mutual TLS: what share of a step each side waits, and what share is neither side's work.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import torch

from cutlayer.backends.grpc.certs import SERVER_NAME, make_certificates
from cutlayer.backends.grpc.limits import ClientLimits
from cutlayer.backends.grpc.link import Link
from cutlayer.backends.grpc.listener import Listener, Reception
from cutlayer.backends.grpc.refusals import Refusals
from cutlayer.backends.grpc.rpc import Endpoint
from cutlayer.backends.grpc.session import Session
from cutlayer.backends.grpc.slots import Slots
from cutlayer.codecs import encode_exactly, get_codec
from cutlayer.errors import CutlayerError
from cutlayer.records.environment import environment
from cutlayer.runs.run import Run
from cutlayer.wire.frames import Frame, pack
from cutlayer.wire.messages import Hello, Step, Update, Welcome

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

    slots = Slots(["client"], ClientLimits(), named=tls is not None)
    listener = Listener(Endpoint("127.0.0.1:0", tls), Reception(admit, "", Refusals(), slots))
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


Exchange = tuple[Callable[[bytes], object], Callable[[], object]]
"""Exchanges a frame for its reply; ends the connection."""


def link_exchange(port: int, tls: str | None) -> Exchange:
    session = Session(Endpoint(f"127.0.0.1:{port}", tls), Hello("client"), LIMIT)
    assert session.wait_welcome(20) is not None

    def exchange(data: bytes) -> object:
        session.link.send(data)
        return session.link.receive(60)

    return exchange, session.close


def socket_exchange(port: int, tls: str | None) -> Exchange:
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

    return exchange, sock.close


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
        exchanges: dict[str, Exchange] = {}
        for way, (answer, connect, encrypted) in WAYS.items():
            ports = context.Queue()
            server_tls = f"{folder}/server" if encrypted else None
            process = context.Process(target=answer, args=(server_tls, ports, replies), daemon=True)
            process.start()
            processes.append(process)
            exchanges[way] = connect(ports.get(), f"{folder}/client" if encrypted else None)
        for repeat in range(-3, repeats):
            for way, (exchange, _) in exchanges.items():
                for name, (up, _) in pairs.items():
                    for _ in range(10 if name == "empty" else 1):
                        started = time.perf_counter()
                        exchange(up)
                        spent = time.perf_counter() - started
                        if repeat >= 0:
                            found[way][name].append(spent)
        for _, close in exchanges.values():
            close()
        for process in processes:
            process.terminate()
    return found, {name: len(up) + len(down) for name, (up, down) in pairs.items()}


# --- real steps ---------------------------------------------------------------------------------------------------


def cutlayer(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-u", "-m", "cutlayer", *map(str, arguments)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "CUTLAYER_LOG": "INFO", "COLUMNS": "200"}
    return subprocess.Popen(command, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def real_steps(microbatches: int, epochs: int) -> str:
    """A row: A steps of the digits recipe, four times as wide, in fp8; the first epoch is left out."""
    options = ["--schedule", "always", "--codec", "fp8", "--epochs", epochs, "--evaluate-every", 1000, "--threads", 1]
    options += ["--width", 4, "--microbatches", microbatches]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_certificates(folder / "tls", ["client"])
        tls, run = ("--tls", folder / "tls/server"), ("--run-dir", folder / "server")
        server = cutlayer("serve", "digits", "--listen", "127.0.0.1:0", *tls, *run, *options)
        assert server.stdout is not None
        port = next(found[1] for line in server.stdout if (found := re.search(r"listening on port (\d+)", line)))
        tls, run = ("--tls", folder / "tls/client"), ("--run-dir", folder / "client")
        client = cutlayer("join", f"127.0.0.1:{port}", "--accept-cut", "any", "--accept-exact", *tls, *run)
        said, _ = client.communicate(timeout=600)
        server.communicate(timeout=60)
        client_seconds = [json.loads(text) for text in re.findall(r"seconds by phase: (\{.*\})", said)][1:epochs]
        records = Run(folder / "server").records()[1:]
    steps = -(-records[0].samples // 64)
    epochs_ms, shares = [], []
    for mine, record in zip(client_seconds, records, strict=True):
        whole, works = sum(record.seconds.values()), [sum(s.values()) - s["wait"] for s in (mine, record.seconds)]
        epochs_ms.append(1e3 * whole / steps)
        shares.append(
            (mine["wait"] / whole, record.seconds["wait"] / sum(record.seconds.values()), 1 - sum(works) / whole)
        )
    cells = [
        f"{statistics.median(values):.0%} ({min(values):.0%} to {max(values):.0%})"
        for values in zip(*shares, strict=True)
    ]
    if microbatches > 1:
        cells[2] = "both work at once"
    cells = [str(microbatches), f"{statistics.median(epochs_ms):.1f}", *cells, f"{len(shares)} epochs of {steps} steps"]
    return f"| {' | '.join(cells)} |"


def table(found: dict[str, dict[str, list[float]]], sizes: dict[str, int], steps: list[str]) -> str:
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
        f"cores shared with other work, load average at the end {os.getloadavg()[0]:.1f}, Python {about['python']}, "
        f"grpcio {grpc.__version__}, {ssl.OPENSSL_VERSION}.",
        "",
        "## Waiting in a real A step",
        "",
        "`cutlayer serve` and `cutlayer join` over loopback with mutual TLS: digits, small CNN four times as wide",
        "(1,024 values a sample at the cut), batch 64, fp8, one thread each. Shares of a step's time, by the phase",
        "`wait` of the ledgers: median (smallest to largest) over the epochs after the first. In the plain order each",
        "side waits while the other works; what neither does is the wire, the scheduler and other users of the cores.",
        "",
        "| parts of a step | step, ms | client waits | server waits | neither works | n |",
        "|---|---|---|---|---|---|",
        *steps,
        "",
        "Command: `python benchmarks/wire.py`",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "wire.md")
    chosen = parser.parse_args()
    found, sizes = measure(chosen.repeats)
    steps = [real_steps(microbatches, chosen.epochs) for microbatches in (1, 4)]
    text = table(found, sizes, steps)
    print(text)
    chosen.output.parent.mkdir(exist_ok=True)
    chosen.output.write_text(text)


if __name__ == "__main__":
    main()
