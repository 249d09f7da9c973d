"""Training over an emulated link: two network namespaces, a veth pair limited by `tc tbf`, and a proxy that delays.

    sudo python benchmarks/link.py        # a table on the terminal and in benchmarks/results/link.md; some 20 minutes

Needs root, `ip` and `tc`, and Fashion-MNIST under CUTLAYER_DATA. Touches nothing but its own two namespaces. The proxy
stands on the server's side of the link and holds bytes for 20 ms in each direction; it ends the TCP connection, so
what is emulated is the latency of the exchange, not TCP's reaction to a long path.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cutlayer.backends.grpc.certs import make_certificates
from cutlayer.records.environment import environment
from cutlayer.runs.run import Run

CLIENT, SERVER = "cutlayer-client", "cutlayer-server"
PORT, DELAYED = 7070, 7071
PACKET_HEADERS = 14 + 20 + 32  # Ethernet, IPv4, TCP with timestamps
RECIPE = ["fashion_mnist", "--width", "1", "--test-samples", "1000", "--threads", "1"]


def run(*command: object) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout


@contextmanager
def emulated_link(mbit: float) -> Iterator[None]:
    """Two namespaces, 10.77.0.1 (client) and 10.77.0.2 (server), with so many Mbit/s in each direction between them."""
    for name in (CLIENT, SERVER):
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    try:
        for name in (CLIENT, SERVER):
            run("ip", "netns", "add", name)
        run("ip", "-n", CLIENT, "link", "add", "veth0", "type", "veth", "peer", "name", "veth0", "netns", SERVER)
        for number, name in enumerate((CLIENT, SERVER), start=1):
            run("ip", "-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "veth0")
            for device in ("veth0", "lo"):
                run("ip", "-n", name, "link", "set", device, "up")
            # Packets as on the link, so that the server's socket does not take a whole batch towards the proxy at once.
            run("ip", "-n", name, "link", "set", "lo", "mtu", 1500)
            limit = ("rate", f"{mbit}mbit", "burst", "32kb", "latency", "100ms")
            run("tc", "-n", name, "qdisc", "add", "dev", "veth0", "root", "tbf", *limit)
        yield
    finally:
        for name in (CLIENT, SERVER):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def counters() -> dict[str, int]:
    """Bytes and packets that the client's end has sent ("up") and received ("down")."""
    stats = json.loads(run("ip", "-n", CLIENT, "-s", "-j", "link", "show", "dev", "veth0"))[0]["stats64"]
    return {
        f"{way} {what}": stats[key][what]
        for way, key in (("up", "tx"), ("down", "rx"))
        for what in ("bytes", "packets")
    }


async def delay_proxy(seconds: float) -> None:
    """Forward DELAYED to PORT, holding all bytes for so long. Runs in the server's namespace, as a process."""

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)  # 2 MiB: what 20 ms hold at 800 Mbit/s

        async def write() -> None:
            while True:
                due, data = await queue.get()
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                if not data:
                    return writer.close()
                writer.write(data)
                await writer.drain()

        writing = asyncio.create_task(write())
        try:
            while data := await reader.read(1 << 15):
                await queue.put((time.monotonic() + seconds, data))
        except OSError:
            pass
        await queue.put((0.0, b""))
        await writing

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A small buffer: what the link cannot take waits in the server, not here, as on a path without a proxy.
        far = socket.socket()
        far.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
        far.connect(("127.0.0.1", PORT))
        far_reader, far_writer = await asyncio.open_connection(sock=far)
        await asyncio.gather(forward(reader, far_writer), forward(far_reader, writer), return_exceptions=True)

    async with await asyncio.start_server(accept, "0.0.0.0", DELAYED) as server:
        await server.serve_forever()


class Command:
    """A process in a namespace, and when it said what."""

    def __init__(self, namespace: str, *arguments: object) -> None:
        command = ["ip", "netns", "exec", namespace, sys.executable, "-u", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    def wait_for(self, pattern: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not any(re.search(pattern, line) for line in list(self.lines)):
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise RuntimeError(f"no {pattern!r} from {self.process.args}: {self.lines}")
            time.sleep(0.02)

    def finish(self, seconds: float) -> None:
        if self.process.wait(seconds) != 0:
            raise RuntimeError(f"{self.process.args}: {self.lines}")
        self.reader.join(5)


class EpochEnds:
    """When each epoch ended at the server, as its checkpoint is there, with the interface's counters then."""

    def __init__(self, checkpoints: Path) -> None:
        self.checkpoints, self.ends = checkpoints, []
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.stopped.wait(0.01):
            done = max((int(each.name[6:]) for each in self.checkpoints.glob("epoch-*")), default=0)
            if done > len(self.ends):
                self.ends += [(time.monotonic(), counters())] * (done - len(self.ends))


def train(
    mbit: float, seconds: float, *options: object, recipe: Sequence[object] = RECIPE
) -> tuple[Run, EpochEnds, dict[str, int], float]:
    """A run over the link: its folder, the epochs' ends, the interface's counters and the seconds it took."""
    folder = Path(tempfile.mkdtemp(prefix="cutlayer-link-"))
    make_certificates(folder / "tls", ["client"])
    with emulated_link(mbit):
        commands = [Command(SERVER, __file__, "--proxy", 0.02)]
        try:
            tls = ("--tls", folder / "tls/server", "--run-dir", folder / "server")
            server = Command(SERVER, "-m", "cutlayer", "serve", *recipe, "--listen", f"0.0.0.0:{PORT}", *tls, *options)
            commands.append(server)
            server.wait_for("listening")
            before, started = counters(), time.monotonic()
            epochs = EpochEnds(folder / "server" / "checkpoints")
            tls = ("--tls", folder / "tls/client", "--run-dir", folder / "client")
            client = Command(
                CLIENT, "-m", "cutlayer", "join", f"10.77.0.2:{DELAYED}", "--accept-cut", "any", "--accept-exact", *tls
            )
            commands.append(client)
            client.finish(seconds)
            after, ended = counters(), time.monotonic()
            epochs.stopped.set()
            server.finish(60)
        finally:
            for command in commands:
                command.process.terminate()
    return Run(folder / "server"), epochs, {name: after[name] - before[name] for name in after}, ended - started


def utilization(mbit: int, batch: int, microbatches: int, samples: int) -> str:
    """A row: A and B epochs in fp32 in turn, the first of each left out, and bytes against the ledger."""
    options = ["--schedule", "periodic", "--period", 2, "--codec", "fp32", "--epochs", 8, "--evaluate-every", 100]
    options += ["--train-samples", samples, "--batch-size", batch, "--microbatches", microbatches]
    folder, epochs, moved, _ = train(mbit, 900, *options)
    records, ends = folder.records(), epochs.ends
    shares: dict[str, list[float]] = {}
    for record, before, end in zip(records[2:], ends[1:], ends[2:], strict=False):
        seconds = end[0] - before[0]
        full = mbit * 1e6 / 8 * seconds
        for way in ("up", "down") if record.exchange == "A" else ("up",):
            name = f"{record.exchange} {way}"
            shares.setdefault(name, []).append((end[1][f"{way} bytes"] - before[1][f"{way} bytes"]) / full)
            shares.setdefault(f"{name}, ledger", []).append(sum(record.bytes[way].values()) / full)
        works = sum(record.seconds.values()) - record.seconds["wait"]
        shares.setdefault(f"{record.exchange} server", []).append(works / seconds)
    ledger = sum(n for r in records for kinds in r.bytes.values() for n in kinds.values())
    interface = moved["up bytes"] + moved["down bytes"]
    payload = interface - PACKET_HEADERS * (moved["up packets"] + moved["down packets"])
    cells = [middle(shares[f"A {way}"]) for way in ("up", "down")] + [middle(shares["B up"])]
    cells += [f"{statistics.median(shares[f'{kind} up, ledger']):.0%}" for kind in "AB"]
    cells += [f"{statistics.median(shares[f'{kind} server']):.0%}" for kind in "AB"]
    cells += [f"{interface / ledger - 1:+.2%}", f"{payload / ledger - 1:+.2%}"]
    return f"| {mbit} | {batch} | {microbatches} | {' | '.join(cells)} |"


def middle(values: list[float]) -> str:
    """Median, smallest and largest, as shares."""
    return f"{statistics.median(values):.0%} ({min(values):.0%} to {max(values):.0%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--proxy", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--samples", type=int, default=5120)
    parser.add_argument("--rates", type=int, nargs="+", default=(20, 100), help="Mbit/s")
    parser.add_argument("--batches", type=int, nargs="+", default=(128,), help="samples in a batch")
    parser.add_argument("--parts", type=int, nargs="+", default=(1, 8))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "link.md")
    chosen = parser.parse_args()
    if chosen.proxy is not None:
        asyncio.run(delay_proxy(chosen.proxy))
    about, load = environment(), os.getloadavg()[0]
    rows = []
    for mbit, batch, parts in itertools.product(chosen.rates, chosen.batches, chosen.parts):
        rows.append(utilization(mbit, batch, parts, chosen.samples))
        print(rows[-1], flush=True)
    lines = [
        "# Utilization of an emulated link",
        "",
        "Two namespaces, veth with `tbf`, 40 ms round trip by a proxy; mutual TLS. Small CNN on Fashion-MNIST, fp32,",
        f"{chosen.samples} samples, 4,096 values each at the cut: 2 MiB a direction for a batch of 128.",
        f"{about['processor']}, {about['cores']} cores for both sides, proxy and link, load average before {load:.1f}.",
        "",
        "Utilization is interface bytes over rate times time for whole epochs: from the end of the one before, at the",
        "server, to its own; start, last step and checkpoint are in it. Median (smallest to largest) of three epochs",
        "of each kind. *Ledger* is the same with the bytes that the ledger counts. *Server works* is the share of the",
        "time in which the server's process does anything but wait. The last two columns compare all bytes on the",
        "interface with the ledger's, with the packets' headers (66 bytes each: Ethernet, IPv4, TCP) and without.",
        "",
        "| Mbit/s | batch | parts | A up | A down | B up | A, B ledger | | A, B server works | | total | no headers |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"Command: `{' '.join(['python benchmarks/link.py', *sys.argv[1:]])}`",
        "",
    ]
    text = "\n".join(lines)
    print(text)
    chosen.output.parent.mkdir(exist_ok=True)
    chosen.output.write_text(text)


if __name__ == "__main__":
    main()
