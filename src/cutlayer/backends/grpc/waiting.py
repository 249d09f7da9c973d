"""Whom the server waits for, and since when, in words for a person."""

from __future__ import annotations

import time
from collections.abc import Callable

SOON = 3.0
LONG = 30.0
SELDOM = 600.0


class Waiting:
    """Says whom the server waits for: a little after the wait begins, then ever more seldom, and that it is over.

    Args:
        say: called with each line.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._what, self._since, self._clock, self._next = "", 0.0, "", 0.0
        self._said = False
        self._who: list[str] = []
        self._last: dict[str, float] = {}

    def on(self, who: str, why: str, *, after: float = SOON) -> None:
        """There is still to wait for `who`: to be called often; said after so many seconds, and once in `LONG`."""
        now = time.monotonic()
        self._who = who.split(", ")
        if (what := f"waiting for {who} ({why})") != self._what:
            self._what, self._since, self._clock = what, now, time.strftime("%H:%M:%S")
            self._next = max(now + after, self._last.get(what, -LONG) + LONG)
            self._said = False
        if now >= self._next:
            waited = now - self._since
            self._say(f"{what} since {self._clock}" + (f", for {_duration(waited)}" if waited > LONG else ""))
            self._said, self._last[what] = True, now
            self._next = now + min(max(LONG, waited), SELDOM)

    def awaited(self) -> list[str]:
        """Who is waited for now, if that takes longer than a moment. From any thread."""
        who, since = self._who, self._since
        return who if who and time.monotonic() - since >= SOON else []

    def over(self) -> None:
        """What was waited for has come."""
        if self._said:
            self._say(f"goes on after {_duration(time.monotonic() - self._since)}")
        self._what, self._who, self._said = "", [], False


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
