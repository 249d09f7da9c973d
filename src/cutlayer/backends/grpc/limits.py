"""What a server's operator allows: the bounds of every claim that a client may make, and of what it may cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from cutlayer.errors import ConfigError

MiB = 1 << 20


@dataclass(frozen=True)
class ClientLimits:
    """Bounds of what a client may claim, hold and cost. Whoever goes past them is refused, at its own expense.

    Attributes:
        max_samples: training samples, and test samples, that a client may say it has.
        quotas: the same for single clients, by name. Clients share the budgets of the replay store in proportion.
        max_batch: samples in a client's largest batch, which is that of C epochs as well; None for four times the run's
            own.
        max_half: bytes of a frame with the client half, if the server does not know that half.
        memory: bytes of a client's frames that may be in the server's memory: half of it for the largest frame, a
            sixteenth for those that wait in each direction.
        slowest: bytes a second. A client whose frames come more slowly counts as silent, see `Waits`.
        streams: connections of one client that may be without a session at a time.
        strangers: the same of all who are not of the run, together.
        attempts: connections in a row that one identity, or address, may begin at once; after them `attempt_rate` a
            second.
        goings_back: times that the server goes back to an older checkpoint for one client that has lost its newest.
    """

    max_samples: int = 1 << 20
    quotas: Mapping[str, int] = field(default_factory=dict)
    max_batch: int | None = None
    max_half: int = 256 * MiB
    memory: int = 1024 * MiB
    slowest: int = 16 << 10
    streams: int = 2
    strangers: int = 4
    attempts: int = 100
    attempt_rate: float = 10.0
    goings_back: int = 3

    def __post_init__(self) -> None:
        for name in ("max_samples", "max_half", "memory", "slowest", "streams", "strangers", "attempts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.goings_back < 0:
            raise ConfigError(f"goings_back: expected at least 0, got {self.goings_back}")
        if not self.attempt_rate > 0:
            raise ConfigError(f"attempt_rate: expected more than 0 a second, got {self.attempt_rate}")
        if wrong := [name for name, samples in self.quotas.items() if samples < 1]:
            raise ConfigError(f"quotas: expected at least 1 sample, got less for {', '.join(wrong)}")

    @property
    def largest_frame(self) -> int:
        """Bytes of the largest frame that a client may have."""
        return self.memory // 2

    @property
    def window(self) -> int:
        """Bytes of a client's frames that may wait in either direction."""
        return max(1, self.memory // 16)

    def samples(self, client: str) -> int:
        """How many training samples, and how many test samples, this client may have."""
        return self.quotas.get(client, self.max_samples)


def read_quotas(file: str | Path) -> dict[str, int]:
    """Samples by client, from a JSON file such as {"alice": 50000, "bob": 1200}. Raises ConfigError."""
    try:
        return msgspec.json.decode(Path(file).read_bytes(), type=dict[str, int])
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f'{file}: expected a JSON object such as {{"alice": 50000}}: {error}') from None
