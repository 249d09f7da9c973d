"""What the split costs in process: time beside uncut training, replay beside plain training, memory, framing.

    python benchmarks/core.py [--rounds 15] [--out benchmarks/results/core.md]

Every figure of speed is a ratio of two things measured in turn in the same run, pair by pair; median and quartiles of
the ratios are printed. One thread, so that two OpenMP pools do not slow each other on shared cores.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from cutlayer import Always, Method, Optimizer, Periodic, StoreOptions, Training, split
from cutlayer.backends.local import LocalPeer
from cutlayer.codecs import get_float_codec
from cutlayer.data.batches import Batches
from cutlayer.data.images import Images
from cutlayer.memory.store import ReplayStore
from cutlayer.method import Task
from cutlayer.models.networks import make_model
from cutlayer.records.environment import environment
from cutlayer.records.ledger import Ledger
from cutlayer.runs.loop import train_epoch
from cutlayer.schedule import Exchange, State
from cutlayer.training.checks import ClientSummary
from cutlayer.training.client import Client
from cutlayer.training.halves import TrainedHalf
from cutlayer.training.job import ClientJob, Job
from cutlayer.training.server import Server

WIDTH, CUT, BATCH, SAMPLES = 0.5, "layer4", 128, 512


def images() -> Images:
    """Noise: the time of a step does not depend on what is in the pictures."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 256, (SAMPLES, 3, 32, 32), generator=draw, dtype=torch.uint8)
    return Images(inputs, torch.randint(0, 10, (SAMPLES,), generator=draw), (0.5,) * 3, (0.25,) * 3)


def network(width: float = WIDTH) -> torch.nn.Module:
    torch.manual_seed(0)
    return make_model("vgg11", (3, 32, 32), (0.5,) * 3, (0.25,) * 3, width=width)


OPTIMIZER = Optimizer(lr=0.001, schedule="constant")
TRAINING = Training(epochs=10**6, batch_size=BATCH, client=OPTIMIZER, server=OPTIMIZER)


def uncut(data: Images, training: Training = TRAINING, width: float = WIDTH) -> Callable[[], None]:
    """An epoch of ordinary training of the whole network."""
    model, epoch = network(width), iter(range(10**6))
    if training.channels_last:
        model.to(memory_format=torch.channels_last)
    optimizer = OPTIMIZER.build(model.parameters())

    def run() -> None:
        for batch in Batches(data, batch_size=BATCH).epoch(next(epoch)):
            with training.autocast():
                outputs = model(training.laid_out(batch.inputs))
            loss = cross_entropy(outputs.float(), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def cut(
    data: Images, method: Method, training: Training = TRAINING, width: float = WIDTH
) -> tuple[Callable[[], None], Server]:
    """An epoch of split training over frames in this process; the server's state says which exchange."""
    ledger, halves = Ledger(), split(network(width), CUT)
    body = TrainedHalf(halves.client, OPTIMIZER, training)
    job = ClientJob(0, Batches(data, batch_size=BATCH), None, method, training)
    client = Client(job, lambda: body, ledger)
    info, bfloat16 = ClientSummary(SAMPLES, 0, BATCH), training.precision == "bf16"
    server = Server(Job(halves.server, client.cut_shape, method, training, Task(), bfloat16), [info], ledger)
    peer = LocalPeer(client)
    return lambda: void(train_epoch(server, [peer])), server


def void(_: object) -> None:
    """Forget a result."""


def replayed(
    data: Images, codec: str, training: Training = TRAINING, width: float = WIDTH
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A C epoch, and an epoch of the same server half on float tensors in memory."""
    run, server = cut(data, Method(Periodic(period=10**6), codec, codec), training, width)
    run()
    run()
    assert server.states.exchange is Exchange.NONE
    tensors = [
        (get_float_codec(codec).decode(encoded), labels) for encoded, labels in server.replayed.store.batches(SAMPLES)
    ]
    activations, labels = tensors[0]
    half = split(network(width), CUT).server
    if training.channels_last:
        half.to(memory_format=torch.channels_last)
    optimizer = OPTIMIZER.build(half.parameters())

    def plain() -> None:
        for ids in torch.randperm(SAMPLES).split(BATCH):
            with training.autocast():
                outputs = half(training.laid_out(activations[ids]))
            loss = cross_entropy(outputs.float(), labels[ids])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def replay() -> None:
        server.states.state = State(Exchange.NONE, 2, 0.0)
        run()

    return replay, plain


def ratios(a: Callable[[], None], b: Callable[[], None], rounds: int) -> list[float]:
    """Time of a over time of b, in turn, which goes first changing from round to round."""
    out = []
    for number in range(rounds + 2):
        spent = {}
        for name, run in (("a", a), ("b", b)) if number % 2 else (("b", b), ("a", a)):
            begin = time.perf_counter()
            run()
            spent[name] = time.perf_counter() - begin
        if number >= 2:  # the first two warm up
            out.append(spent["a"] / spent["b"])
    return out


def summary(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    quartiles = statistics.quantiles(values, n=4)
    return f"{statistics.median(values):.3f} ({quartiles[0]:.3f} to {quartiles[2]:.3f})"


def memory(placement: str) -> str:
    """Peak memory of a process that fills a store of 512 MiB, beyond what it takes without the store."""
    lines = subprocess.run(
        [sys.executable, __file__, "--fill-store", placement], capture_output=True, text=True, check=True
    ).stdout
    return lines.strip()


def fill_store(placement: str) -> None:
    """Put 512 MiB of 8-bit activations into a store; print how anonymous and resident memory grow."""

    def status(field: str) -> float:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) / 1024

    codec = get_float_codec("fp8_e4m3")
    values = torch.randn(64, 64, 8, 8)
    codec.decode(codec.encode(values))
    rows = (512 << 20) // 4096
    store = ReplayStore(rows, StoreOptions(placement))  # type: ignore[arg-type]
    before, peak = status("RssAnon"), status("VmHWM")
    for first in range(0, rows, 64):
        store.put(torch.arange(first, first + 64), codec.encode(values), torch.zeros(64, dtype=torch.int64))
    for _ in zip(range(200), store.batches(128, torch.Generator()), strict=False):
        pass
    resident = status("VmHWM") - peak
    print(
        f"{status('RssAnon') - before:.0f} MiB anonymous; {resident:.0f} MiB of pages, those cached of a file included"
    )


def frame_overhead(data: Images) -> list[str]:
    """Bytes beyond activations and gradients, as a share of them."""
    out = []
    for width in (0.5, 1.0):
        torch.manual_seed(0)
        halves = split(make_model("vgg11", (3, 32, 32), (0.5,) * 3, (0.25,) * 3, width=width), CUT)
        for codec in ("fp32", "fp8_e4m3"):
            ledger, method = Ledger(), Method(Always(), codec, codec)
            training = Training(epochs=1, batch_size=BATCH)
            body = TrainedHalf(halves.client, OPTIMIZER, training)
            feed = Batches(data.first(BATCH), batch_size=BATCH)
            client = Client(ClientJob(0, feed, None, method, training), lambda body=body: body, ledger)
            info = ClientSummary(BATCH, 0, BATCH)
            server = Server(Job(halves.server, client.cut_shape, method, training, Task()), [info], ledger)
            train_epoch(server, [LocalPeer(client)])
            sizes: dict[str, int] = {}
            for kinds in ledger.take().bytes.values():
                for kind, count in kinds.items():
                    sizes[kind] = sizes.get(kind, 0) + count
            payload = sizes["activations"] + sizes["gradients"]
            shares = f"control {sizes['control'] / payload:.4%}, labels {sizes['labels'] / payload:.4%}"
            out.append(f"| frame overhead of a step, width {width}, {codec} | {shares} | under 0.1 % |")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="at least 1, which has no quartiles")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--fill-store", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {arguments.rounds}")
    torch.set_num_threads(1)
    if arguments.fill_store:
        return fill_store(arguments.fill_store)
    data = images()
    where = environment()
    lines = [
        f"`python benchmarks/core.py --rounds {arguments.rounds}`: VGG11 of width {WIDTH}, cut after {CUT}, epochs of "
        f"{SAMPLES} images in batches of {BATCH}, n = {arguments.rounds}; torch {where['torch']}, "
        f"Python {where['python']}, {where['processor']}, one thread. Times are ratios, median (quartiles).",
        "",
        "| what | measured | aim |",
        "|---|---|---|",
    ]
    for name, method, aim in (("fp32", Method(), 1.02), ("fp8", Method.of(Always(), "fp8"), 1.05)):
        values = ratios(cut(data, method)[0], uncut(data), arguments.rounds)
        lines.append(f"| A epoch, {name}, over uncut training | {summary(values)} | {aim} |")
    for name, codec in (("fp32", "fp32"), ("fp8", "fp8_e4m3")):
        values = ratios(*replayed(data, codec), arguments.rounds)
        lines.append(f"| C epoch, {name} store, over server half on float tensors | {summary(values)} | 1.05 |")
    values = ratios(uncut(data), uncut(data), arguments.rounds)
    lines.append(f"| uncut training over itself: the noise of this measurement | {summary(values)} | 1 |")
    for placement in ("memory", "disk"):
        lines.append(f"| growth of memory, store of 512 MiB placed in {placement} | {memory(placement)} | |")
    lines += frame_overhead(data)
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text)
    return None


if __name__ == "__main__":
    main()
