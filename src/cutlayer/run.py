"""A run is a folder: config.json, metrics.jsonl (a line per epoch), checkpoints, and the merged model at its end."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cutlayer.checkpoint import Checkpoints
from cutlayer.errors import ConfigError
from cutlayer.history import Baseline, EpochRecord, History


class Run:
    """A run's folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.checkpoints = Checkpoints(self.folder / "checkpoints")
        self.metrics_file = self.folder / "metrics.jsonl"
        self.config_file = self.folder / "config.json"
        self.model_file = self.folder / "model.safetensors"

    def exists(self) -> bool:
        """Whether a run has been begun here."""
        return self.config_file.exists()

    def create(self, config: dict[str, Any], baseline: Baseline) -> None:
        """Begin the run. Raises ConfigError where there is one already."""
        if self.exists():
            raise ConfigError(f"{self.folder} holds a run already; resume it, or choose another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"config": config, "baseline": vars(baseline), "environment": environment()}
        temporary = self.config_file.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        temporary.rename(self.config_file)

    def read_config(self) -> dict[str, Any]:
        """The content of config.json: "config", "baseline" and "environment"."""
        if not self.exists():
            raise ConfigError(f"{self.folder} holds no run: expected {self.config_file}")
        return json.loads(self.config_file.read_text())

    def append(self, record: EpochRecord) -> None:
        """Add an epoch to the metrics."""
        with self.metrics_file.open("a") as file:
            file.write(json.dumps(record.as_dict()) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def records(self) -> list[EpochRecord]:
        """The epochs so far. A last line that a kill cut short is left out."""
        records = []
        lines = self.metrics_file.read_text().split("\n") if self.metrics_file.exists() else []
        for line in lines[:-1]:
            records.append(EpochRecord(**json.loads(line)))
        return records

    def rewind(self, epochs: int) -> list[EpochRecord]:
        """Drop the epochs after the first `epochs`, which a resumed run trains again; return those that stay."""
        records = self.records()[:epochs]
        if len(records) < epochs:
            raise ConfigError(
                f"{self.metrics_file}: expected the {epochs} epochs of the checkpoint, found {len(records)}"
            )
        temporary = self.metrics_file.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record.as_dict()) + "\n" for record in records))
        temporary.rename(self.metrics_file)
        return records

    def history(self) -> History:
        """What the run measured so far."""
        return History(self.records(), Baseline(**self.read_config()["baseline"]))

    def save_model(self, model: nn.Module) -> None:
        """Write the merged model's weights."""
        temporary = self.model_file.with_suffix(".tmp")
        save_file({k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}, temporary)
        temporary.rename(self.model_file)

    def load_weights(self, model: nn.Module) -> nn.Module:
        """Load the merged model's weights into a network of the same structure; return it."""
        model.load_state_dict(load_file(self.model_file))
        return model


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
