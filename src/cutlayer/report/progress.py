"""Progress while a run goes on."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from cutlayer.records.history import EpochRecord
from cutlayer.report.plain import plain_console
from cutlayer.report.units import human_bytes

MOST_STRETCHES = 4
"""Of the timeline in a line of progress."""


class TwoLines(Progress):
    """A bar, and below it the figures of its task, which beside it would not fit a terminal of 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Both lines of each task."""
        for task in self.tasks:
            yield self.make_tasks_table([task])
            if task.fields["line"]:
                yield Text(f"  {task.fields['line']}", no_wrap=True, overflow="ellipsis")


class ProgressView:
    """Shows a run as it goes: a bar that moves on a terminal, otherwise a line now and then.

    Use as a context manager, and pass it as `on_epoch`.

    Args:
        title: what to call the run.
        epochs: its length.
        done: epochs up to the checkpoint that a resumed run goes on from.
        every: seconds between lines if the output is not a terminal.
    """

    def __init__(
        self, title: str, epochs: int, console: Console, done: Sequence[EpochRecord] = (), every: float = 5.0
    ) -> None:
        self.title, self.epochs, self.console, self.every = title, epochs, console, every
        self.bytes = sum(_training_bytes(record) for record in done)
        self.exchanges = "".join(record.exchange for record in done)
        self.accuracy = next((_score(r) for r in reversed(done) if r.test), "")
        self.begun: tuple[float, int] | None = None  # time and epochs done after the first epoch, which starts slowly
        self.printed = 0.0
        self.progress = TwoLines(
            TextColumn("{task.description}"), BarColumn(bar_width=20), TimeRemainingColumn(), console=console
        )
        self.task = self.progress.add_task(title, total=epochs, completed=len(done), line="")

    def __enter__(self) -> ProgressView:
        if self.console.is_terminal:
            self.progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.console.is_terminal:
            self.progress.stop()

    def _also(self, record: EpochRecord) -> str:
        """The timeline, who was not there, and what the link carried, if the server waited for one."""
        parts = [_counts(self.exchanges)]
        if record.absent:
            parts.append(f"absent: {', '.join(map(str, record.absent))}")
        if record.seconds.get("wait") and (sent := sum(sum(kinds.values()) for kinds in record.bytes.values())):
            parts.append(f"link {8 * sent / 1e6 / sum(record.seconds.values()):.3g} Mbit/s")
        return f"  ({'; '.join(parts)})"

    def note(self, line: str) -> None:
        """Show a line beside the progress."""
        self.console.print(f"{self.title}: {line}", soft_wrap=True)

    def __call__(self, record: EpochRecord) -> None:
        """Show this epoch."""
        self.bytes += _training_bytes(record)
        self.accuracy = _score(record) if record.test else self.accuracy
        self.exchanges = self.exchanges[: record.epoch] + record.exchange
        done = record.epoch + 1
        line = (
            f"epoch {done:>{len(str(self.epochs))}}/{self.epochs}  {record.exchange}  loss {record.loss:.4f}  "
            f"{self.accuracy}  {human_bytes(self.bytes)} so far{self._also(record)}"
        )
        self.progress.update(self.task, completed=done, line=line)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self.printed > self.every or done == self.epochs):
            self.printed = now
            left = ""
            if self.begun is not None and done > self.begun[1]:  # it is not if epochs are trained again
                seconds = (now - self.begun[0]) / (done - self.begun[1]) * (self.epochs - done)
                left = f", {seconds:.0f} s left"
            self.console.print(f"{self.title}: {line}{left}", soft_wrap=True)
        self.begun = self.begun or (now, done)


def _counts(exchanges: str) -> str:
    """Stretches of the newest exchanges, such as "5A B 12C"."""
    stretches = [(letter, len(list(same))) for letter, same in groupby(exchanges)][-MOST_STRETCHES:]
    return " ".join(f"{count if count > 1 else ''}{letter}" for letter, count in stretches)


def shown(
    title: str, epochs: int, done: Sequence[EpochRecord], progress: bool | None
) -> AbstractContextManager[ProgressView | None]:
    """A view on stderr; nothing for False, and by default neither without a terminal or a notebook."""
    console = plain_console(stderr=True)
    wanted = console.is_terminal or console.is_jupyter if progress is None else progress
    return ProgressView(title, epochs, console, done) if wanted else nullcontext()


def _training_bytes(record: EpochRecord) -> int:
    return sum(n for kinds in record.bytes.values() for kind, n in kinds.items() if kind != "evaluation")


def _score(record: EpochRecord) -> str:
    name = next((name for name in record.test if name != "loss"), "loss")
    return f"{name} {record.test[name]:.4f}"
