"""What a client costs: seconds for a step of a client, and memory, for 1 to 1,000 clients.

    python benchmarks/clients.py            # prints the table, on the way each case; --write keeps results/clients.md
    python benchmarks/clients.py --one in-process 1000

Each client has 32 samples (random images, 8x8) and takes 4 steps of 8 in an epoch of SplitFed V2; the network is the
CNN of the digits, cut after layer3. In process, 4 client halves are in memory and the others on the disk. Over gRPC
every client is a thread with its own connection, all in one process beside the server's, without TLS. On Ray 2 actors
hold all clients. Every number of clients runs in a process of its own, three epochs; the time is that of the last two,
the memory the most that the process (the server's, over gRPC) held at any time beyond what it held before it began.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cutlayer import Always, EpochRecord, Fleet, Method, Training, fit, split
from cutlayer.data.images import Images
from cutlayer.models.cut import Halves
from cutlayer.models.networks import make_model
from cutlayer.records.environment import environment
from cutlayer.seeds import seeded

SAMPLES, BATCH, EPOCHS = 32, 8, 3
STEPS = SAMPLES // BATCH
CASES = [
    ("in process", (1, 10, 100, 1000)),
    ("grpc", (1, 10, 100)),
    ("ray", (1, 10, 100, 1000)),
]


def network() -> Halves:
    with seeded(0, "model"):
        return split(make_model("cnn", (1, 8, 8), (0.3,), (0.4,)), "layer3")


def share(client: int) -> Images:
    draw = torch.Generator().manual_seed(client)
    inputs = torch.randint(0, 256, (SAMPLES, 1, 8, 8), generator=draw, dtype=torch.uint8)
    return Images(inputs, torch.randint(0, 10, (SAMPLES,), generator=draw), (0.3,), (0.4,))


def method() -> Method:
    return Method(Always(), "fp8_e4m3", "fp8_e5m2", fleet=Fleet(live=4))


TRAINING = Training(epochs=EPOCHS, batch_size=BATCH)


def in_process(clients: int, note: Callable[[EpochRecord], None]) -> None:
    fit(network(), [share(client) for client in range(clients)], method=method(), training=TRAINING, on_epoch=note)


def over_grpc(clients: int, note: Callable[[EpochRecord], None]) -> None:
    from cutlayer.runs.serve import Callbacks, serve

    names = [f"client{number}" for number in range(clients)]
    joiners: list[subprocess.Popen] = []

    def listening(port: int) -> None:
        joiners.append(subprocess.Popen([sys.executable, __file__, "--join", str(port), str(clients)]))

    with tempfile.TemporaryDirectory() as folder:
        halves = network()
        shape = tuple(halves.client(share(0).inputs[:1]).shape[1:])
        serve(
            halves.server,
            shape,
            listen="127.0.0.1:0",
            run=folder,
            clients=names,
            method=method(),
            training=TRAINING,
            callbacks=Callbacks(note, listening),
        )
        joiners[0].wait(60)


def join_all(port: int, clients: int) -> None:
    """The clients' side of `over_grpc`: a thread each."""
    from cutlayer.runs.join import join

    halves = [network().client for _ in range(clients)]  # no thread can run a network while torch.fx cuts one
    with tempfile.TemporaryDirectory() as folder:

        def one(number: int) -> None:
            name = f"client{number}"
            chosen = {"method": method(), "training": TRAINING, "name": name, "folder": f"{folder}/{name}"}
            join(f"127.0.0.1:{port}", halves[number], share(number), **chosen)

        threads = [threading.Thread(target=one, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def on_ray(clients: int, note: Callable[[EpochRecord], None]) -> None:
    from cutlayer.backends.ray import Ray

    sets = [share(client) for client in range(clients)]
    fit(network(), sets, method=method(), training=TRAINING, on_epoch=note, backend=Ray(actors=2, cpus_per_actor=0.5))


BACKENDS = {"in process": in_process, "grpc": over_grpc, "ray": on_ray}


def measure(backend: str, clients: int) -> dict[str, float]:
    """One case, in this process."""
    torch.set_num_threads(1)
    network()  # what PyTorch takes on its first use is not a client's
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = [time.perf_counter()]
    BACKENDS[backend](clients, lambda record: times.append(time.perf_counter()))
    epochs = [end - begin for begin, end in itertools.pairwise(times[1:])]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "first": (times[1] - times[0]) / clients / STEPS,
        "step": statistics.mean(epochs) / clients / STEPS,
        "memory": (peak - before) / 1024,
    }


def table(rounds: int) -> str:
    """All cases, each in a process of its own, in turn, so that a busy moment does not hit one case alone."""
    cases = [(backend, clients) for backend, counts in CASES if backend in BACKENDS for clients in counts]
    found: dict[tuple[str, int], list[dict]] = {case: [] for case in cases}
    for _ in range(rounds):
        for backend, clients in cases:
            command = [sys.executable, __file__, "--one", backend, str(clients)]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            found[backend, clients].append(json.loads(output.splitlines()[-1]))
            print(backend, clients, found[backend, clients][-1], file=sys.stderr, flush=True)
    where = environment()
    lines = [
        f"`{' '.join(['python benchmarks/clients.py', *sys.argv[1:]])}`: median (lowest to highest) of n = {rounds}. "
        f"torch {where['torch']}, "
        f"{where['processor']}, {where['cores']} cores, one thread; load {os.getloadavg()[1]:.1f} at the end.",
        "",
        "| backend | clients | ms a client's step | over one client in process | memory, MiB |",
        "|---|---|---|---|---|",
    ]
    base = statistics.median(case["step"] for case in found["in process", 1])
    for (backend, clients), values in found.items():
        steps = [1000 * value["step"] for value in values]
        memory = statistics.median(value["memory"] for value in values)
        lines.append(
            f"| {backend} | {clients} | {statistics.median(steps):.2f} ({min(steps):.2f} to {max(steps):.2f}) "
            f"| {statistics.median(steps) / 1000 / base:.2f} | {memory:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=2, metavar=("BACKEND", "CLIENTS"), help="one case, in this process")
    parser.add_argument("--join", nargs=2, type=int, metavar=("PORT", "CLIENTS"), help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="keep the table in results/clients.md")
    chosen = parser.parse_args()
    if chosen.join:
        join_all(*chosen.join)
    elif chosen.one:
        print(json.dumps(measure(chosen.one[0], int(chosen.one[1]))))
    else:
        text = table(chosen.rounds)
        print(text)
        if chosen.write:
            (Path(__file__).parent / "results" / "clients.md").write_text(text)


if __name__ == "__main__":
    main()
