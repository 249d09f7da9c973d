"""The experiments of the paper, and what goes beyond them: X. Chen, J. Li, C. Chakrabarti, SiPS 2021, arXiv 2107.09786.

Its claims, all at under 0.5 % loss of accuracy on CIFAR-10: 1.64x to 106.7x less traffic and 2.86x to 32.1x less
client computation for VGG11, VGG13 and ResNet18 with one client; 11.9x and 11.3x less traffic for VGG11 with 5 and 10.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from cutlayer.data.augment import CropFlip
from cutlayer.fleet import Fleet
from cutlayer.method import Method, Training
from cutlayer.schedule import Always, Drift, Drop, Periodic, Schedule
from cutlayer.strategies import make_strategy
from cutlayer.studies.few_exchanges import FEW, FOUR_BITS, gathered, settled_once
from cutlayer.studies.rows import Row, unaugmented

CLAIM = "1.64x to 106.7x; client 2.86x to 32.1x"
CLAIMS_OF_CLIENTS = {5: "11.9x", 10: "11.3x"}
SEVERAL = ("smoke", "cpu60", "full")
AUGMENTED = ("cpu60", "cpu", "full")


def plain(epochs: int) -> Method:
    """Plain split learning in 32 bits."""
    return Method.of(Always(), "fp32")


def paper(epochs: int) -> Method:
    """Five A and five B epochs, evenly spread, in 8 bits: in 200 epochs the 106.7x of the paper's way of counting."""
    return Method.of(Periodic(period=max(2, epochs // 5)), "fp8")


def fixed(schedule: Schedule, codec: str) -> Callable[[int], Method]:
    """A method that does not depend on the number of epochs."""
    return lambda epochs: Method.of(schedule, codec)


PLAIN = Row("plain", "plain split learning, 32 bits", plain, seeds=3)
PAPER = Row("paper", "5 A + 5 B, 8 bits", paper, seeds=3, claim="106.7x at most; client 32.1x at most")
ALWAYS_4 = Row("always4", "always, 4 bits", fixed(Always(), FOUR_BITS))
BEST = {name: Row(name, *of, seeds=3 if name != "few100" else 1, claim=CLAIM) for name, of in FEW.items()}
LOSS_BASED = [
    Row(f"{kind.__name__.lower()}{limit}", f"{kind.__name__.lower()}({limit}), 8 bits", rule, claim=CLAIM)
    for kind in (Drop, Drift)
    for limit in (0.02, 0.1)
    for rule in [fixed(kind(threshold=limit), "fp8")]
]


def in_case(row: Row, case: str, about: str = "", **changes: Any) -> Row:
    """A row in another case, such as another network, beside plain split learning in the same case.

    Args:
        case: before the row's name.
        about: before its title.
        changes: what the case is, by the attributes of a `Row`.
    """
    title = f"{about}: {row.title}" if about else row.title
    return replace(row, name=f"{case}-{row.name}", title=title, against=f"{case}-plain", **changes)


def of_network(network: str) -> list[Row]:
    """Plain, the paper's, and the best at 250x, of another network."""
    return [in_case(row, network, network=network, seeds=1) for row in (PLAIN, PAPER, BEST["few250"])]


def of_clients(clients: int, partition: str, strategy: str) -> list[Row]:
    """Plain, and the paper's method, of several clients."""
    made = make_strategy(strategy)

    def together(method: Callable[[int], Method]) -> Callable[[int], Method]:
        return lambda epochs: replace(method(epochs), fleet=Fleet(strategy=made))

    return [
        in_case(
            row,
            f"{clients}-{partition.partition(':')[0]}-{strategy}",
            f"{clients} clients, {partition}, {strategy}",
            method=together(row.method),
            clients=clients,
            partition=partition,
            seeds=1,
            claim=CLAIMS_OF_CLIENTS[clients] if row is PAPER else "",
            presets=SEVERAL,
        )
        for row in (PLAIN, PAPER, BEST["few250"])
    ]


UNAUGMENTED = [
    in_case(row, "noaug", "no augmentation", trained=unaugmented, presets=AUGMENTED)
    for row in (PLAIN, PAPER, Row("few", "settle, 4 A + 1 B, 4 bits", lambda epochs: settled_once(4, epochs), seeds=3))
]
"""What the paper says of augmentation is not known, and stored activations bear it badly."""


def _moved_by_client(training: Training) -> Training:
    """The client mirrors images and moves them by up to a pixel, less than the stride; the server crops by strides."""
    return replace(training, augment=CropFlip(padding=1))


def _padded(name: str, both: int, activations: int) -> Row:
    """Padded views: after a shallow cut every B epoch brings 25 crops of each image."""
    title = f"settle, {both} A + {activations} B at once, 4 bits, {activations} padded views"
    method = partial(gathered, both, activations)
    return Row(name, title, method, seeds=3, claim=CLAIM, changes={"padding": 4}, trained=_moved_by_client)


def _of_halves(case: str, about: str, changes: Mapping[str, Any]) -> list[Row]:
    """Plain, the paper's, and padded views, of other halves."""
    rows = PLAIN, PAPER, _padded("pad500", 2, 4), _padded("pad250", 4, 8)
    return [in_case(row, case, about, presets=AUGMENTED, changes={**row.changes, **changes}) for row in rows]


SHALLOW = [
    *_of_halves("shallow", "cut after layer2", {"cut": "layer2"}),
    *_of_halves("wide", "cut after layer2, client half of full width", {"cut": "layer2", "client_width": 1.0}),
]

GROUPS: Sequence[Sequence[Row]] = [
    [PLAIN, PAPER, BEST["few250"], BEST["few500"]],
    SHALLOW,
    UNAUGMENTED,
    [ALWAYS_4, BEST["few100"], *LOSS_BASED],
    [*of_network("vgg13"), *of_network("resnet18")],
    [
        row
        for clients in (5, 10)
        for partition in ("iid", "dirichlet:0.5")
        for strategy in ("splitfed_v2", "parallel")
        for row in of_clients(clients, partition, strategy)
    ],
]
