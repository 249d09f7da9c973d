"""A run is a folder: config.json, metrics.jsonl (a line per epoch), checkpoints, and the merged model at its end."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from cutlayer.checkpoint import Checkpoints, Store, save_tensors
from cutlayer.describe import differences
from cutlayer.errors import ConfigError
from cutlayer.files import replace
from cutlayer.history import Baseline, EpochRecord, History, crossed

# Workers of a data loader hold the lock of a killed run for up to 5 seconds, until they miss their parent.
LOCK_PATIENCE = 6.0


class Run:
    """A run's folder.

    Args:
        folder: where it is, or will be.
        config: what to write to config.json, and to compare with when the run is resumed, in place of a description of
            `fit`'s arguments.
    """

    def __init__(self, folder: str | Path, config: dict[str, Any] | None = None) -> None:
        self.folder, self.config = Path(folder), config
        self.checkpoints = Checkpoints(self.folder / "checkpoints")
        self.metrics_file = self.folder / "metrics.jsonl"
        self.config_file = self.folder / "config.json"
        self.model_file = self.folder / "model.safetensors"
        self.merged_file = self.folder / "merged.json"
        self.given_up_file = self.folder / "given_up.json"

    def __repr__(self) -> str:
        """Short: where, and how far it is."""
        done = self.metrics_file.read_bytes().count(b"\n") if self.metrics_file.exists() else 0
        return f"Run({str(self.folder)!r}, {f'{done} epochs' if self.exists() else 'not begun'})"

    def exists(self) -> bool:
        """Whether a run has been begun here."""
        return self.config_file.exists()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing to the run. Raises ConfigError where one does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as file:
            deadline = time.monotonic() + LOCK_PATIENCE
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise ConfigError(f"{self.folder}: another process is at work on this run") from None
                    time.sleep(0.1)
            yield

    def open(
        self,
        arguments: dict[str, Any],
        facts: dict[str, Any],
        baseline: Baseline,
        resume: bool,
        modules: dict[str, tuple[nn.Module, torch.optim.Optimizer]],
        stores: Mapping[str, Store],
    ) -> tuple[list[EpochRecord], dict[str, Any] | None]:
        """Begin the run, or bring everything to the newest checkpoint of one that is to be resumed.

        Returns the epochs done, and the state in the checkpoint if there is one. Raises ConfigError where there is a
        run and it is not to be resumed, or was begun with other arguments or facts.
        """
        config = self.config if self.config is not None else arguments
        if not (resume and self.exists()):
            self.create(config, baseline, facts)
            return [], None
        self.check(config, facts)
        found = self.checkpoints.load(modules, stores)
        epochs, state = found if found is not None else (0, None)
        return self.rewind(epochs), state

    def create(self, config: dict[str, Any], baseline: Baseline, facts: dict[str, Any] | None = None) -> None:
        """Begin the run. Raises ConfigError where there is one already."""
        if self.exists():
            raise ConfigError(f"{self.folder} holds a run already; resume it, or choose another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"config": config, "facts": facts or {}, "baseline": vars(baseline), "environment": environment()}
        replace(self.config_file, json.dumps(content, indent=2) + "\n")

    def check(self, config: dict[str, Any], facts: dict[str, Any] | None = None) -> None:
        """Raise ConfigError that names what differs from what the run was begun with."""
        before = self.read_config()
        if different := differences(before["config"], config) + differences(before.get("facts", {}), facts or {}):
            raise ConfigError(
                f"{self.folder} was begun with something else and cannot be resumed with this: {'; '.join(different)}"
            )

    def read_config(self) -> dict[str, Any]:
        """The content of config.json: "config", "facts", "baseline" and "environment"."""
        if not self.exists():
            raise ConfigError(f"{self.folder} holds no run: expected {self.config_file}")
        try:
            return json.loads(self.config_file.read_text())
        except json.JSONDecodeError as error:
            raise ConfigError(f"{self.config_file} is damaged ({error}); restore it, or begin anew elsewhere") from None

    def append(self, record: EpochRecord) -> None:
        """Add an epoch to the metrics."""
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(record.as_dict()) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def records(self, epochs: int | None = None) -> list[EpochRecord]:
        """The epochs so far, or the first so many. A last line that a kill cut short is left out."""
        lines = self.metrics_file.read_text().split("\n")[:-1] if self.metrics_file.exists() else []
        try:
            return [EpochRecord(**json.loads(line)) for line in lines[:epochs]]
        except (json.JSONDecodeError, TypeError) as error:
            raise ConfigError(f"{self.metrics_file} is damaged: {error}") from None

    def checkpointed(self) -> list[EpochRecord]:
        """The epochs up to the newest checkpoint, which a resumed run goes on from."""
        epochs = self.checkpoints.epochs()
        return self.records(epochs[-1] if epochs else 0)

    def rewind(self, epochs: int) -> list[EpochRecord]:
        """Drop the epochs after the first `epochs`, which a resumed run trains again; return those that stay."""
        records = self.records(epochs)
        if len(records) < epochs:
            raise ConfigError(
                f"{self.metrics_file}: expected the {epochs} epochs of the checkpoint, found {len(records)}"
            )
        with suppress(ConfigError):  # a line that is damaged says nothing any more
            self.give_up(crossed(*(record.bytes for record in self.records()[epochs:])))
        replace(self.metrics_file, "".join(json.dumps(record.as_dict()) + "\n" for record in records))
        return records

    def history(self) -> History:
        """What the run measured so far."""
        records = self.records()
        final = _read(self.merged_file)
        # A run that was extended is not at its end again yet.
        merged = final.get("scores", {}) if final.get("epochs") == len(records) else {}
        return History(records, Baseline(**self.read_config()["baseline"]), self.given_up(), merged)

    def save_model(self, model: nn.Module) -> None:
        """Write the merged model's weights."""
        save_tensors(model.state_dict(), self.model_file)

    def save_merged(self, scores: Mapping[str, float], epochs: int) -> None:
        """Write what the merged model's evaluation after so many epochs gave."""
        replace(self.merged_file, json.dumps({"epochs": epochs, "scores": dict(scores)}, indent=2) + "\n")

    def give_up(self, size: Mapping[str, int]) -> None:
        """Count bytes, by direction, of epochs that are trained again."""
        if any(size.values()):
            before = self.given_up()
            total = {way: before.get(way, 0) + count for way, count in size.items()}
            replace(self.given_up_file, json.dumps(total) + "\n")

    def given_up(self) -> dict[str, int]:
        """All bytes that `give_up` counted, by direction; empty if there are none."""
        return _read(self.given_up_file)

    def load_weights(self, model: nn.Module) -> nn.Module:
        """Load the merged model's weights into a network of the same structure; return it."""
        if not self.model_file.exists():
            done = len(self.records())
            raise ConfigError(f"{self.folder} has no model yet: it is written at the end, {done} epochs are done")
        try:
            model.load_state_dict(load_file(self.model_file))
        except RuntimeError as error:
            raise ConfigError(f"{self.model_file} is not of a network such as this: {error}") from None
        return model


def _read(file: Path) -> dict[str, Any]:
    """The JSON values of a file that may not be there."""
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:
        raise ConfigError(f"{file} is damaged ({error}); remove it to go on without what it says") from None


def environment() -> dict[str, Any]:
    """Hardware and versions, for whoever reads the figures."""
    return {
        "cutlayer": version("cutlayer"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
