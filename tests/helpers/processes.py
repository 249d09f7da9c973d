"""Server and client as the processes that a user starts, for the tests that need them apart."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import threading
import time
from pathlib import Path

from safetensors.torch import load_file

from cutlayer.backends.base import Backend
from cutlayer.backends.local import LOCAL
from cutlayer.runs.choices import with_choices
from cutlayer.runs.fit import fit
from cutlayer.runs.recipes import digits
from cutlayer.runs.run import Run
from tests.helpers.started import ENVIRONMENT as USUAL
from tests.helpers.started import ROOT, Started

ENVIRONMENT = {**USUAL, "CUTLAYER_LOG": "INFO", "COLUMNS": "200"}
CONFIG = {"train_samples": 250, "test_samples": 64, "epochs": 8, "schedule": "periodic", "period": 4, "threads": 1}
"""Of the digits recipe: exchanges A B C C A B C C."""


ACCEPTED = ("--accept-cut", "any", "--accept-exact")


class Process:
    """A cutlayer command that runs, and what it says."""

    def __init__(self, *arguments: object) -> None:
        ours, its = os.pipe()
        self.process = Started("cutlayer", *arguments, cwd=ROOT, env=ENVIRONMENT, stdout=its, stderr=its)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, args=(ours,), daemon=True)
        self._reader.start()

    def _read(self, descriptor: int) -> None:
        with open(descriptor) as output:
            for line in output:
                self.lines.append(line.rstrip())

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, timeout: float = 150) -> re.Match[str]:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if found := re.search(pattern, self.output):
                return found
            if self.process.poll() is not None:
                self._reader.join(5)
                if found := re.search(pattern, self.output):
                    return found
                break
            time.sleep(0.01)
        raise AssertionError(f"{pattern!r} does not come in the output of {self.process.args}:\n{self.output}")

    def wait(self, timeout: float = 120) -> int:
        code = self.process.wait(timeout)
        self._reader.join(5)
        return code

    def kill(self) -> None:
        self.process.kill()
        self.wait()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.kill()


def flags(name: str, value: object) -> list[object]:
    """A choice as arguments: a value made of several, such as `Regularize`, as one for each of them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [part for key, own in dataclasses.asdict(value).items() for part in flags(f"{name}.{key}", own)]
    flag = f"--{name.replace('_', '-')}"
    return [flag] if value is True else [flag, value]


def serve(folder: Path, *more: object, listen: str = "127.0.0.1:0", **config: object) -> Process:
    options = [part for name, value in {**CONFIG, **config}.items() for part in flags(name, value)]
    tls = ("--tls", folder / "tls" / "server") if (folder / "tls").exists() else ()
    return Process("serve", "digits", "--listen", listen, "--run-dir", folder / "server", *tls, *options, *more)


def port_of(server: Process) -> int:
    return int(server.wait_for(r"listening on port (\d+)")[1])


def join(folder: Path, port: int, *more: object, name: str = "client") -> Process:
    tls = ("--tls", folder / "tls" / name) if (folder / "tls").exists() else ("--name", name)
    return Process("join", f"127.0.0.1:{port}", "--run-dir", folder / name, *ACCEPTED, *tls, *more)


def weights(folder: Path, name: str = "client") -> dict[str, bytes]:
    """Final weights of both halves, as bytes."""
    tensors = {**load_file(folder / name / "client.safetensors"), **load_file(folder / "server/server.safetensors")}
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def records(run: Path) -> list[dict]:
    """The metrics, but for seconds, checksums and control bytes, which differ by how the participants meet."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in found:
        del record["seconds"], record["checksum"]
        for way in ("up", "down"):
            for kind in ("control", "evaluation"):  # between processes clients tell of their FLOPs
                record["bytes"][way].pop(kind, None)
    return found


def run_in_process(folder: Path, backend: Backend = LOCAL, **changes: object) -> tuple[dict, list[dict], str]:
    """The weights, metrics and baseline of the same run in this process."""
    config = with_choices(digits(), **{**CONFIG, **changes})
    train, test = config.datasets()
    method, training = config.method, config.training
    fit(config.halves(train), train, test, method=method, training=training, run=folder, backend=backend)
    tensors = load_file(folder / "model.safetensors")
    weights = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    for record in (found := [record.as_dict() for record in Run(folder).records()]):
        for way in ("up", "down"):
            for kind in ("control", "evaluation"):  # between processes clients tell of their FLOPs
                record["bytes"][way].pop(kind, None)
        del record["seconds"]
    return weights, found, str(Run(folder).history().baseline)
