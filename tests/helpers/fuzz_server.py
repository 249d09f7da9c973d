"""Mutated frames against a live server, from an authenticated client that trains in between.

    python -m tests.helpers.fuzz_server --frames 1000000      # the long form of test_mutated_frames.py

Mutants take turns with good frames on the same stream; some corrupt the stream itself, which costs the connection, and
some come as the first word of connections of their own. Each must be refused and counted, the server's memory must
stay flat, and the run must end in the bits of an undisturbed one.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import torch

from cutlayer.backends.client_data import ClientData
from cutlayer.backends.grpc.certs import make_certificates
from cutlayer.backends.grpc.link import CHUNK, Connection
from cutlayer.backends.grpc.rpc import SERVICE, Endpoint
from cutlayer.backends.grpc.session import Session, open_channel
from cutlayer.errors import RefusedError
from cutlayer.runs.choices import with_choices
from cutlayer.runs.fit import fit
from cutlayer.runs.recipes import digits
from cutlayer.runs.remote_client import Membership, RemoteClient
from cutlayer.wire.frames import PREFIX, Frame, pack, read, unpack
from cutlayer.wire.messages import Done, Hello, Refusal
from tests.helpers.processes import CONFIG, port_of, serve

WORDS = [
    b"A",
    b"fp8_e4m3",
    b"fp32",
    b"i64",
    b"plan",
    b"step",
    b"\x00",
    b"\xff",
    b"\xc0",
    b"\xcf" + b"\xff" * 8,
    b"\x80",
]


def mutate(draw: random.Random, data: bytes) -> bytes:
    """Change, insert, remove, double or exchange some bytes."""
    out = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        place, kind = draw.randrange(len(out)), draw.randrange(6)
        if kind == 0:
            out[place] ^= 1 << draw.randrange(8)
        elif kind == 1:
            out[place] = draw.randrange(256)
        elif kind == 2:
            out[place:place] = draw.choice(WORDS)
        elif kind == 3 and len(out) > 8:
            del out[place : place + draw.randint(1, 6)]
        elif kind == 4:
            out[place : place + 4] = out[draw.randrange(len(out)) :][:4]
        elif kind == 5:
            word = draw.choice(WORDS)
            out[place : place + len(word)] = word
        if not out:
            out = bytearray(b"\x00")
    return bytes(out)


class Mutants:
    """Endless mutants of a step or an evaluation that can never be taken for it."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def of(self, frame: bytes) -> bytes:
        """A frame whose prefix is right, so that it gets to the heart of the server, but whose header or values lie."""
        good = read(frame)
        start = good.start
        while True:
            if self.draw.random() < 0.1:  # values: activations that are NaN, or ids that do not exist
                sizes = {f.name: f.nbytes for f in good.fields}
                tail = frame[start:]
                if self.draw.random() < 0.5:
                    kept = sizes["ids"] + sizes["labels"] + 4
                    return frame[:start] + tail[:kept] + b"\x7f" * (len(tail) - kept)
                return frame[:start] + b"\xff" * sizes["ids"] + tail[sizes["ids"] :]
            changed = mutate(self.draw, frame[PREFIX.size : start])
            prefix = PREFIX.pack(*PREFIX.unpack_from(frame)[:2], len(changed), len(frame) - start)
            mutant = prefix + changed + frame[start:]
            try:
                received = read(mutant)
                if (received.message, received.fields) == (good.message, good.fields):
                    continue
            except RefusedError:
                pass
            return mutant


class Fuzzing(RemoteClient):
    """A client that sends so many mutants before each of its frames."""

    mutants, each, sent, broken = Mutants(0), 0, 0, 0
    progress = staticmethod(lambda sent: None)

    def _send(self, session: Session, frame: bytes) -> None:
        # A mutant of a Done may be one that is as good: with other FLOPs.
        remaining = 0 if isinstance(unpack(frame).message, Done) else self.each
        while remaining:
            count = min(16, remaining)
            for _ in range(count):
                session.link.send(self.mutants.of(frame))
            for _ in range(count):
                answer = unpack(session.link.receive(60)).message
                assert isinstance(answer, Refusal), answer
            remaining -= count
            self.sent += count
            self.progress(self.sent)
        super()._send(session, frame)


def corrupt_streams(every: int, draw: random.Random, fuzzing: type[Fuzzing]) -> None:
    """From now on, one in `every` messages of this process's links is corrupt, before the good one."""
    outgoing = Connection.outgoing

    def corrupted(self: Connection) -> Iterator[bytes]:
        for message in outgoing(self):
            if len(message) > CHUNK.size and draw.randrange(every) == 0:
                kind, number, confirmed = CHUNK.unpack_from(message)
                fuzzing.broken += 1
                yield draw.choice(
                    [
                        CHUNK.pack(kind, number + 1 + draw.randrange(9), confirmed) + message[CHUNK.size :],
                        CHUNK.pack(9, number, confirmed) + message[CHUNK.size :],
                        CHUNK.pack(kind, number, confirmed + 1000) + message[CHUNK.size :],
                        message[:-1],  # truncated
                        message + b"x",
                        message[: CHUNK.size - 3],
                        CHUNK.pack(kind, number, confirmed) + b"XUTL" + message[CHUNK.size + 4 :],
                    ]
                )
            yield message

    Connection.outgoing = corrupted


def bad_hellos(port: int, tls: Path, count: int, draw: random.Random, hello: Hello) -> int:
    """Mutated Hellos on connections of their own; how many were refused."""
    refused, good = 0, pack(Frame(hello))
    with open_channel(f"127.0.0.1:{port}", tls) as channel:
        for _ in range(count):
            mutant = mutate(draw, good)
            try:
                unpack(mutant)
                continue  # reads as a Hello, which would begin a session
            except RefusedError:
                pass
            try:
                answers = list(channel.stream_stream(f"/{SERVICE}/Exchange")(iter([mutant]), timeout=30))
                refused += isinstance(unpack(answers[-1]).message, Refusal)
            except grpc.RpcError:
                pass
    return refused


def resident_mib(pid: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def fuzz(folder: Path, frames: int, seed: int = 0, codec: str = "fp8") -> dict[str, object]:
    """Train with so many mutants in between; what happened, for the caller to judge."""
    torch.set_num_threads(1)
    config = with_choices(digits(), **CONFIG, codec=codec)
    train, test = config.datasets()
    reference = fit(config.halves(train), train, test, method=config.method, training=config.training)
    good = sum(4 + 1 for exchange in reference.history.exchanges if exchange != "C")
    make_certificates(folder / "tls", ["client"])
    draw = random.Random(seed)
    with serve(folder, codec=codec) as server:
        port, pid = port_of(server), server.process.pid
        tls = folder / "tls" / "client"
        endpoint = Endpoint(f"127.0.0.1:{port}", tls)
        memory: list[tuple[int, float]] = []
        half = config.halves(train).client
        data = ClientData(train, test)
        client = Fuzzing(Membership("client", half, data, folder / "client", config.method, config.training))
        client.mutants, client.each = Mutants(seed), -(-frames // good)

        def progress(sent: int) -> None:
            if not memory or sent - memory[-1][0] >= frames // 20:
                memory.append((sent, resident_mib(pid)))

        client.progress = progress
        outgoing = Connection.outgoing
        corrupt_streams(max(20, frames // 200), draw, Fuzzing)
        hellos: list[int] = []
        strangers = threading.Thread(
            target=lambda: hellos.append(bad_hellos(port, tls, min(2000, frames // 50), draw, client._hello()))
        )
        started = time.monotonic()
        try:
            strangers.start()
            while not client.take_part(endpoint, 60):
                pass
            strangers.join()
        finally:
            Connection.outgoing = outgoing
        assert server.wait() == 0, server.output
        counted = re.search(r"refused: .*?'client': (\d+)", server.output)
    expected = reference.model.state_dict()
    weights = half.state_dict()
    return {
        "mutants": client.sent,
        "corrupt messages": Fuzzing.broken,
        "refused hellos": hellos[0],
        "refusals counted": int(counted[1]) if counted else 0,
        "seconds": time.monotonic() - started,
        "MiB after 10 %": memory[len(memory) // 10 + 1][1],
        "MiB at the end": memory[-1][1],
        "same bits": all(torch.equal(value, expected[name]) for name, value in weights.items()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--codec", default="fp8")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = fuzz(Path(folder), chosen.frames, chosen.seed, chosen.codec)
    for name, value in found.items():
        print(f"{name}: {value}")
    sys.exit(not (found["same bits"] and found["refusals counted"] >= found["mutants"]))


if __name__ == "__main__":
    main()
