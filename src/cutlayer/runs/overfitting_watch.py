"""The warning that the server half goes on learning stored activations while the test data no longer profit."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence

from cutlayer.records.history import EpochRecord
from cutlayer.schedule import Exchange

log = logging.getLogger("cutlayer.training")


def watch(records: Sequence[EpochRecord]) -> None:
    """Warn after the last of these epochs if the test loss leaves the training loss far behind in C epochs.

    Once in a run, also if it was resumed: not if this was so after an earlier epoch.
    """
    epochs = list(left_behind(records))
    if len(epochs) == 1 and epochs[0][0] is records[-1]:
        log.warning(epochs[0][1])


def left_behind(records: Sequence[EpochRecord]) -> Iterator[tuple[EpochRecord, str]]:
    """The C epochs after which the test loss was far behind the training loss, and what to warn of.

    The test loss must be twice the training loss. Beyond that, either it is ahead of it by half of the first test loss,
    whether or not it rose; or it is twice its best so far, and has risen from it by a tenth of the first. A loss near
    zero may move, and a network may fit its training data somewhat better than others.
    """
    first, best = math.nan, math.inf
    for record in records:
        if "loss" not in record.test:
            continue
        test, only = record.test["loss"], math.isnan(first)
        best, first = min(best, test), test if only else first
        if record.exchange != Exchange.NONE or test < 2 * record.loss:
            continue
        if test >= 2 * best and test - best >= abs(first) / 10:
            so = f"has risen from {best:.3g} to {test:.3g}"
        elif test - record.loss >= abs(first) / 2:
            so = f"is {test:.3g}" + ("" if only else f", after {first:.3g} at first")
        else:
            continue
        yield (
            record,
            f"epoch {record.epoch + 1}: in C epochs the test loss {so}, the training loss is {record.loss:.3g}. The "
            f"server half fits stored activations{'' if only else ', and the test data no longer profit'}: let more "
            "epochs exchange (a lower threshold, more warm-up), shorten the run, or see docs/batch-norm.md",
        )
