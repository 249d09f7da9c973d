"""Makes the pictures in docs/images: a report in a browser and on a phone, the terminal, what an attacker gets back.

    python tools/screenshots.py        # some minutes; needs Chromium and the extras report and privacy

The runs are those of docs/tutorial.md, on the digits, and an attack on the first of them.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console

from cutlayer.cli.entry import COMMANDS

IMAGES = Path(__file__).parents[1] / "docs" / "images"
MOST_BYTES = 150_000
PHONE = 390
FRAME = (
    '<body style="margin:0"><iframe src="{page}" style="border:0;width:{width}px;height:{height}px"></iframe></body>'
)


def command(line: str, console: Console) -> None:
    name, *arguments = shlex.split(line)
    COMMANDS[name](arguments, console)


def silent() -> Console:
    return Console(file=io.StringIO(), quiet=True, markup=False, highlight=False)


class Terminal(Console):
    """One of 80 columns, which breaks long lines itself, as terminals do."""

    def __init__(self) -> None:
        super().__init__(record=True, force_terminal=True, width=80, file=io.StringIO(), markup=False, highlight=False)

    def print(self, *objects: Any, soft_wrap: bool | None = None, **options: Any) -> None:
        super().print(*objects, soft_wrap=False, **options)


def terminal(line: str, file: Path) -> None:
    """What a command shows on a terminal."""
    console = Terminal()
    console.print(f"$ cutlayer {line}", style="bold")
    command(line, console)
    picture = console.export_svg(title="cutlayer")
    # Without fonts from the network: whatever font of fixed width is there.
    file.write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL))


def browser() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        sys.exit("expected Chromium on the PATH")
    return found


def page(report: Path, file: Path, width: int, height: int) -> None:
    """A picture of a page in a window of this size, in a frame, as a browser's window is not as narrow as a phone."""
    frame = report.with_name("frame.html")
    frame.write_text(FRAME.format(page=report.name, width=width, height=height))
    shot = report.with_name("shot.png")
    size = f"--window-size={max(width, 600)},{height}"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", size, f"--screenshot={shot}"]
    subprocess.run([browser(), *options, frame.as_uri()], check=True, capture_output=True, timeout=180)
    small(Image.open(shot).crop((0, 0, width, height)), file)


def small(image: Image.Image, file: Path) -> None:
    """Few colours, so that the file is small."""
    image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(file, optimize=True)


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    place = Path.cwd()
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)  # so that names of runs are as in the tutorial
        try:
            shoot(Path(work))
        finally:
            os.chdir(place)
    for file in sorted(IMAGES.iterdir()):
        print(f"{file.relative_to(IMAGES.parent)}: {file.stat().st_size / 1000:.0f} kB")
        assert file.stat().st_size < MOST_BYTES


def shoot(work: Path) -> None:
    tell: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    tell("training")
    command("train digits --epochs 20 --threads 1 --run-dir runs/method", silent())
    command("train digits --epochs 20 --threads 1 --schedule always --codec fp32 --run-dir runs/plain", silent())
    tell("terminal")
    terminal("compare runs/plain runs/method", IMAGES / "compare.svg")
    plan = "plan digits --epochs 20 --exchanges '5A 1B 14C' --link 20Mbit/40ms --device-gflops 5 --server-gflops 50"
    terminal(plan, IMAGES / "plan.svg")
    tell("report")
    command("report runs/plain runs/method --output report.html --title Digits", silent())
    page(work / "report.html", IMAGES / "report.png", 1100, 1000)
    page(work / "report.html", IMAGES / "report-phone.png", PHONE, 844)
    tell("gallery")
    command("attack runs/method --attack known_half --effort 0.2 --images 8 --threads 1", silent())
    small(Image.open("runs/method/attacks.png"), IMAGES / "gallery.png")


if __name__ == "__main__":
    main()
