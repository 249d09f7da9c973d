"""What `cutlayer serve` and `join` have in common: how a machine is connected, and what it logs."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from rich.console import Console
from torch import nn

from cutlayer.backends.grpc.rpc import KEEPALIVE
from cutlayer.data.images import Images
from cutlayer.errors import ConfigError
from cutlayer.models.cut import copied
from cutlayer.stop_request import Stop, Stopped

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConnectionArguments:
    """How this machine is connected."""

    tls: str | None = None
    """This machine's folder of certificates."""
    insecure_plaintext: bool = False
    """Allow addresses beyond this machine without TLS."""
    keepalive: float = KEEPALIVE
    """Seconds within which a connection whose other end has vanished without a word is given up."""

    log: Literal["text", "json"] = "text"
    """How log lines are written; what is logged says the environment variable CUTLAYER_LOG (WARNING by default)."""

    def secured(self) -> dict[str, Any]:
        """What an `Endpoint` has of it beside the address."""
        return {name: getattr(self, name) for name in ("tls", "insecure_plaintext", "keepalive")}


class JsonLines(logging.Formatter):
    """A JSON object for each line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line."""
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        said = {"time": when, "level": record.levelname, "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return json.dumps(said)


def until_stopped(work: Callable[[Stop], T], folder: str | Path, console: Console) -> T | None:
    """Do the work until it is done, or SIGINT or SIGTERM ask for its end: then say how to go on in the folder."""
    stop = Stop()
    with stop.on_signals():
        try:
            return work(stop)
        except Stopped as stopped:
            console.print(f"{stopped}; the same command goes on with {folder}", soft_wrap=True)
            return None


def cut_shape_of(half: nn.Module, data: Images) -> tuple[int, ...]:
    """Shape of a sample's activations at the cut."""
    with torch.no_grad():
        return tuple(copied(half).eval()(data.inputs.new_zeros((1, *data.inputs.shape[1:]))).shape[1:])


def prepare(threads: int | None, form: str = "text") -> None:
    """Set PyTorch's threads, and what is logged. Raises ConfigError for an unknown level in CUTLAYER_LOG."""
    if threads is not None:
        torch.set_num_threads(threads)
    level = os.environ.get("CUTLAYER_LOG", "WARNING").upper()
    if level not in LEVELS:
        raise ConfigError(f"CUTLAYER_LOG: expected one of {', '.join(LEVELS)}, got {level!r}")
    logging.basicConfig(level=level, format="%(asctime)s %(name)s: %(message)s")
    if form == "json":
        for handler in logging.getLogger().handlers:
            handler.setFormatter(JsonLines())
