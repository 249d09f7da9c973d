"""What README and docs say works: their blocks are run in the order of the page, or, if one says why not, read."""

import ast
import io
import json
import re
import shlex
import socket
import threading
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import matplotlib as mpl
import pytest
import tyro

from cutlayer.cli import main
from cutlayer.cli.entry import COMMANDS
from cutlayer.device.__main__ import main as device
from cutlayer.runs.recipes import RECIPES
from tests.helpers.documented import GIVEN, PAGES, ROOT, Block, Names, blocks

README = ROOT / "README.md"
LANGUAGES = {"sh", "python", "text", "ini"}
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

mpl.use("Agg")


class Read(BaseException):
    """A command's arguments were read; with what was made of them."""


def run_command(line: str) -> str:
    words = shlex.split(line, comments=True)
    assert words[0] == "cutlayer", line
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = main(words[1:])
    assert code == 0, f"{line}\n{said.getvalue()}"
    return said.getvalue()


def read_command(line: str, where: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command takes these arguments: its own parser reads them, and choices are applied to the recipe."""
    parse = tyro.cli

    def reading(*given: object, **more: object) -> None:
        raise Read(parse(*given, **more))

    words, said = shlex.split(line, comments=True), io.StringIO()
    with monkeypatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
        patch.setattr(tyro, "cli", reading)
        try:
            if words[0] == "cutlayer-device":
                device(words[1:])  # ends at once, as there is no half
                return
            main(words[1:])
        except Read as read:
            chosen = read.args[0]
            if hasattr(chosen, "choices"):
                chosen.choices.applied_to(RECIPES[chosen.recipe]())
            return
        except SystemExit:
            pass
    pytest.fail(f"{where}: {line}\n{said.getvalue()}")


def commands(block: Block) -> Iterator[str]:
    """The commands of a block that are the project's, one by one."""
    for line in block.lines():
        for part in line.split(" && "):
            if found := re.search(r"^(?:ExecStart=\S*/)?(cutlayer(?:-device)? .*)", part):
                yield found[1]


def run_python(block: Block, names: Names) -> None:
    with redirect_stdout(io.StringIO()):
        exec(compile(block.content, str(block), "exec"), names)


def read_python(block: Block) -> None:
    """It is Python, and what it imports of this package is there."""
    for node in ast.walk(ast.parse(block.content)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cutlayer"):
            exec(ast.unparse(node), {})


def free_port() -> int:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        return chosen.getsockname()[1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_does_what_it_says(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: Names = {"__name__": "docs"}
    found = blocks(page)
    if any(block.language == "python" for block in found):
        names |= GIVEN.get(str(page.relative_to(ROOT)), dict)()
    address, beside = f"localhost:{free_port()}", []
    raised: list[BaseException] = []

    def run_beside(block: Block) -> None:
        try:
            run_python(block, names)
        except BaseException as error:
            raised.append(error)

    for block in found:
        if block.language == "python" and block.runs:
            here = block.content.replace("SERVER:7070", address).replace("0.0.0.0:7070", address)
            block = Block(block.page, block.line, block.language, here, block.mark)
            if block.mark == "in the background":
                beside.append(threading.Thread(target=run_beside, args=(block,), daemon=True))
                beside[-1].start()
            else:
                run_python(block, names)
        elif block.language == "python":
            read_python(block)
        elif block.language == "sh" and block.runs:
            for line in block.lines():
                run_command(line)
        else:
            for line in commands(block):
                read_command(line, block, monkeypatch)
    for thread in beside:
        thread.join(120)
    assert not raised, raised
    if beside:
        assert names["served"].history.exchanges


def test_every_block_has_a_language_and_none_is_only_indented() -> None:
    for page in PAGES:
        assert [str(block) for block in blocks(page) if block.language not in LANGUAGES] == []
        assert page.read_text().count("\n```") == 2 * len(blocks(page)), f"{page.name}: a block is not recognized"
        assert not re.search(r"^\n {4}\S", page.read_text(), re.MULTILINE), f"{page.name}: an indented block"


def test_a_renamed_option_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    for line in ("cutlayer train digits --epoch 3", "cutlayer join S:1 --accept-cuts a", "cutlayer trian digits",
                 "cutlayer train digits --codec fp9", "cutlayer-device join S:1 --half x"):  # fmt: skip
        with pytest.raises((pytest.fail.Exception, SystemExit, ValueError)):
            read_command(line, "here", monkeypatch)


def options() -> dict[str, set[str]]:
    """The options of each command, as the shell's completion knows them, and those of the scripts."""
    script = run_command("cutlayer completion bash")
    found = {name: set(words.split()) for name, words in re.findall(r'^ +(\w+)\) choices="(.*)" ;;', script, re.M)}
    for name, files in (("device", ["src/cutlayer/device/__main__.py"]), ("", (ROOT / "benchmarks").glob("*.py"))):
        found[name] = {each for file in files for each in re.findall(r'"(--[a-z-]+)"', (ROOT / file).read_text())}
    return found


def test_options_in_the_text_are_those_of_a_command() -> None:
    known, everywhere = options(), {"--quiet", "--debug", "--resume"}
    assert set(COMMANDS) <= set(known)
    for page in [*PAGES, ROOT / "SECURITY.md"]:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for span in re.findall(r"`([^`\n]+)`", text):
            command = re.match(r"cutlayer(?: |-)([a-z]+)", span)
            if command or span.startswith("--"):
                assert not command or command[1] in known, f"{page.name}: {span}"
                there = everywhere | (known[command[1]] if command else set().union(*known.values()))
                for named in re.findall(r"(?<![\w-])--[a-z][\w.-]*\w(?:\.\*)?", span):
                    group = named.endswith(".*") and any(each.startswith(named[:-1]) for each in there)
                    assert group or named in there, f"{page.name}: {span}"


def test_extras_that_are_named_are_there() -> None:
    for page in PAGES:
        for names in re.findall(r"(?:cutlayer|\.)\[([\w,]+)\]'", page.read_text()):
            assert set(names.split(",")) <= set(EXTRAS), f"{page.name}: {names}"


def test_every_page_is_in_the_site_and_every_link_leads_somewhere() -> None:
    site = (ROOT / "zensical.toml").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f'"{page.name}"' in site, f"{page.name} is not in zensical.toml"
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def run_cell(cell: str, names: Names) -> object:
    """Run a notebook's cell; return what it shows, which is the value of its last line if that is an expression."""
    tree = ast.parse(cell)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "tour.ipynb", "exec"), names)
    return eval(compile(ast.Expression(last.value), "tour.ipynb", "eval"), names) if last is not None else None


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "examples" / "tour.ipynb").read_text())
    names: dict[str, object] = {"__name__": "notebook"}
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 3
    shown = []
    for cell in cells:
        with redirect_stdout(io.StringIO()):
            shown.append(run_cell(cell, names))
    pages = [value._repr_html_() for value in shown if hasattr(value, "_repr_html_")]
    assert sum("<th>exchanges</th>" in page for page in pages) >= 2  # the history and the run show themselves
