"""The warning that the server half fits stored activations while the test data no longer profit."""

import logging

from cutlayer import EpochRecord, run_experiment, with_choices
from cutlayer.runs.overfitting_watch import watch
from cutlayer.runs.recipes import digits


def record(epoch: int, exchange: str, loss: float, test: float | None) -> EpochRecord:
    costs = {"up": {}, "down": {}}, {"client": {}, "server": {}}, {}
    return EpochRecord(epoch, exchange, loss, 10, {} if test is None else {"loss": test}, *costs)


def warnings(caplog, *epochs: tuple[str, float, float | None]) -> list[str]:
    caplog.clear()
    records: list[EpochRecord] = []
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
    assert warnings(caplog, ("A", 1.0, 0.9), ("B", 0.5, 0.4), ("C", 0.1, 0.5), ("C", 0.1, None)) == []
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


def test_a_test_loss_that_never_fell_counts_though_it_has_not_risen(caplog) -> None:
    """A test loss that is back where it began, while the training loss is 0.003."""
    (message,) = warnings(caplog, ("A", 2.0, 3.88), ("B", 0.5, 2.9), ("C", 0.02, 3.5), ("C", 0.003, 3.89))
    assert "epoch 3: in C epochs the test loss is 3.5, after 3.88 at first, the training loss is 0.02" in message
    assert warnings(caplog, ("A", 1.5, 2.0), ("B", 0.1, 0.03), ("C", 5e-4, 0.02)) == []  # as it should be
    assert warnings(caplog, ("A", 1.5, 1.8), ("B", 0.3, 0.6), ("C", 0.1, 0.6)) == []  # fitted somewhat better


def test_of_a_test_loss_that_was_evaluated_once_it_says_no_more_than_it_is(caplog) -> None:
    (message,) = warnings(caplog, ("A", 2.0, None), ("B", 0.5, None), ("C", 0.02, 3.5))
    assert "epoch 3: in C epochs the test loss is 3.5, the training loss is 0.02. The server half fits" in message
    assert "at first" not in message
    assert "no longer" not in message


def test_a_resumed_run_does_not_warn_again(caplog) -> None:
    records = [record(0, "A", 2.0, 3.88), record(1, "C", 0.02, 3.5), record(2, "C", 0.01, None)]
    with caplog.at_level(logging.WARNING, "cutlayer.training"):
        watch([*records, record(3, "C", 0.003, 3.89)])
    assert caplog.records == []
    with caplog.at_level(logging.WARNING, "cutlayer.training"):
        watch([records[0], record(1, "C", 0.003, 3.89)])
    assert len(caplog.records) == 1
