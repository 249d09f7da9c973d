"""The clients that were admitted in the midst of a run, in the order of their numbers: admitted.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from cutlayer.durable import replace
from cutlayer.errors import DamagedError
from cutlayer.files import sealed, unsealed


@dataclass(frozen=True)
class AdmittedClient:
    """A client that was admitted.

    Attributes:
        since: epochs that were done before the first in which it takes part.
        hello: what it said of itself, as JSON values.
    """

    name: str
    since: int
    hello: dict[str, Any]


class Admitted:
    """The record of a run, which need not be there yet. A client is admitted once it is in it."""

    def __init__(self, run: Path) -> None:
        self.file = run / "admitted.json"

    def read(self) -> list[AdmittedClient]:
        """The clients, the first that was admitted first. Raises DamagedError."""
        if not self.file.exists():
            return []
        try:
            content, _ = unsealed(self.file.read_bytes())
            return msgspec.convert(content.get("clients"), list[AdmittedClient])
        except (DamagedError, msgspec.ValidationError) as error:
            raise DamagedError(
                f"{self.file}: {error}; restore it, as checkpoints hold these clients' samples by their order in it"
            ) from None

    def add(self, client: AdmittedClient) -> None:
        """Note one more; it is on the disk when this returns."""
        clients = [asdict(each) for each in (*self.read(), client)]
        replace(self.file, json.dumps(sealed({"clients": clients}), indent=2) + "\n")
