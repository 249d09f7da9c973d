"""What the project is built from: pins have hashes and licences, and builds come out the same."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def supply():
    spec = importlib.util.spec_from_file_location("supply", ROOT / "tools" / "supply.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_pin_but_torch_has_a_hash(supply) -> None:
    where, found = supply.hashed()
    assert re.fullmatch(r"CPython 3\.\d+, \w+, \w+", where)
    pinned = {name: version for name, version in supply.pins().items() if name != "torch"}
    assert {name: version for name, (version, _) in found.items()} == pinned, "run `make hashes`"


def test_licences_are_listed_and_allow_the_use(supply) -> None:
    rows = [line.split(" | ") for line in supply.LICENCES.read_text().splitlines()[7:]]
    listed = {name.removeprefix("| "): (version, text.removesuffix(" |")) for name, version, text in rows}
    assert {name: version for name, (version, _) in listed.items()} == supply.pins(), "run `make licences`"
    assert not supply.odd(listed)
    assert supply.odd({"x": ("1", "GPL-3.0-only"), "y": ("1", "not said")}).keys() == {"x", "y"}
    here = {name: text for name, (_, text) in supply.licences().items()}
    assert {name: listed[name][1] for name in here} == here, "run `make licences`"


def test_two_builds_are_the_same_bytes(supply) -> None:
    pairs = supply.built_twice()
    assert sorted(Path(name).suffix for name in pairs) == [".gz", ".whl"]
    for name, (first, second) in pairs.items():
        assert first == second, name


def test_the_build_backend_and_the_base_image_are_pinned(supply) -> None:
    assert f'requires = ["hatchling=={supply.pins()["hatchling"]}"]' in (ROOT / "pyproject.toml").read_text()
    (base,) = re.findall(r"^ARG BASE=(\S+)$", (ROOT / "deploy" / "Containerfile").read_text(), re.MULTILINE)
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", base)
