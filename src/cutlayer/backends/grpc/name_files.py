"""Files of clients' names, one a line, that a server's operator changes while it is at work: read again when told."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from cutlayer.errors import ConfigError

log = logging.getLogger("cutlayer.server")

REVOKED = "the server's operator revoked its certificate"


class NameFile:
    """The names in a file; empty lines and those that begin with # do not count.

    Attributes:
        option: what messages call it.
        names: those that count.
    """

    option: ClassVar[str] = "names"

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        self._listeners: list[Callable[[set[str]], None]] = []
        self._lock = threading.Lock()  # of reading and telling, so that the newest names are the last that are told
        self.names = self._read()

    def _read(self) -> set[str]:
        try:
            lines = self.file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.option}: {self.file} cannot be read: {error}") from None
        return {line.strip() for line in lines if line.strip() and not line.startswith("#")}

    def listen(self, listener: Callable[[set[str]], None]) -> None:
        """Have this called with all names, now and whenever they change. A listener does not call this file."""
        with self._lock:
            self._listeners.append(listener)
            listener(self.names)

    def reread(self) -> None:
        """Read the file again. If it cannot be read, the names stay as they are. From any thread."""
        with self._lock:
            try:
                self.names = self._read()
            except ConfigError as error:
                log.warning("%s; the names before it still count", error)
                return
            log.warning("%s: %s", self.option, ", ".join(sorted(self.names)) or "no one")
            for listener in self._listeners:
                listener(self.names)


class Revocations(NameFile):
    """Clients whose certificates do not count any more."""

    option: ClassVar[str] = "revoked"


class Admissions(NameFile):
    """Clients that are to be let into a run that has begun without them."""

    option: ClassVar[str] = "admit"


@contextmanager
def read_again_on_signal(*files: NameFile | None) -> Iterator[None]:
    """Inside the block, SIGHUP has these files read again, if there are any. For a process's main thread."""
    given = [file for file in files if file is not None]
    if not given:
        yield
        return

    def reread() -> None:
        for file in given:
            file.reread()

    # In a thread of its own: the main thread may be in the midst of what the listeners change.
    def handle(*_: object) -> None:
        threading.Thread(target=reread, name="cutlayer-reread", daemon=True).start()

    before = signal.signal(signal.SIGHUP, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)
