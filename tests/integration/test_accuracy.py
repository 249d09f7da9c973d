"""What a user reads first: that many clients with the method learn as well as plain split learning does."""

import dataclasses

import pytest

from cutlayer.runs.config import Config
from cutlayer.runs.fit import fit
from cutlayer.runs.recipes import digits


def accuracy(config: Config) -> float:
    """Test accuracy at the end of a run."""
    train, test = config.datasets()
    parts, _ = config.divided(train)
    return fit(config.halves(train), parts, test, method=config.method(), training=config.training()).history.test(
        "accuracy"
    )


@pytest.mark.parametrize(
    ("mode", "partition"),
    [
        ("splitfed_v2", "dirichlet:0.5"),  # the README's command; it once trained to 23 %
        ("splitfed_v2", "iid"),
        ("splitfed_v1", "iid"),
        ("sequential", "iid"),
        ("parallel", "dirichlet:0.5"),
    ],
)
def test_ten_clients_learn_the_digits(mode: str, partition: str) -> None:
    """Plain split learning gets 99 % in these settings."""
    config = dataclasses.replace(
        digits(), clients=10, mode=mode, partition=partition, epochs=25, evaluate_every=25, threads=1
    )
    assert accuracy(config) > 0.94


def test_a_client_with_few_samples_learns_the_digits() -> None:
    config = dataclasses.replace(digits(), train_samples=200, epochs=40, evaluate_every=40, threads=1)
    assert accuracy(config) > 0.94
