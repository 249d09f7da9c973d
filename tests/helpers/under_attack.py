"""The long form of test_one_bad_peer.py: many honest clients, and a member and strangers that attack all the while.

    python -m tests.helpers.under_attack --clients 10 --epochs 300 --each 60

Each attack goes on for so long, one after the other, while the epochs are spread over that time. Server, honest
clients and attackers are one process, whose memory, descriptors and threads are those of all of them. The honest must
end in the bits of an undisturbed run without the attacker, and the figures must be flat.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import grpc
import torch

from cutlayer.backends.grpc.link import CHUNK, CHUNK_BYTES, CONFIRM, MORE
from cutlayer.codecs import Encoded, get_codec
from cutlayer.errors import CutlayerError
from cutlayer.wire.frames import MAGIC, PREFIX, VERSION, Frame, pack
from cutlayer.wire.messages import Done, Plan
from tests.helpers.attacked import Attacked, certificates, memory_mib, plan_of, step

CLAIMS = ("samples", "test_samples", "batch_size", "epoch_samples", "epoch_flops", "half_bytes")
STRANGERS = ("eve", "mallory")


class Attacker:
    """mallory, a member whose device is in the wrong hands, and eve, who has a certificate and is no member."""

    def __init__(self, scene: Attacked) -> None:
        self.scene, self.draw, self.over = scene, random.Random(0), threading.Event()

    def claims(self) -> None:
        """A Hello that claims far too much."""
        self.scene.refusal(self.scene.hello(**{self.draw.choice(CLAIMS): 1 << 62}))

    def copies(self) -> None:
        """A second device of the same name, without its folder."""
        self.scene.refusal(self.scene.hello(checkpoints=(self.draw.randrange(9),), run="other"))

    def silent_streams(self) -> None:
        """Streams that never say Hello."""
        with self.scene.channel(self.draw.choice(STRANGERS)) as channel:
            calls = [self.scene.exchange(channel)(self._silence()) for _ in range(8)]
            time.sleep(0.2)
            for call in calls:
                call.cancel()

    def connections(self) -> None:
        """TCP connections that never speak TLS."""
        with contextlib.ExitStack() as stack:
            for _ in range(50):
                stack.enter_context(socket.create_connection(("127.0.0.1", self.scene.port), timeout=5))
            time.sleep(0.2)

    def garbage(self) -> None:
        """Bytes that are no message."""
        self.scene.say(self.draw.randbytes(self.draw.randrange(1, 5000)), name=self.draw.choice(STRANGERS))

    def bombs(self) -> None:
        """Steps of a member's session that would decode to a thousand times their size."""
        codec = self.draw.choice(["fp8_e4m3+zstd", "topk0.001>fp8_e4m3"])
        made = get_codec(codec).encode(torch.zeros(1, 1 << 18))
        tensor = Encoded(codec, (1 << 18,), torch.zeros(8, made.rows.shape[1], dtype=torch.uint8), made.shared)
        self._in_session(lambda plan: step(plan, activations=tensor))

    def empty_epochs(self) -> None:
        """A member that is done after no step."""
        self._in_session(lambda plan: pack(Frame(Done(plan.client, plan.epoch, 0, {}))))

    def crumbs(self) -> None:
        """A frame in chunks of a byte."""
        prefix = PREFIX.pack(MAGIC, VERSION, 100, 10000)
        self.scene.say(pack(Frame(self.scene.hello())), CHUNK.pack(MORE, 0, 0) + prefix)

    def confirmations(self) -> None:
        """A member that only confirms, and never ends the frame that it begins."""
        first = CHUNK.pack(MORE, 0, 0) + PREFIX.pack(MAGIC, VERSION, 0, 2_000_000)

        def outgoing():
            yield pack(Frame(self.scene.hello()))
            yield first.ljust(CHUNK.size + CHUNK_BYTES, b"x")
            for _ in range(50):
                yield CHUNK.pack(CONFIRM, 0, 0)
                time.sleep(0.1)

        with self.scene.channel() as channel:
            list(self.scene.exchange(channel)(outgoing(), timeout=20))

    def _in_session(self, made) -> None:
        session = self.scene.session()
        try:
            plan = plan_of(session)
            for _ in range(20 if isinstance(plan, Plan) else 0):
                session.link.send(made(plan), 0.5)
        finally:
            session.close()

    def _silence(self):
        self.over.wait(5)
        yield b""


ATTACKS = (
    "claims",
    "copies",
    "silent_streams",
    "connections",
    "garbage",
    "crumbs",
    "bombs",
    "empty_epochs",
    "confirmations",
)


def attack(attacker: Attacker, seconds: float, figures: dict[str, list[float]]) -> None:
    """One attack after the other, each for so long, and the highest figures during each."""
    for name in ATTACKS:
        began, rounds = time.monotonic(), 0
        highest = [0.0, 0.0, 0.0]
        while time.monotonic() - began < seconds and not attacker.over.is_set():
            with contextlib.suppress(grpc.RpcError, OSError, CutlayerError, AssertionError, IndexError):
                getattr(attacker, name)()
            rounds += 1
            highest = [max(pair) for pair in zip(highest, measured(), strict=True)]
        figures[name] = [rounds, *highest]
        print(f"| {name} | {rounds} | {highest[0]:.0f} | {highest[1]:.0f} | {highest[2]:.0f} |", flush=True)


def measured() -> tuple[float, int, int]:
    """Peak memory in MiB, descriptors and threads of this process."""
    return memory_mib(), len(os.listdir("/proc/self/fd")), threading.active_count()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--each", type=float, default=60.0, help="seconds that each attack goes on")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    honest = tuple(f"client{number}" for number in range(chosen.clients))
    names, epochs, figures, counts = (*honest, "mallory"), [], {}, Counter()
    began = time.monotonic()

    def paced(exchange: str) -> None:
        """The epochs take as long as the attacks."""
        epochs.append(measured())
        counts[exchange] += 1
        due = began + len(epochs) * chosen.each * len(ATTACKS) / chosen.epochs
        time.sleep(max(0.0, due - time.monotonic()))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tls = certificates(folder / "tls", names)
        with Attacked(folder, tls, patience=30.0, epochs=chosen.epochs, names=names) as scene:
            scene.watch(paced)
            began = time.monotonic()
            scene.session().close()
            attacker = Attacker(scene)
            print("| attack | rounds | peak memory, MiB | descriptors | threads |\n|---|---|---|---|---|", flush=True)
            thread = threading.Thread(target=attack, args=(attacker, chosen.each, figures))
            thread.start()
            scene.begin(*honest)
            try:
                served = scene.finish(*honest)
            finally:
                attacker.over.set()
                thread.join(60)
            seconds = time.monotonic() - began
            print(
                f"\n{chosen.clients} honest clients, {chosen.epochs} epochs ({dict(counts)}) in {seconds:.0f} s: the "
                f"bits of a run without the attacker; refused: {served.refusals}\n"
            )
    marks = {f"after epoch {number}": epochs[number - 1] for number in spread(len(epochs))}
    print("| | peak memory, MiB | descriptors | threads |\n|---|---|---|---|")
    for place, (memory, descriptors, threads) in marks.items():
        print(f"| {place} | {memory:.0f} | {descriptors} | {threads} |")
    early, late = epochs[len(epochs) // 10], epochs[-1]
    sys.exit(not (late[0] < early[0] + 100 and late[1] < early[1] + 120 and late[2] < early[2] + 40))


def spread(count: int) -> list[int]:
    """A few epochs from the first tenth to the last."""
    return sorted({max(1, count * part // 10) for part in (1, 3, 5, 7, 9, 10)})


if __name__ == "__main__":
    main()
