"""What a client on a machine of its own draws by itself, so that the server, who knows the run's seed, cannot."""

from __future__ import annotations

import secrets
from pathlib import Path

from cutlayer.durable import make_folder, replace
from cutlayer.errors import DamagedError


def client_secret(folder: Path) -> int:
    """A number that only this client knows, in a file of its folder that only its owner can read: drawn once.

    Noise at the cut that a server could draw again, it could take away again. Raises DamagedError for a file that holds
    no number, DiskError if it cannot be written.
    """
    file = folder / "secret"
    if not file.exists():
        make_folder(folder)
        replace(file, f"{1 + secrets.randbits(62)}\n", private=True)
    try:
        return int(file.read_text())
    except ValueError:
        raise DamagedError(f"{file}: expected a number; remove the file, and another one is drawn") from None
