"""What the docs say works: every command and every block of Python of these pages, in the order of the page."""

import io
import json
import re
import shlex
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import matplotlib as mpl
import pytest

from cutlayer.cli import main
from cutlayer.cli.entry import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = ("docs/tutorial.md", "docs/plan.md", "docs/reports.md", "docs/afterwards.md")
README = ROOT / "README.md"

mpl.use("Agg")


def blocks(page: Path) -> list[tuple[str, str]]:
    """The blocks of a page, with their languages."""
    return re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def run_command(line: str) -> str:
    words = shlex.split(line, comments=True)
    assert words[0] == "cutlayer", line
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = main(words[1:])
    assert code == 0, f"{line}\n{said.getvalue()}"
    return said.getvalue()


@pytest.mark.parametrize("page", PAGES)
def test_a_page_does_what_it_says(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "docs"}
    for language, content in blocks(ROOT / page):
        if language == "sh":
            for line in content.replace("\\\n", " ").splitlines():
                run_command(line)
        elif language == "python":
            with redirect_stdout(io.StringIO()):
                exec(compile(content, page, "exec"), names)


def test_every_page_is_in_the_site_and_every_link_leads_somewhere() -> None:
    site = (ROOT / "zensical.toml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f'"{page.name}"' in site, f"{page.name} is not in zensical.toml"
    for page in [README, *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_commands_that_are_not_run_are_known() -> None:
    for page in [README, *(ROOT / "docs").glob("*.md")]:
        for command in re.findall(r"^    cutlayer ([a-z]+) ", page.read_text(), re.MULTILINE):
            assert command in COMMANDS, f"{page.name}: {command}"


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "examples" / "tour.ipynb").read_text())
    names: dict[str, object] = {"__name__": "notebook"}
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 3
    for cell in cells:
        with redirect_stdout(io.StringIO()):
            exec(compile(cell, "tour.ipynb", "exec"), names)
