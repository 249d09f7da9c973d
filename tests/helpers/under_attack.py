"""The long form of test_one_bad_peer.py: many honest clients, and a member and strangers that attack all the while.

    python -m tests.helpers.under_attack --clients 10 --epochs 300

Server, honest clients and attackers are one process, whose memory, descriptors and threads are those of all of them.
The honest must end in the bits of an undisturbed run without the attacker, and the figures must be flat.
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

from cutlayer.errors import CutlayerError
from tests.helpers.attacked import Attacked, certificates, memory_mib

CLAIMS = ("samples", "test_samples", "batch_size", "epoch_samples", "epoch_flops", "half_bytes")


def attack(scene: Attacked, over: threading.Event, counts: Counter[str]) -> None:
    """One attack after the other, drawn at random, until it is over."""
    draw = random.Random(0)

    def claims() -> None:
        scene.refusal(scene.hello(**{draw.choice(CLAIMS): 1 << 62}))

    def copy_without_folder() -> None:
        scene.refusal(scene.hello(checkpoints=(draw.randrange(9),), run="other"))

    def silent_streams() -> None:
        with scene.channel(draw.choice(["eve", "mallory"])) as channel:
            calls = [scene.exchange(channel)(wait(over)) for _ in range(8)]
            time.sleep(0.2)
            for call in calls:
                call.cancel()

    def connections() -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(50):
                stack.enter_context(socket.create_connection(("127.0.0.1", scene.port), timeout=5))
            time.sleep(0.2)

    def garbage() -> None:
        scene.say(draw.randbytes(draw.randrange(1, 5000)), name=draw.choice(["eve", "mallory"]))

    attacks = {each.__name__: each for each in (claims, copy_without_folder, silent_streams, connections, garbage)}
    while not over.is_set():
        name = draw.choice(list(attacks))
        with contextlib.suppress(grpc.RpcError, OSError, CutlayerError, AssertionError, IndexError):
            attacks[name]()
        counts[name] += 1


def wait(over: threading.Event):
    over.wait(5)
    yield b""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=300)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    honest = tuple(f"client{number}" for number in range(chosen.clients))
    names, over, counts, figures = (*honest, "mallory"), threading.Event(), Counter(), []

    def look(exchange: str) -> None:
        figures.append((memory_mib(), len(os.listdir("/proc/self/fd")), threading.active_count()))

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tls = certificates(folder / "tls", names)
        with Attacked(folder, tls, patience=10.0, epochs=chosen.epochs, names=names) as scene:
            scene.watch(look)
            began = time.monotonic()
            scene.session().close()
            attacker = threading.Thread(target=attack, args=(scene, over, counts))
            attacker.start()
            scene.begin(*honest)
            try:
                served = scene.finish(*honest)
            finally:
                over.set()
                attacker.join(30)
            seconds = time.monotonic() - began
            print(f"{chosen.clients} honest clients, {chosen.epochs} epochs in {seconds:.0f} s: same bits")
            print(f"attacks: {dict(counts)}; refused: {served.refusals}")
    for place, which in (("after 10 %", len(figures) // 10), ("at the end", -1)):
        memory, descriptors, threads = figures[which]
        print(f"{place}: peak memory {memory:.0f} MiB, {descriptors} descriptors, {threads} threads")
    early, late = figures[len(figures) // 10], figures[-1]
    sys.exit(not (late[0] < early[0] + 100 and late[1] < early[1] + 120 and late[2] < early[2] + 40))


if __name__ == "__main__":
    main()
