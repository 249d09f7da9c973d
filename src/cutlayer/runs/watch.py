"""The warning that the server half goes on learning stored activations while the test data no longer profit."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from cutlayer.records.history import EpochRecord
from cutlayer.schedule import Exchange

log = logging.getLogger("cutlayer.training")


class Watch:
    """Warns once if the test loss leaves the training loss far behind in C epochs."""

    def __init__(self) -> None:
        self.warned = False

    def __call__(self, records: Sequence[EpochRecord]) -> None:
        """Look at the last of these epochs."""
        if not self.warned and records and (reason := left_behind(records)):
            self.warned = True
            log.warning(reason)


def left_behind(records: Sequence[EpochRecord]) -> str | None:
    """What to warn of after the last of these epochs, or None.

    The test loss must be twice its best so far and twice the training loss, and have risen from its best by a tenth
    of the first one, so that a loss near zero may move.
    """
    last = records[-1]
    losses = [record.test["loss"] for record in records if "loss" in record.test]
    if last.exchange != Exchange.NONE or "loss" not in last.test:
        return None
    test, best = last.test["loss"], min(losses)
    if test < 2 * best or test < 2 * last.loss or test - best < abs(losses[0]) / 10:
        return None
    return (
        f"epoch {last.epoch + 1}: in C epochs the test loss has risen from {best:.3g} to {test:.3g}, the training loss "
        f"is {last.loss:.3g}. The server half fits stored activations, and the test data no longer profit: let more "
        "epochs exchange (a lower threshold, more warm-up), shorten the run, or see docs/batch-norm.md"
    )
