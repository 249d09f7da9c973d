"""Where the points of accuracy go that few exchanges cost: one cause after the other, on all of CIFAR-10.

    python experiments/few_exchanges/cifar10.py              # VGG11 at a quarter of its width, 24 epochs, one seed
    python experiments/few_exchanges/cifar10.py --table      # the table of what is there

Writes results/cifar10.jsonl (a line for each run) and results/cifar10.md. Runs that are in the file are not run again,
and one that was ended goes on. A run takes 7 to 14 minutes of an idle core; CIFAR-10 is expected where CUTLAYER_DATA
points.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from cutlayer import Always, Fixed, Method, Settle, Training
from cutlayer.data.augment import CropFlip
from cutlayer.regularize import Regularize
from cutlayer.runs.client_half import Untrained
from cutlayer.studies import Study, add_options, carry_out
from cutlayer.studies.figures import figures
from cutlayer.studies.presets import PRESETS
from cutlayer.studies.rows import Plan, Row

RESULTS = Path(__file__).parent / "results"
SHORT, FOUR_BITS = PRESETS["cpu60"], "int4+zstd"
PRESET = replace(
    SHORT,
    name="cpu24",
    training=replace(SHORT.training, epochs=24, evaluate_every=4),
    networks={
        "vgg11": SHORT.networks["vgg11"],
        "padded": replace(SHORT.networks["vgg11"], padding=4),
        "shallow": replace(SHORT.networks["vgg11"], cut="layer2"),
    },
    seeds=1,
)


def of(method: Method) -> Callable[[int], Method]:
    """A method whatever the number of epochs."""
    return lambda epochs: method


def stands_still(both: int, codec: str = "fp32") -> Callable[[int], Method]:
    """A client half that is trained for so many epochs, then fresh activations in every epoch."""
    return lambda epochs: Method.of(Fixed(exchanges="A" * both + "B" * (epochs - both), settles=both), codec)


def few(both: int, activations: int, views: int) -> Callable[[int], Method]:
    """So many A and B epochs, 4 bits, and so many views."""
    return of(Method.of(Settle(both=both, activations=activations), FOUR_BITS, views=views))


def flipped(training: Training) -> Training:
    """The client mirrors; the server crops."""
    return replace(training, augment=CropFlip(padding=0))


def mixed(training: Training) -> Training:
    """The server mixes what it trains on."""
    return replace(training, regularize=Regularize(cutmix=1.0))


FEW = "3 A + 5 B, 4 bits"
ROWS = [
    Row("plain", "plain split learning, 32 bits", of(Method())),
    Row("still", "client half stands still after 3 A; fresh activations in every epoch, 32 bits", stands_still(3)),
    Row("few", f"{FEW}, 6 views", few(3, 5, 6)),
    Row("one-view", f"{FEW}, 1 view", few(3, 5, 1)),
    Row("cutmix", f"{FEW}, 6 views, CutMix", few(3, 5, 6), trained=mixed),
    Row("padded", "2 A + 3 B, 4 bits, padded by 4, 3 views", few(2, 3, 3), network="padded", trained=flipped),
    Row("still-4-bits", "as the second row, 4 bits", stands_still(3, FOUR_BITS)),
    Row("always-4-bits", "every epoch exchanges, 4 bits", of(Method.of(Always(), FOUR_BITS))),
    Row("still-6", "client half stands still after 6 A; fresh activations, 32 bits", stands_still(6)),
    Row("random", "client half as it was drawn; fresh activations, 32 bits", stands_still(1), client_half=Untrained()),
    Row("still-shallow", "as the second row, cut after layer2", stands_still(3), network="shallow"),
]


def table(study: Study, plan: Plan) -> str:
    """What is there, as Markdown."""
    found = {row.name: next(iter(study.outcomes([plan.config(row, 0)])), None) for row in ROWS}
    plain = found["plain"]
    lines = [
        "| | test accuracy, % | against plain | training loss at the end | A / B / C | activations and gradients "
        "| client FLOPs |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        outcome = found[row.name]
        if outcome is None or plain is None:
            continue
        letters = " / ".join(str(outcome["exchanges"].count(letter)) for letter in "ABC")
        lines.append(
            f"| {row.title} | {100 * outcome['accuracy']:.2f} | {100 * (outcome['accuracy'] - plain['accuracy']):+.2f} "
            f"| {outcome['loss']:.3f} | {letters} | {plain['exchanged_bytes'] / outcome['exchanged_bytes']:.1f}x less "
            f"| {plain['client_flops'] / outcome['client_flops']:.1f}x less |"
        )
    where = next(outcome["environment"] for outcome in found.values() if outcome is not None)
    about = (
        "`python experiments/few_exchanges/cifar10.py`: VGG11 at a quarter of its width, cut after layer4 if not said "
        f"otherwise, all of CIFAR-10 with crops and flips, {PRESET.training.epochs} epochs, bf16, one seed. torch "
        f"{where['torch']}, {where['processor']}, one thread a run. Accuracy is over the wire, through the codec. "
        "Reductions are against the first row; they grow with a run's epochs.\n"
    )
    return about + "\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="runs/studies", help="where the run folders are, while they are needed")
    add_options(parser)
    asked = parser.parse_args()
    plan = Plan(PRESET, [ROWS])
    configs = [config for _, config in plan.runs()]
    study = Study(RESULTS / "cifar10.jsonl", configs, partial(figures, preset=PRESET.name), Path(asked.runs))
    carry_out(study, asked, lambda: (RESULTS / "cifar10.md").write_text(table(study, plan), encoding="utf-8"))


if __name__ == "__main__":
    main()
