"""Faults on purpose: a TCP proxy that breaks connections and keeps what passes, and kills at random moments.

python -m tests.helpers.faults --kills 20 --drops 100      # the long form of test_faults.py
"""

from __future__ import annotations

import argparse
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

from cutlayer.backends.grpc.certs import make_certificates
from tests.helpers.processes import join, port_of, records, serve, weights


class Proxy:
    """Forwards TCP connections to a port; `drop` resets those that are open, `captured` is what the client sent first.

    Args:
        keep: bytes of each direction of each connection to keep in `captured`.
        hole_after: bytes from a client after which its connection becomes a black hole: nothing passes any more, in
            neither direction, and nothing is closed. So do new connections, until `heal`.
    """

    def __init__(self, port: int, keep: int = 0, hole_after: int | None = None) -> None:
        self.port_behind, self.keep, self.hole_after = port, keep, hole_after
        self.hole = threading.Event()
        self.captured: list[bytearray] = []
        self.connections = 0
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.port_behind), timeout=5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            with self._lock:
                self._open |= {near, far}
                self.connections += 1
            swallowed = threading.Event()
            if self.hole.is_set():
                swallowed.set()
            for pair in ((near, far), (far, near)):
                kept = bytearray()
                self.captured.append(kept)
                threading.Thread(target=self._forward, args=(*pair, kept, swallowed), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, kept: bytearray, swallowed: threading.Event) -> None:
        passed = 0
        try:
            upward = source.getsockname()[1] == self.port
            while data := source.recv(1 << 16):
                kept += data[: max(0, self.keep - len(kept))]
                passed += len(data)
                if upward and self.hole_after is not None and passed > self.hole_after:
                    swallowed.set()
                    self.hole.set()
                if not swallowed.is_set():
                    sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            with self._lock:
                self._open.discard(end)
            end.close()

    def heal(self) -> None:
        """Let new connections pass, and make no more holes."""
        self.hole_after = None
        self.hole.clear()

    def drop(self) -> int:
        """Break all connections; return how many there were."""
        with self._lock:
            ends = list(self._open)
        for end in ends:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        return len(ends) // 2

    def close(self) -> None:
        self._listener.close()
        self.drop()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def undisturbed(folder: Path, **config: object) -> tuple[dict, list[dict]]:
    make_certificates(folder / "tls", ["client"])
    with serve(folder, **config) as server, join(folder, port_of(server)) as client:
        assert client.wait() == 0, client.output
        assert server.wait() == 0, server.output
    return weights(folder), records(folder / "server")


def epochs_done(folder: Path) -> int:
    file = folder / "server" / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def killed(folder: Path, kills: int, seed: int = 0, **config: object) -> tuple[dict, list[dict], list[str]]:
    """A run whose client or server is killed (SIGKILL) so many times, each time a moment after some progress."""
    make_certificates(folder / "tls", ["client"])
    draw, port, log = random.Random(seed), free_port(), []
    finished, statuses = folder / "client" / "client.safetensors", {0}

    def start_server():
        return serve(folder, listen=f"127.0.0.1:{port}", **config)

    server = start_server()
    port_of(server)
    client = join(folder, port)
    try:
        for number in range(kills):
            # The kills spread over the run: each waits for its share of the epochs, and a random moment more.
            target = round(number * int(config["epochs"]) / kills) if "epochs" in config else number // 2
            deadline = time.monotonic() + 120
            while epochs_done(folder) < target and client.process.poll() is None:
                assert time.monotonic() < deadline, f"stuck\n{server.output}\n{client.output}"
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.4))
            victim = draw.choice(["client", "server"])
            if client.process.poll() is not None or server.process.poll() is not None:
                break
            log.append(f"{victim} in epoch {epochs_done(folder)}")
            if victim == "client":
                client.kill()
                if finished.exists():  # killed on its way out: the server may be gone, and the run is at its end
                    statuses.add(-signal.SIGKILL)
                    break
                client = join(folder, port)
            else:
                server.kill()
                server = start_server()
        assert client.wait() in statuses, client.output
        assert server.wait() == 0, server.output
    finally:
        for process in (client, server):
            process.__exit__()
    return weights(folder), records(folder / "server"), log


def dropped(folder: Path, drops: int, seed: int = 0, **config: object) -> tuple[dict, list[dict], int]:
    """A run whose connection breaks so many times, at random moments."""
    make_certificates(folder / "tls", ["client"])
    draw, count = random.Random(seed), 0
    with serve(folder, **config) as server:
        proxy = Proxy(port_of(server))
        with join(folder, proxy.port) as client:
            while client.process.poll() is None and count < drops:
                time.sleep(draw.uniform(0.02, 0.15))
                count += proxy.drop() > 0
            assert client.wait() == 0, client.output
            assert server.wait() == 0, server.output
        proxy.close()
    return weights(folder), records(folder / "server"), count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--drops", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    config = {"epochs": chosen.epochs, "train_samples": 1024}
    with tempfile.TemporaryDirectory() as name:
        base = Path(name)
        expected = undisturbed(base / "undisturbed", **config)
        print(f"undisturbed: {''.join(record['exchange'] for record in expected[1])}", flush=True)
        got = killed(base / "killed", chosen.kills, chosen.seed, **config)
        print(
            f"{len(got[2])} kills ({'; '.join(got[2])}): same weights {got[0] == expected[0]}, "
            f"same records {got[1] == expected[1]}",
            flush=True,
        )
        lost = dropped(base / "dropped", chosen.drops, chosen.seed, **config)
        print(f"{lost[2]} drops: same weights {lost[0] == expected[0]}, same records {lost[1] == expected[1]}")
    sys.exit(
        not (got[:2] == expected and lost[:2] == expected and len(got[2]) == chosen.kills and lost[2] == chosen.drops)
    )


if __name__ == "__main__":
    main()
