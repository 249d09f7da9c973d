"""What a server refused: counted by who sent it and by why, and logged."""

from __future__ import annotations

import logging
import threading
from collections import Counter

from cutlayer.errors import RefusedError, harmless

log = logging.getLogger("cutlayer.wire")

MOST_NAMES = 1000
"""Of those that are counted by themselves. Strangers choose their names; the others are counted together."""
OTHERS = "others"


class SessionUnknown(RefusedError):  # noqa: N818
    """A client wants what this server has not got at the moment; it may begin a new session."""


class Refusals:
    """Counts what was refused, by who sent it, and logs the first few of each and then ever fewer."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[tuple[str, str]] = Counter()
        """By who sent it, and by the field or rule that the message begins with."""
        self._lock = threading.Lock()

    def add(self, who: str, reason: object, address: str = "") -> None:
        """Count and log one refusal."""
        who, said = harmless(who, 80), harmless(reason, 500)
        with self._lock:
            who = who if who in self.counts or len(self.counts) < MOST_NAMES else OTHERS
            self.counts[who] += 1
            self.reasons[who, _kind(said)] += 1
            count = self.counts[who]
        if count <= 10 or count == 10 ** (len(str(count)) - 1):
            log.warning("refused (%d of %s): %s%s", count, who, f"{address}: " if address else "", said)


def _kind(said: str) -> str:
    """What a refusal is about, one of a few: its first words up to the colon, without a client's number."""
    parts = [part.strip() for part in said.split(": ")[:-1] if not part.startswith("client ")]
    word = parts[0] if parts else ""
    return word if word.replace("_", "").isalpha() and len(word) <= 24 else "other"
