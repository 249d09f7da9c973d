"""The code blocks of README and docs, and what they take for granted.

A block is run unless the line above it says why not: `<!-- not run: REASON -->`. Blocks that wait for another, such as
a server, have `<!-- in the background -->` there, and run beside those that follow.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cutlayer import with_choices
from cutlayer.backends.grpc.certs import make_certificates
from cutlayer.data.datasets import digits
from cutlayer.models.cut import split
from cutlayer.models.networks import make_model
from cutlayer.runs import recipes
from tests.helpers.privacy import DEEP, trained

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
Names = dict[str, Any]


@dataclass(frozen=True)
class Block:
    """A code block: its page, line and language, what it holds, and what the line above says of it."""

    page: str
    line: int
    language: str
    content: str
    mark: str

    def __str__(self) -> str:
        """Where it is."""
        return f"{self.page}, line {self.line}"

    @property
    def runs(self) -> bool:
        """Whether it is to be run."""
        return not self.mark.startswith("not run: ")

    def lines(self) -> Iterator[str]:
        """Its lines, without backslashes at their ends."""
        yield from self.content.replace("\\\n", " ").splitlines()


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    found = re.finditer(r"^(?:<!-- ([^\n]*) -->\n)?```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    name = str(page.relative_to(ROOT))
    return [
        Block(name, page.read_text()[: each.start(2)].count("\n") + 1, each[2], each[3], each[1] or "")
        for each in found
    ]


def _images(count: int = 48) -> Names:
    train, test = (part.first(count) for part in digits())
    network = make_model("cnn", (1, 8, 8), train.mean, train.std)
    return {"network": network, "train": train, "test": test, "labels": train.labels, "train_data": train,
            "test_data": test}  # fmt: skip


def _attacked() -> Names:
    target = trained(DEEP)
    names = {name: getattr(target, name) for name in ("half", "server", "private", "labels", "public", "public_labels")}
    return {**names, "public": target.public[:64], "public_labels": target.public_labels[:64]}


def _configs() -> Names:
    small = {"train_samples": 64, "test_samples": 32, "epochs": 1, "threads": 1}
    return {"configs": [with_choices(recipes.digits(), **small, seed=seed) for seed in range(2)]}


def _halves() -> Names:
    from cutlayer import Drop, Method, Training

    make_certificates(Path("tls"), ["alice"])
    Path("alice").symlink_to("tls/alice")
    names = _images()
    halves = split(names["network"], "layer3")
    more = {"method": Method.of(Drop(), "fp8"), "training": Training(epochs=3, batch_size=32)}
    return {**names, **more, "client_half": halves.client, "server_half": halves.server}


GIVEN: dict[str, Callable[[], Names]] = {
    "README.md": _images,
    "docs/many-clients.md": lambda: _images(160),
    "docs/partitions.md": lambda: {"train": digits()[0]},
    "docs/privacy.md": _attacked,
    "docs/studies.md": _configs,
    "docs/two-machines.md": _halves,
}
"""What a page's Python takes for granted, such as a network and data of one's own; made in an empty folder."""
