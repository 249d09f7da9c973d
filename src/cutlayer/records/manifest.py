"""Which files make a checkpoint, and their checksums: in its state.json, which has one of itself."""

from __future__ import annotations

import logging
import os
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from cutlayer.errors import ConfigError, DamagedError
from cutlayer.files import digest, unsealed

log = logging.getLogger("cutlayer.checkpoint")

FORMAT, FORMAT_OF_MODULES_AND_STORES, FORMAT_WITHOUT_CHECKSUMS = 4, 3, 2
MENDED = "references"
"""Start of the names of stores whose damage client and server notice and mend when they next meet; see memory.delta."""


def content(checkpoint: Path) -> dict[str, Any]:
    """What state.json holds; "files" is empty for a checkpoint of an older release.

    Raises DamagedError, and ConfigError for the format of another release.
    """
    try:
        values, checked = unsealed((checkpoint / "state.json").read_bytes())
    except FileNotFoundError:
        raise DamagedError("state.json is missing") from None
    except DamagedError as error:
        raise DamagedError(f"state.json: {error}") from None
    number = values.get("format")
    if number in (FORMAT, FORMAT_OF_MODULES_AND_STORES) and not checked:
        raise DamagedError("state.json: it is damaged (expected a checksum)")
    if number not in (FORMAT, FORMAT_OF_MODULES_AND_STORES, FORMAT_WITHOUT_CHECKSUMS):
        raise ConfigError(
            f"{checkpoint}: expected a checkpoint of format {FORMAT}, got {number}; it was written by another release"
        )
    if "facts" not in values:  # of an older release, which told modules from stores
        values["facts"] = {**values.pop("optimizers"), **values.pop("stores")}
    return {"files": {}, **values}


def verified(checkpoint: Path) -> dict[str, Any]:
    """As `content`, with all files checked but those of stores that are mended.

    Raises DamagedError that names those that are not what was written.
    """
    values = content(checkpoint)
    if expected := values["files"]:
        try:
            found = digests(checkpoint)
        except OSError as error:  # a disk that cannot read what it holds
            raise DamagedError(f"{error.filename}: {error.strerror}") from None
        differ = [name for name in sorted({**found, **expected}) if found.get(name) != expected.get(name)]
        how = {name: f"{name} is {'damaged' if name in found else 'missing'}" for name in differ}
        if wrong := [text for name, text in how.items() if not name.startswith(MENDED)]:
            raise DamagedError(", ".join(wrong))
        if how:
            log.warning("%s: %s; what it holds is sent anew", checkpoint, ", ".join(how.values()))
    return values


def digests(
    folder: Path, previous: Path | None = None, known: Mapping[str, str] = {}, unchanged: Container[str] = ()
) -> dict[str, str]:
    """Checksums of a checkpoint's files, by their paths in it, but for state.json, which holds them.

    Args:
        previous, known: an earlier checkpoint and its checksums: of a file that both share they are known already, and
            must not be taken from the disk again, where it may have been damaged since.
        unchanged: names of stores that are the earlier one's.
    """
    found = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_dir() or name == "state.json":
            continue
        earlier = previous / name if previous is not None and name in known else None
        if earlier is not None and (name.split("/")[0] in unchanged or _same(earlier, file)):
            found[name] = known[name]
        else:
            found[name] = digest(file)
    return found


def _same(earlier: Path, file: Path) -> bool:
    """Whether both names are of one file."""
    return earlier.exists() and os.path.samefile(earlier, file)
