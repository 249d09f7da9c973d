"""What a client on a machine of its own draws by itself, so that the server, who knows the run's seed, cannot."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from cutlayer.errors import DamagedError
from cutlayer.files import writing


def client_secret(folder: Path) -> int:
    """A number that only this client knows, in a file of its folder that only its owner can read: drawn once.

    Noise at the cut that a server could draw again, it could take away again. Raises DamagedError for a file that holds
    no number, DiskError if it cannot be written.
    """
    file = folder / "secret"
    if not file.exists():
        with writing(file):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as handle:
                handle.write(f"{1 + secrets.randbits(62)}\n")
    try:
        return int(file.read_text())
    except ValueError:
        raise DamagedError(f"{file}: expected a number; remove the file, and another one is drawn") from None
