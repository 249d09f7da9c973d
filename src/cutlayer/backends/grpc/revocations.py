"""Clients whose certificates do not count any more: a file of names, one a line, read again when told."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from cutlayer.errors import ConfigError

log = logging.getLogger("cutlayer.server")

REASON = "the server's operator revoked its certificate"


class Revocations:
    """The names in a file; empty lines and those that begin with # do not count."""

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        self._listeners: list[Callable[[set[str]], None]] = []
        self.names = self._read()

    def _read(self) -> set[str]:
        try:
            lines = self.file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"revoked: {self.file} cannot be read: {error}") from None
        return {line.strip() for line in lines if line.strip() and not line.startswith("#")}

    def listen(self, listener: Callable[[set[str]], None]) -> None:
        """Have this called with all names, now and whenever they change."""
        self._listeners.append(listener)
        listener(self.names)

    def reread(self) -> None:
        """Read the file again. If it cannot be read, the names stay as they are."""
        try:
            self.names = self._read()
        except ConfigError as error:
            log.warning("%s; the names before it still count", error)
            return
        log.warning("revoked: %s", ", ".join(sorted(self.names)) or "no one")
        for listener in self._listeners:
            listener(self.names)

    @contextmanager
    def on_signal(self) -> Iterator[None]:
        """Inside the block, SIGHUP has the file read again. For a process's main thread."""

        # In a thread of its own: the main thread may be in the midst of what the listeners change.
        def handle(*_: object) -> None:
            threading.Thread(target=self.reread, name="cutlayer-reread", daemon=True).start()

        before = signal.signal(signal.SIGHUP, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGHUP, before)
