"""Files and folders that are on the disk, whole, when a call returns: also after a loss of power.

A file's content and its name in the folder are flushed apart; what is not flushed may be lost in any part and order
(`tests/helpers/disk.py` is such a disk).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cutlayer.errors import DiskError


def replace(file: Path, content: str | bytes, *, flush: bool = True, private: bool = False) -> None:
    """Write a file as a whole or not at all, whatever happens meanwhile; text in UTF-8.

    Args:
        flush: whether it is to be on the disk when this returns, so that a loss of power leaves it whole.
        private: whether its owner alone may read it, from the first moment on.

    Raises:
        DiskError: the disk does not take it. The file is as it was before.
    """
    temporary = file.with_name(f"{file.name}.tmp")
    with writing(file):
        try:
            if private:
                temporary.unlink(missing_ok=True)
            how = os.O_WRONLY | os.O_CREAT | (os.O_EXCL if private else os.O_TRUNC)
            with os.fdopen(os.open(temporary, how, 0o600 if private else 0o666), "wb") as out:
                out.write(content.encode() if isinstance(content, str) else content)
                out.flush()
                if flush:
                    os.fsync(out.fileno())
            temporary.replace(file)
            if flush:
                flush_to_disk(file.parent)
        except OSError:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing, so that a loss of power leaves them."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in reversed(missing):
        flush_to_disk(each.parent)


def flush_to_disk(path: Path) -> None:
    """Have the system write a file or a folder's entries to the disk, so that a loss of power leaves it whole."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """What the system says of a file that it does not take, as a DiskError that names the file."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"{file} cannot be written: {error.strerror or error}") from error
