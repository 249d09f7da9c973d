"""A partition's file: JSON, with a line for each client."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from cutlayer.data.partition import ranges
from cutlayer.errors import ConfigError

FORMAT = "cutlayer partition 1"
# Bounds what a damaged file can make this take of memory.
MOST_SAMPLES = 10**8


def encode(fields: Mapping[str, Any]) -> str:
    """The file's content, a line for each client, from the fields of a `Partition`."""
    counts = fields["class_counts"]
    lines = [
        {
            "client": client,
            "samples": len(indices),
            **({} if counts is None else {"class_counts": counts[client].tolist()}),
            "indices": ranges.to_text(indices),
        }
        for client, indices in enumerate(fields["clients"])
    ]
    head = {
        "format": FORMAT,
        "how": {name: fields[name] for name in ("method", "parameters", "seed")},
        "data": {"name": fields["data"], "samples": fields["samples"], "labels": fields["labels"]},
    }
    clients = ",\n    ".join(json.dumps(line) for line in lines)
    return f'{json.dumps(head, indent=2)[:-2]},\n  "clients": [\n    {clients}\n  ]\n}}\n'


def decode(content: bytes, allow_empty: bool = False) -> dict[str, Any]:
    """Inverse of `encode`: the fields of a `Partition`, which goes on checking.

    Raises ConfigError for what is no such file, for numbers that contradict each other, and for a client without
    samples unless `allow_empty`.
    """
    try:
        return msgspec.json.decode(content, type=_File).fields(allow_empty)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(error)) from None


class _How(msgspec.Struct, forbid_unknown_fields=True):
    method: str = "by hand"
    parameters: dict[str, bool | int | float | str] = {}
    seed: int | None = None


class _Data(msgspec.Struct, forbid_unknown_fields=True):
    samples: int
    name: str | None = None
    labels: str | None = None


class _Client(msgspec.Struct, forbid_unknown_fields=True):
    indices: str | list[int]
    client: int | None = None
    samples: int | None = None
    class_counts: list[int] | None = None


class _File(msgspec.Struct, forbid_unknown_fields=True):
    format: str
    data: _Data
    clients: list[_Client]
    how: _How = msgspec.field(default_factory=_How)

    def fields(self, allow_empty: bool) -> dict[str, Any]:
        """What `decode` returns."""
        if self.format != FORMAT:
            raise ConfigError(f"expected the format {FORMAT!r}, got {self.format!r}")
        if not 0 < self.data.samples <= MOST_SAMPLES:
            raise ConfigError(f"expected from 1 to {MOST_SAMPLES} samples, got {self.data.samples}")
        indices = [self._indices(client, number) for number, client in enumerate(self.clients)]
        for number, own in enumerate(indices):
            if not (len(own) or allow_empty):
                raise ConfigError(f"client {number} has no sample; give it one, or leave it out")
        return {
            "clients": tuple(indices),
            "samples": self.data.samples,
            "method": self.how.method,
            "parameters": self.how.parameters,
            "seed": self.how.seed,
            "data": self.data.name,
            "labels": self.data.labels,
            "class_counts": self._class_counts(indices),
        }

    def _indices(self, client: _Client, number: int) -> np.ndarray:
        try:
            text = client.indices
            own = ranges.from_text(text, self.data.samples) if isinstance(text, str) else np.array(text, np.int64)
        except (ConfigError, OverflowError) as error:
            raise ConfigError(f"client {number}: {error}") from None
        for what, said, found in (("client", client.client, number), ("samples", client.samples, len(own))):
            if said is not None and said != found:
                raise ConfigError(f"client {number}: expected {what} {found}, as the file goes on, got {said}")
        return own

    def _class_counts(self, indices: list[np.ndarray]) -> np.ndarray | None:
        rows = [client.class_counts for client in self.clients]
        given = [row for row in rows if row is not None]
        if not given:
            return None
        if len(given) < len(rows) or len({len(row) for row in given}) > 1:
            raise ConfigError("expected class_counts of every client or of none, as many for each")
        for number, (row, own) in enumerate(zip(given, indices, strict=True)):
            if min(row, default=0) < 0 or sum(row) != len(own):
                raise ConfigError(f"client {number}: expected class_counts that add up to {len(own)}, got {sum(row)}")
        return np.array(given, np.int64)
