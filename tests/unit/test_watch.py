"""The warning that the server half fits stored activations while the test data no longer profit."""

import logging

from cutlayer import EpochRecord, run_experiment, with_choices
from cutlayer.runs.recipes import digits
from cutlayer.runs.watch import Watch


def record(epoch: int, exchange: str, loss: float, test: float | None) -> EpochRecord:
    costs = {"up": {}, "down": {}}, {"client": {}, "server": {}}, {}
    return EpochRecord(epoch, exchange, loss, 10, {} if test is None else {"loss": test}, *costs)


def warnings(caplog, *epochs: tuple[str, float, float | None]) -> list[str]:
    caplog.clear()
    watch, records = Watch(), []
    with caplog.at_level(logging.WARNING, "cutlayer.training"):
        for number, epoch in enumerate(epochs):
            records.append(record(number, *epoch))
            watch(records)
    return [entry.getMessage() for entry in caplog.records]


def test_it_warns_once_and_in_c_epochs_only(caplog) -> None:
    rising = [("A", 1.0, 0.5), ("B", 0.5, 0.4), ("C", 0.1, 1.9), ("C", 0.05, 3.0)]
    (message,) = warnings(caplog, *rising)
    assert "epoch 3: in C epochs the test loss has risen from 0.4 to 1.9, the training loss is 0.1" in message
    assert warnings(caplog, ("A", 1.0, 0.5), ("A", 0.5, 0.4), ("A", 0.1, 1.9)) == []
    assert warnings(caplog, ("A", 1.0, 0.5), ("B", 0.5, 0.4), ("C", 0.1, 0.6), ("C", 0.1, None)) == []
    assert warnings(caplog, ("A", 1.0, 0.5), ("B", 1e-4, 1e-3), ("C", 1e-5, 4e-3)) == []  # nothing to speak of
    assert warnings(caplog, ("A", 9.0, 9.0), ("B", 5.0, 4.0), ("C", 8.5, 8.1)) == []  # the training loss rises, too


def test_a_run_warns_where_stored_activations_are_not_what_is_evaluated(caplog) -> None:
    """The batches' own statistics in B, with several clients: what 0.1 did by default."""
    config = with_choices(
        digits(), clients=10, norm_in_b="train", epochs=12, train_samples=400, threads=1, schedule="periodic", period=20
    )
    with caplog.at_level(logging.WARNING, "cutlayer.training"):
        run_experiment(config)
    assert sum("in C epochs the test loss has risen" in entry.getMessage() for entry in caplog.records) == 1
