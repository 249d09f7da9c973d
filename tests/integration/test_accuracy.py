"""What a user reads first: that many clients with the method learn as well as plain split learning does."""

import pytest

from cutlayer import RunConfig, run_experiment, with_choices
from cutlayer.runs.recipes import digits


def accuracy(config: RunConfig) -> float:
    """Test accuracy at the end of a run."""
    return run_experiment(config).history.test("accuracy")


@pytest.mark.parametrize(
    ("strategy", "partition"),
    [
        ("splitfed_v2", "dirichlet:0.5"),  # the README's command; it once trained to 23 %
        ("splitfed_v2", "iid"),
        ("splitfed_v1", "iid"),
        ("sequential", "iid"),
        ("parallel", "dirichlet:0.5"),
    ],
)
def test_ten_clients_learn_the_digits(strategy: str, partition: str) -> None:
    """Plain split learning gets 99 % in these settings."""
    config = with_choices(
        digits(), clients=10, strategy=strategy, partition=partition, epochs=25, evaluate_every=25, threads=1
    )
    assert accuracy(config) > 0.94


def test_a_client_with_few_samples_learns_the_digits() -> None:
    config = with_choices(digits(), train_samples=200, epochs=40, evaluate_every=40, threads=1)
    assert accuracy(config) > 0.94
