"""Small files of a run that hold whole numbers by name, beside its metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cutlayer.durable import make_folder, replace
from cutlayer.errors import DamagedError
from cutlayer.files import sealed, unsealed


class Counts:
    """Such a file, which may not be there."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def read(self) -> dict[str, int]:
        """What it holds; empty if it is not there. Raises DamagedError."""
        counts = content_of(self.file)
        if not all(type(count) is int for count in counts.values()):
            raise DamagedError(f"{self.file} is damaged: expected whole numbers, got {counts}")
        return counts

    def write(self, counts: Mapping[str, int]) -> None:
        """Write it anew, with its folder if need be."""
        make_folder(self.file.parent)
        replace(self.file, json.dumps(sealed(dict(counts))) + "\n")


def content_of(file: Path) -> dict[str, Any]:
    """The JSON values of a file that may not be there. Raises DamagedError."""
    try:
        return unsealed(file.read_bytes())[0] if file.exists() else {}
    except DamagedError as error:
        reason = str(error).removeprefix("it ")
        raise DamagedError(f"{file} {reason}; remove the file to go on without what it says") from None
