"""Files that are written as a whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def replace(file: Path, content: str | bytes) -> None:
    """Write a file as a whole or not at all, whatever happens meanwhile; text in UTF-8."""
    temporary = file.with_name(f"{file.name}.tmp")
    with temporary.open("wb") as out:
        out.write(content.encode() if isinstance(content, str) else content)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(file)
