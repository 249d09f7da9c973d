"""Temporary folders that do not stay, however their process ends."""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Self

PREFIX = "cutlayer-temporary-"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def _system() -> str:
    """Whom this process shares locks of files with: those under one running kernel; if it has no id, of one host."""
    with suppress(OSError):
        return BOOT_ID.read_text(encoding="ascii").strip()
    return re.sub(r"[^0-9A-Za-z.]", "_", platform.node()) or "unknown"


SYSTEM = _system()


class TemporaryFolder:
    """A folder that is removed by `close`, or once nothing refers to it, or when its process ends.

    A process that is killed (SIGKILL) removes nothing. So each folder is locked while its process lives, and whoever
    makes one first removes those beside it that nobody holds the lock of. A file system without locks has none removed.
    Of a folder that machines share each may see its own locks alone, so the name says whose it is, and those of another
    machine stay, as do those from before this one was started anew.

    Args:
        what: is in it, such as "halves", for its name.
        parent: where it is made; by default the system's temporary folder.

    Attributes:
        path: its path.
    """

    def __init__(self, what: str, parent: str | Path | None = None) -> None:
        parent = Path(parent if parent is not None else tempfile.gettempdir())
        _remove_left_over(parent)
        # It gets a name that others look for once it is locked, so that none takes it for left over.
        made = Path(tempfile.mkdtemp(prefix=".cutlayer-", dir=parent))
        lock = _locked(made)
        self.path = made.rename(parent / f"{PREFIX}{what}-{SYSTEM}-{made.name.removeprefix('.cutlayer-')}")
        self._end = weakref.finalize(self, _remove, self.path, lock, os.getpid())

    def close(self) -> None:
        """Remove it."""
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _remove(path: Path, lock: int | None, owner: int) -> None:
    if os.getpid() != owner:  # a fork, which goes on with a copy of this object
        return
    shutil.rmtree(path, ignore_errors=True)
    if lock is not None:
        os.close(lock)


def _remove_left_over(parent: Path) -> None:
    for path in parent.glob(f"{PREFIX}*-{SYSTEM}-*"):
        if (lock := _locked(path)) is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def _locked(path: Path) -> int | None:
    """A folder with its lock, as a descriptor; None if it is gone, another user's, or another process holds it."""
    with suppress(OSError):
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if os.fstat(folder).st_uid == os.geteuid():
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return folder
        except OSError:
            os.close(folder)
            raise
        os.close(folder)
    return None
