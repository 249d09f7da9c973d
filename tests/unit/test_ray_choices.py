"""What can be said of a run on Ray before there is a cluster."""

import sys

import pytest

from cutlayer import ConfigError, fit
from cutlayer.backends.ray import Ray
from tests.helpers.small import data, halves, training


@pytest.mark.parametrize(
    "wrong", [{"actors": 0}, {"workers": 0}, {"restarts": -1}, {"cpus_per_actor": -1}, {"patience": 0.0}]
)
def test_wrong_choices_are_named(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Ray(**wrong)


def test_without_ray_the_error_says_how_to_get_it(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"cutlayer\[ray\]"):
        fit(halves(), data(), training=training(1), backend=Ray())
