"""What is shipped: sdist and wheel are built, and are what they should be. Installs: `python tools/packages.py`."""

import importlib.util
import re
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SEMANTIC = r"(\d+)\.(\d+)\.(\d+)"


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("packages", ROOT / "tools" / "packages.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_wheel_holds_the_package_and_the_sdist_builds_the_same(tmp_path: Path) -> None:
    with zipfile.ZipFile(tool().built(tmp_path)) as wheel:
        names = set(wheel.namelist())
        about = wheel.read(f"cutlayer-{PROJECT['version']}.dist-info/METADATA").decode()
    sources = {f"cutlayer/{file.relative_to(ROOT / 'src/cutlayer')}" for file in (ROOT / "src/cutlayer").rglob("*.py")}
    packaged = {name for name in names if not name.startswith("cutlayer-")}
    assert packaged == {*sources, "cutlayer/py.typed", "cutlayer/report/page.html.j2"}
    assert set(re.findall(r"^Provides-Extra: (.*)$", about, re.MULTILINE)) == set(PROJECT["optional-dependencies"])


def test_every_extra_is_tried() -> None:
    assert set(tool().JOBS) - {"", "device"} == set(PROJECT["optional-dependencies"]) - {"dev"}


def test_versions_are_semantic_and_in_order() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    versions = [re.match(SEMANTIC, heading) for heading in headings[1:]]
    numbers = [tuple(map(int, version.groups())) for version in versions]
    assert numbers == sorted(set(numbers), reverse=True)
    assert versions[0][0] == PROJECT["version"]
