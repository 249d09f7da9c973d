"""Names that a run notes in its folder, each with why or when, such as left_out.json."""

from __future__ import annotations

import json
from pathlib import Path

from cutlayer.durable import replace
from cutlayer.errors import DamagedError
from cutlayer.files import sealed, unsealed


class Noted:
    """Names in a file, which need not be there yet."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def read(self) -> dict[str, str]:
        """What is noted, by name. Raises DamagedError."""
        if not self.file.exists():
            return {}
        try:
            content, _ = unsealed(self.file.read_bytes())
        except DamagedError as error:
            raise DamagedError(f"{self.file}: {error}; remove it to go on without what it says") from None
        return {str(name): str(what) for name, what in content.items()}

    def add(self, name: str, what: str) -> None:
        """Note one more; it is on the disk when this returns."""
        replace(self.file, json.dumps(sealed({**self.read(), name: what}), indent=2) + "\n")


def left_out(run: Path) -> Noted:
    """The clients that a run goes on without, and why."""
    return Noted(run / "left_out.json")


def gone_back(run: Path) -> Noted:
    """The clients for which the server went back to an older checkpoint, and how often."""
    return Noted(run / "gone_back.json")


def delivered(run: Path) -> Noted:
    """The clients that have heard that a run is at its end, and when."""
    return Noted(run / "delivered.json")
