"""Codecs on real activations and gradients: bits, error, speed, beside PyTorch's casts, a copy and the codes' entropy.

    CUTLAYER_DATA=<folder with CIFAR-10> python benchmarks/codecs.py make FILE
    python benchmarks/codecs.py show FILE [--codec SPEC ...] [--json FILE]

`make` trains a narrow VGG11 on CIFAR-10, cuts it, and keeps 8 MiB of activations and 8 MiB of gradients at the cut in
FILE (a few minutes on one core). `show` prints the table. One thread; speeds are of float32 bytes a second of processor
time, the median of `--repeat` runs with the quartiles in brackets; encode includes packing, decode unpacking.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cutlayer.codecs import FLOAT_CODECS, Codec, Encoded, get_float_codec
from cutlayer.data.datasets import load
from cutlayer.models.cut import split
from cutlayer.models.networks import make_model

VALUES = 2 * 2**20  # 8 MiB of float32
BATCH = 128
SPECS = [
    *FLOAT_CODECS,
    "fp8_e4m3:channel",
    "fp8_e4m3:stochastic",
    "mxfp4:stochastic",
    *(f"{name}+zstd" for name in FLOAT_CODECS),
    "topk0.1>fp16",
    "randtopk0.1>fp16",
    "topk0.1>fp8_e4m3+zstd",
    "topk0.25>mxfp4+zstd",
]


def make(file: Path, steps: int, width: float, cut: str) -> None:
    torch.manual_seed(0)
    train, test = load("cifar10")
    model = make_model("vgg11", tuple(train.inputs.shape[1:]), train.mean, train.std, width=width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    for step in range(steps):
        chosen = torch.randint(len(train), (BATCH,))
        loss = nn.functional.cross_entropy(model(train.inputs[chosen]), train.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)
    model.eval()
    with torch.no_grad():
        hits = [
            (model(x).argmax(1) == y).sum() for x, y in zip(test.inputs.split(500), test.labels.split(500), strict=True)
        ]
    print(f"test accuracy {sum(hits).item() / len(test):.3f}")
    model.train()
    halves = split(model, cut)
    kept: dict[str, list[Tensor]] = {"activations": [], "gradients": []}
    while sum(map(Tensor.numel, kept["activations"])) < VALUES:
        chosen = torch.randint(len(train), (BATCH,))
        activations = halves.client(train.inputs[chosen]).detach().requires_grad_()
        nn.functional.cross_entropy(halves.server(activations), train.labels[chosen]).backward()
        assert activations.grad is not None
        kept["activations"].append(activations.detach())
        kept["gradients"].append(activations.grad)
    samples = VALUES // kept["activations"][0][0].numel()
    save_file({name: torch.cat(parts)[:samples].contiguous() for name, parts in kept.items()}, file)
    print(f"{file}: {samples} samples of shape {list(kept['activations'][0].shape[1:])} after {cut}, width {width}")


def quartiles(work: Callable[[], object], repeat: int, nbytes: int) -> list[float]:
    """GB/s of the quartiles of `repeat` runs, fastest last, after two that do not count."""
    seconds = []
    for _ in range(repeat + 2):
        start = time.thread_time()
        work()
        seconds.append(time.thread_time() - start)
    return [nbytes / s / 1e9 for s in reversed(statistics.quantiles(seconds[2:], n=4))]


def entropy(codec: Codec, encoded: Encoded) -> float:
    """Entropy of the codes in bits a value: of the bytes of each stream, as if each were drawn for itself."""
    bits = 0.0
    for columns in codec.streams(encoded.shape):
        stream = encoded.rows[:, columns].reshape(-1).numpy()
        share = np.bincount(stream, minlength=256) / max(1, stream.size)
        bits -= stream.size * float((share[share > 0] * np.log2(share[share > 0])).sum())
    return bits / (len(encoded) * int(np.prod(encoded.shape)))


def measure(spec: str, values: Tensor, repeat: int) -> dict:
    codec = get_float_codec(spec)
    encoded = codec.encode(values)
    payload = b"".join(codec.pack(encoded))
    view, shape, nbytes = memoryview(payload), tuple(values.shape[1:]), values.numel() * 4
    error = (codec.decode(encoded) - values).double().norm() / values.double().norm()
    return {
        "codec": spec,
        "bits": 8 * len(payload) / values.numel(),
        "entropy": entropy(codec, encoded),
        "error": error.item(),
        "encode": quartiles(lambda: codec.pack(codec.encode(values)), repeat, nbytes),
        "decode": quartiles(lambda: codec.decode(codec.unpack(view, len(values), shape)), repeat, nbytes),
    }


def baselines(values: Tensor, repeat: int) -> list[dict]:
    """The same work in plain PyTorch: a copy, the casts alone, and scale, clamp and cast as one writes it."""
    nbytes = values.numel() * 4
    rows: list[dict] = [{"codec": "memory copy", "encode": quartiles(values.clone, repeat, nbytes), "decode": None}]
    for name, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        largest = torch.finfo(dtype).max
        scaled = values.to(dtype)

        def out(dtype: torch.dtype = dtype, largest: float = largest) -> Tensor:
            scale = largest / values.abs().amax()
            return (values * scale).clamp(-largest, largest).to(dtype)

        for kind, there, back in (
            ("cast", lambda dtype=dtype: values.to(dtype), lambda codes=scaled: codes.to(torch.float32)),
            ("scaled", out, lambda codes=scaled: codes.to(torch.float32) * 0.5),
        ):
            encode, decode = quartiles(there, repeat, nbytes), quartiles(back, repeat, nbytes)
            rows.append({"codec": f"torch {name} {kind}", "encode": encode, "decode": decode})
    return rows


def show(file: Path, specs: list[str], repeat: int, output: Path | None) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    cpu = next(
        (line.split(":")[1].strip() for line in _cpu_info() if line.startswith("model name")), platform.processor()
    )
    setup = {
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "n": repeat,
    }
    print(", ".join(f"{key} {value}" for key, value in setup.items()))
    tensors = load_file(file)
    results = {}
    for name, values in tensors.items():
        zeros = (values == 0).double().mean().item()
        print(f"\n{name} {list(values.shape)}, {100 * zeros:.1f} % zeros\n")
        print("| codec | bits/value | entropy | relative error | encode GB/s | decode GB/s |")
        print("|---|---|---|---|---|---|")
        results[name] = [*baselines(values, repeat), *(measure(spec, values, repeat) for spec in specs)]
        for row in results[name]:
            numbers = [f"{row[key]:.3f}" if key in row else "" for key in ("bits", "entropy")]
            numbers += [f"{row['error']:.4f}" if "error" in row else "", _rate(row["encode"]), _rate(row["decode"])]
            print(f"| {row['codec']} | {' | '.join(numbers)} |")
        rows = {row["codec"]: row for row in results[name]}
        if "fp8_e4m3" in rows:
            plain, ours = (
                1 / r["encode"][1] + 1 / r["decode"][1] for r in (rows["torch e4m3 scaled"], rows["fp8_e4m3"])
            )
            print(f"\nscaled E4M3 out and back: {plain / ours:.1f} times as fast as PyTorch's casts")
    if output:
        output.write_text(json.dumps({"setup": setup, "results": results}, indent=1))


def _rate(rates: list[float] | None) -> str:
    return "" if rates is None else f"{rates[1]:.2f} [{rates[0]:.2f}, {rates[2]:.2f}]"


def _cpu_info() -> list[str]:
    info = Path("/proc/cpuinfo")
    return info.read_text().splitlines() if info.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="train, and keep activations and gradients in FILE")
    making.add_argument("file", type=Path)
    making.add_argument("--steps", type=int, default=1500)
    making.add_argument("--width", type=float, default=0.25)
    making.add_argument("--cut", default="layer4")
    showing = commands.add_parser("show", help="print the table")
    showing.add_argument("file", type=Path)
    showing.add_argument("--codec", action="append", dest="specs", help="a spec; may come several times")
    showing.add_argument("--repeat", type=int, default=15)
    showing.add_argument("--json", type=Path, dest="output")
    chosen = parser.parse_args()
    if chosen.command == "make":
        make(chosen.file, chosen.steps, chosen.width, chosen.cut)
    else:
        show(chosen.file, chosen.specs or SPECS, chosen.repeat, chosen.output)


if __name__ == "__main__":
    main()
