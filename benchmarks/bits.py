"""Whether a change of the code has changed a bit: digests of many short runs, before it and after it.

    python benchmarks/bits.py --write before.json      # with the code as it was
    python benchmarks/bits.py --compare before.json    # with the code as it is; exit status 1 if a row differs
    python benchmarks/bits.py --compare before.json --only grpc     # the rows whose name holds this

Each row is a run of the digits recipe through the command line alone: the `cutlayer` beside this Python, or the one
that `--cutlayer` names. A row holds the digests of its final weights and what each epoch exchanged, lost, scored and
cost, seconds left out. The same code gives the same rows every time; another machine or another release of PyTorch need
not, so files of rows are not for the repository. All rows take about six minutes on one core.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

TIMEOUT = 300.0  # seconds for a process

# The command line and the run folder as this script knows them: what to change here if they change there.
RECIPE = "digits"
FLAGS = {
    "optimizer": "--client.name",
    "placement": "--store.placement",
    "mode": "--strategy",
}  # all others have the choice's own name
RUN_DIR, RESUME, METRICS = "--run-dir", "--resume", "metrics.jsonl"
MODEL, SERVER_HALF, CLIENT_HALF = "model.safetensors", "server.safetensors", "client.safetensors"
# Kinds of bytes that every run counts the same way. Of control bytes that holds in one process only: processes also say
# that they are there.
KINDS = ("activations", "gradients", "labels", "weights")
SCORES = ("loss", "accuracy")

SIZES = {"train_samples": 200, "test_samples": 60, "epochs": 6, "batch_size": 32, "threads": 1}
BASE: dict[str, Any] = {**SIZES, "schedule": "periodic", "period": 3}
DROP = {"schedule": "drop", "threshold": 0.2}
CODECS = {
    "fp32": "fp32",
    "fp8": "fp8",
    "mxfp4+zstd": "mxfp4+zstd",
    "int4:stochastic": "int4:stochastic",
    "delta": "delta0.3>mxfp4+zstd/mxfp4:stochastic",
    "ef": "mxfp4+zstd/ef>topk0.1>fp8_e5m2",
}


@dataclass(frozen=True)
class Row:
    """A run: how its participants meet ("process", "killed", "grpc" or "ray"), and its choices beside `BASE`."""

    name: str
    how: str = "process"
    choices: Mapping[str, Any] = field(default_factory=dict)

    def flags(self, *without: str) -> list[str]:
        """The choices as arguments of the command line."""
        given = []
        for name, value in {**BASE, **self.choices}.items():
            if name not in without:
                given += [flag(name)] if value is True else [flag(name), str(value)]
        return given


def flag(choice: str) -> str:
    """The flag of a choice."""
    return FLAGS.get(choice, f"--{choice.replace('_', '-')}")


def rows() -> Iterator[Row]:
    """All rows."""
    for name, codec in CODECS.items():
        yield Row(f"1 client, {name}", choices={"codec": codec})
    yield Row("1 client, always", choices={"schedule": "always"})
    yield Row("1 client, drop", choices=DROP)
    yield Row("1 client, drift, adam", choices={**DROP, "schedule": "drift", "optimizer": "adam"})
    yield Row("1 client, bf16", choices={"precision": "bf16"})
    yield Row("1 client, microbatches", choices={"microbatches": 2})
    yield Row("1 client, augment, eval in B", choices={"augment": True, "norm_in_b": "eval", "evaluate_every": 2})
    yield Row("1 client, store on disk", choices={"placement": "disk", "codec": CODECS["delta"]})
    for mode in ("sequential", "splitfed_v1", "splitfed_v2", "parallel"):
        several = {"clients": 4, "mode": mode}
        yield Row(f"4 clients, {mode}", choices=several)
        yield Row(f"4 clients, {mode}, delta, drop", choices={**several, **DROP, "codec": CODECS["delta"]})
        absent = {"fraction": 0.5, "dropout": 0.3, "partition": "dirichlet:0.5"}
        yield Row(f"4 clients, {mode}, fraction, dropout", choices={**several, **absent})
        yield Row(f"4 clients, {mode}, own states", choices={**several, **DROP, "state": "own", "epochs": 8})
    for mode in ("splitfed_v1", "splitfed_v2"):
        often = {"clients": 4, "mode": mode, "average_every": 1, "live_clients": 2, "codec": CODECS["ef"]}
        yield Row(f"4 clients, {mode}, average_every, ef", choices=often)
    plain = {"clients": 4, "schedule": "always", "codec": "fp32", "precision": "bf16"}
    yield Row("4 clients, always, fp32, bf16", choices=plain)
    yield Row("killed, 1 client, delta", "killed", {"epochs": 60, "codec": CODECS["delta"]})
    yield Row("killed, 4 clients", "killed", {"epochs": 40, "clients": 4})
    yield Row("grpc, 1 client, microbatches", "grpc", {"clients": 1, "microbatches": 2})
    yield Row("grpc, 3 clients, delta", "grpc", {"clients": 3, "codec": CODECS["delta"]})
    yield Row("grpc, 3 clients, parallel, ef", "grpc", {"clients": 3, "mode": "parallel", "codec": CODECS["ef"]})
    ray = {"clients": 4, "backend": "ray", "cpus_per_actor": 0.5, "cpus_per_worker": 0.5}
    yield Row("ray, 4 clients", "ray", {**ray, "actors": 2})
    yield Row("ray, 4 clients, parallel, workers", "ray", {**ray, "mode": "parallel", "actors": 1, "workers": 2})


class Runner:
    """Starts the command `cutlayer` in a folder, and ends what it started."""

    def __init__(self, command: str | Path, folder: Path) -> None:
        self.command, self.folder = command, folder
        self.started: list[tuple[subprocess.Popen[str], Path]] = []

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        """Start a command; what it says goes to a file."""
        command, environment = [self.command, *map(str, arguments)], {**os.environ, "OMP_NUM_THREADS": "1"}
        file = self.folder / f"output-{len(self.started)}"
        with file.open("w") as output:
            process = subprocess.Popen(
                command, cwd=self.folder, env=environment, text=True, stdout=output, stderr=subprocess.STDOUT
            )
        self.started.append((process, file))
        return process

    def finish(self) -> None:
        """Wait for all that was started. Raises RuntimeError with what a command said that failed or does not end."""
        deadline, codes = time.monotonic() + TIMEOUT, [None]
        while None in codes:
            codes = [process.poll() for process, _ in self.started]
            for code, (process, output) in zip(codes, self.started, strict=True):
                if code not in (None, 0, -signal.SIGKILL) or time.monotonic() > deadline:
                    raise RuntimeError(f"{process.args}\nhas status {code} and said:\n{output.read_text()[-3000:]}")
            time.sleep(0.05)

    def close(self) -> None:
        """End what still runs."""
        for process, _ in self.started:
            if process.poll() is None:
                process.kill()
                process.wait()


def carry_out(row: Row, runner: Runner) -> list[Path]:
    """Do the run of a row; return its folders, that with the metrics first."""
    if row.how == "grpc":
        return serve(row, runner)
    folder = runner.folder / "run"
    process = runner.start("train", RECIPE, RUN_DIR, folder, *row.flags())
    if row.how == "killed":
        kill(process, folder / METRICS)
        runner.start("train", RESUME, folder)
    runner.finish()
    return [folder]


def kill(process: subprocess.Popen[str], metrics: Path) -> None:
    """Kill a run once some of its epochs are done."""
    deadline = time.monotonic() + TIMEOUT
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 4):
        if process.poll() is not None or time.monotonic() > deadline:
            break
        time.sleep(0.002)
    process.kill()
    if process.wait() != -signal.SIGKILL:
        raise RuntimeError("the run ended before it could be killed: give it more epochs")


def serve(row: Row, runner: Runner) -> list[Path]:
    """Server and clients as processes on this machine."""
    clients = row.choices["clients"]
    names = [f"client-{number}" for number in range(clients)] if clients > 1 else ["client"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    share: list[str] = []
    if clients > 1:
        share = ["--partition", str(runner.folder / "partition.json")]
        data = ["--data", RECIPE, flag("train_samples"), str(BASE["train_samples"])]
        runner.start("partition", *data, "--clients", clients, "--how", "iid", "--out", share[1])
        runner.finish()
    served = runner.folder / "server"
    runner.start("serve", RECIPE, "--listen", address, RUN_DIR, served, *row.flags("clients"), "--client", *names)
    for number, name in enumerate(names):
        part = [*share, "--part", number] if share else []
        runner.start(
            "join",
            address,
            "--name",
            name,
            "--accept-cut",
            "any",
            "--accept-exact",
            RUN_DIR,
            runner.folder / name,
            *part,
        )
    runner.finish()
    return [served, *(runner.folder / name for name in names)]


def digest(file: Path) -> str:
    """SHA-256 of names, types, shapes and bytes of the tensors in a file."""
    state = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        state.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def epoch(record: Mapping[str, Any], kinds: tuple[str, ...]) -> dict[str, str]:
    """What must not change of a line of the metrics, as text that has every bit."""
    sizes = {way: {kind: sent[kind] for kind in kinds if kind in sent} for way, sent in record["bytes"].items()}
    return {
        "exchange": f"{record['exchange']} {record.get('states', '')}".strip(),
        "loss": repr(record["loss"]),
        "samples": repr(record["samples"]),
        "test": json.dumps({name: score for name, score in record["test"].items() if name in SCORES}, sort_keys=True),
        "bytes": json.dumps(sizes, sort_keys=True),
        "flops": json.dumps(record["flops"], sort_keys=True),
    }


def measure(row: Row, command: str | Path) -> dict[str, Any]:
    """The digests of a row."""
    with tempfile.TemporaryDirectory(prefix="bits-") as temporary:
        runner = Runner(command, Path(temporary))
        try:
            folders = carry_out(row, runner)
        finally:
            runner.close()
        wanted = (MODEL,) if row.how != "grpc" else (SERVER_HALF, CLIENT_HALF)
        files = [folder / name for folder in folders for name in wanted if (folder / name).exists()]
        if len(files) < len(folders):
            raise RuntimeError(f"{row.name}: expected weights in each of {len(folders)} folders, found {len(files)}")
        lines = (folders[0] / METRICS).read_text().splitlines()
        kinds = KINDS if row.how == "grpc" else (*KINDS, "control", "evaluation")
        return {
            "weights": {str(file.relative_to(temporary)): digest(file) for file in files},
            "epochs": [epoch(json.loads(line), kinds) for line in lines],
        }


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What differs between two measurements of a row, in words; of the epochs the first for each figure."""
    old, new = before["weights"], after["weights"]
    found = [f"weights in {file}" for file in sorted({*old, *new}) if old.get(file) != new.get(file)]
    if len(before["epochs"]) != len(after["epochs"]):
        found.append(f"{len(before['epochs'])} epochs before, {len(after['epochs'])} after")
    pairs = list(zip(before["epochs"], after["epochs"], strict=False))
    for name in sorted({name for pair in pairs for line in pair for name in line}):
        changed = [(n, a.get(name), b.get(name)) for n, (a, b) in enumerate(pairs, 1) if a.get(name) != b.get(name)]
        found += [f"{name}, first in epoch {number}: {was}, now {now}" for number, was, now in changed[:1]]
    return found


def about() -> dict[str, str]:
    """What the rows depend on."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {"commit": commit, "torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}


def main() -> int:
    """Entry point; 1 if a row differs or fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", type=Path, help="file for the rows")
    action.add_argument("--compare", type=Path, help="file of rows to compare with")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--cutlayer", default=Path(sys.executable).with_name("cutlayer"), help="the command to start")
    chosen = parser.parse_args()
    selected = [row for row in rows() if chosen.only in row.name]
    known = json.loads(chosen.compare.read_text()) if chosen.compare else {"rows": {}}
    content: dict[str, Any] = {"about": about(), "rows": {}}
    failed = 0
    for row in selected:
        start = time.monotonic()
        try:
            result = content["rows"][row.name] = measure(row, chosen.cutlayer)
        except (RuntimeError, OSError) as error:
            failed += 1
            print(f"FAILED   {row.name}: {error}", flush=True)
            continue
        verdict, found = "written", []
        if chosen.compare:
            before = known["rows"].get(row.name)
            found = differences(before, result) if before else ["not in the file"]
            verdict = "differs" if found else "same"
            failed += bool(found)
        exchanges = "".join(line["exchange"].split(" ")[0] for line in result["epochs"])
        print(f"{verdict:8} {row.name}  {exchanges[:12]}  {time.monotonic() - start:.1f} s", flush=True)
        for difference in found:
            print(f"         {difference}")
    if chosen.write:
        chosen.write.write_text(json.dumps(content, indent=1) + "\n")
    elif failed:
        print(f"{failed} of {len(selected)} rows differ; before: {known.get('about')}, now: {content['about']}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
