"""Builds the site of the docs into `site`, with a reference made from docstrings: `make docs`.

    python tools/site.py

Pages that docs link to elsewhere in the repository are taken along; links to other files there become plain text. A
warning of the builder is an error.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cutlayer

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "build" / "docs"


def entry(name: str) -> str:
    """The section of one name."""
    value = getattr(cutlayer, name)
    lines = [f"## {name}", ""]
    if inspect.isclass(value) or inspect.isfunction(value):
        with contextlib.suppress(TypeError, ValueError):
            lines += ["```text", f"{name}{inspect.signature(value)}", "```", ""]
    lines += ["```text", inspect.getdoc(value) or "", "```", ""]
    if inspect.isclass(value):
        for method, function in inspect.getmembers(value, inspect.isfunction):
            if not method.startswith("_") and function.__qualname__.startswith(value.__name__) and function.__doc__:
                first = inspect.getdoc(function).partition("\n\n")[0].replace("\n", " ")
                lines.append(f"* `{method}`: {first.replace('<', '&lt;')}")
        lines.append("")
    return "\n".join(lines)


def reference() -> str:
    """The page of the reference."""
    head = "# Reference\n\nWhat `import cutlayer` gives. This page is made from the docstrings.\n"
    return "\n".join([head, *map(entry, cutlayer.__all__)])


def take_along(page: Path, source: Path, known: dict[Path, Path]) -> None:
    """Mend the links of a page, whose source is in the repository: to pages that are taken along, or to none."""

    def mended(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        linked = (source.parent / target).resolve()
        if linked in known:
            return f"[{text}]({os.path.relpath(known[linked], page.parent)}{anchor})"
        if linked.suffix == ".md" and linked.is_file() and linked.is_relative_to(ROOT):
            copy = PAGES / "repository" / linked.relative_to(ROOT)
            known[linked] = copy
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(linked.read_text(encoding="utf-8"), encoding="utf-8")
            take_along(copy, linked, known)
            return f"[{text}]({os.path.relpath(copy, page.parent)}{anchor})"
        return found[0] if linked.is_relative_to(ROOT / "docs") and linked.exists() else text

    text = page.read_text(encoding="utf-8")
    page.write_text(re.sub(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)#\s]+)(#[^)]*)?\)", mended, text), encoding="utf-8")


def main() -> int:
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES)
    (PAGES / "reference.md").write_text(reference(), encoding="utf-8")
    sources = {file.resolve(): PAGES / file.relative_to(ROOT / "docs") for file in (ROOT / "docs").rglob("*.md")}
    known = dict(sources)
    for source, page in sources.items():
        take_along(page, source, known)
    done = subprocess.run([sys.executable, "-m", "zensical", "build", "--clean", "--strict"], cwd=ROOT)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
