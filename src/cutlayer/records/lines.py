"""A file that grows by a line at a time: JSON objects, each with a checksum."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cutlayer.durable import flush_to_disk, replace, writing
from cutlayer.errors import DamagedError
from cutlayer.files import sealed, unsealed


class Lines:
    """The lines of a file, which need not be there yet."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def append(self, content: Mapping[str, Any]) -> None:
        """Add a line; it is on the disk when this returns. Raises DiskError if the disk does not take it."""
        new = not self.file.exists()
        with writing(self.file), self.file.open("a") as file:
            file.write(_line(content))
            file.flush()
            os.fsync(file.fileno())
        if new:
            flush_to_disk(self.file.parent)

    def read(self, first: int | None = None) -> list[dict[str, Any]]:
        """All lines, or the first so many. A last one that a kill cut short is left out.

        Raises DamagedError that names a line that is not what was written.
        """
        *lines, rest = self.file.read_bytes().split(b"\n") if self.file.exists() else [b""]
        if rest and not _cut_short(rest):
            lines.append(rest)
        found = []
        for number, line in enumerate(lines[:first]):
            try:
                found.append(unsealed(line)[0])
            except DamagedError as error:
                raise DamagedError(f"{self.file}, line {number + 1}: {error}; restore it") from None
        return found

    def rewrite(self, contents: Iterable[Mapping[str, Any]]) -> None:
        """Put these lines in place of all there are."""
        replace(self.file, "".join(map(_line, contents)))


def _line(content: Mapping[str, Any]) -> str:
    return json.dumps(sealed(content)) + "\n"


def _cut_short(line: bytes) -> bool:
    """Whether a last line without an end is the beginning of one, and not a whole one whose end is damaged."""
    try:
        json.JSONDecoder().raw_decode(line.decode(errors="replace"))
    except ValueError:
        return True
    return False
