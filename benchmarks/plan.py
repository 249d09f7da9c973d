"""What `cutlayer plan` predicts, against a run over an emulated link: seconds of every epoch, and bytes.

    sudo python benchmarks/plan.py        # a table on the terminal and in benchmarks/results/plan.md; some 10 minutes

Needs root, `ip` and `tc`, and Fashion-MNIST under CUTLAYER_DATA; see `link.py` for the link. The plan is made before
each run, with a timing in this process and one thread; the run has its two processes, the proxy and the link on the
same cores. Bytes are those of the ledger between processes, where clients tell the server of their FLOPs: a few bytes
an epoch that a plan, which is of one process, does not have.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
from pathlib import Path

import link
import torch

from cutlayer.method import Task
from cutlayer.planning.choice import plan_of
from cutlayer.planning.clock import Link
from cutlayer.planning.recipe import load_of
from cutlayer.records.environment import environment
from cutlayer.runs.choices import with_choices
from cutlayer.runs.recipes import RECIPES

CHOICES = {
    "width": 1.0,
    "test_samples": 1000,
    "threads": 1,
    "schedule": "periodic",
    "period": 3,
    "epochs": 8,
    "evaluate_every": 100,
    "train_samples": 2560,
}


def case(mbit: int, codec: str, cut: str) -> list[str]:
    """A row for each kind of epoch, and one for the whole run but for its first epoch."""
    choices = {**CHOICES, "codec": codec, "cut": cut}
    config = with_choices(RECIPES["fashion_mnist"](), **choices)
    load, _ = load_of(config)
    link_of = Link.parse(f"{mbit}Mbit/40ms")
    plan = plan_of(config.network(config.data.outline()), load, Task(), [cut], None, link_of)[cut]
    options = [part for name, value in choices.items() for part in (f"--{name.replace('_', '-')}", value)]
    folder, ends, _, _ = link.train(mbit, 900, recipe=["fashion_mnist", *options])
    times = [end for end, _ in ends.ends]
    measured = [after - before for before, after in itertools.pairwise(times)]
    records = folder.records()[1:]  # the first epoch has no beginning that is seen from outside
    rows = []
    for kind in "ABC":
        epochs = [n for n, record in enumerate(records[:-1]) if record.exchange == kind]
        got, expected = (
            statistics.median(seconds[n] for n in epochs) for seconds in (measured, plan.epoch_seconds[1:])
        )
        rows.append((kind, f"{len(epochs)}", got, expected))
    rows.append(("epochs 2 to 8", "1", sum(measured), sum(plan.epoch_seconds[1:])))
    ledger = folder.history().bytes()
    error = (plan.run_bytes["up"] + plan.run_bytes["down"]) / ledger - 1
    cells = (
        (what, n, f"{got:.3f}", f"{expected:.3f}", f"{expected / got - 1:+.0%}") for what, n, got, expected in rows
    )
    return [f"| {mbit} | {codec} | {cut} | {' | '.join(each)} | {error:+.4%} |" for each in cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", type=int, nargs="+", default=(20, 200), help="Mbit/s")
    parser.add_argument("--codecs", nargs="+", default=("fp32", "fp8"))
    parser.add_argument("--cuts", nargs="+", default=("layer3",))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "plan.md")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    about, load = environment(), os.getloadavg()[0]
    rows = []
    for mbit, codec, cut in itertools.product(chosen.rates, chosen.codecs, chosen.cuts):
        rows += case(mbit, codec, cut)
        print("\n".join(rows[-4:]), flush=True)
    lines = [
        "# What a plan predicts, and what a run takes",
        "",
        "Two namespaces, veth with `tbf`, 40 ms round trip by a proxy; mutual TLS. Small CNN on Fashion-MNIST, batch",
        f"128, {CHOICES['train_samples']} training and {CHOICES['test_samples']} test samples, epochs A B C A B C A B.",
        f"{about['processor']}, {about['cores']} cores for both sides, proxy and link; load average before {load:.1f},",
        f"after {os.getloadavg()[0]:.1f}.",
        "",
        "Seconds of an epoch are the median of so many, from the end of the one before to its own at the server, when",
        "its checkpoint is on the disk; B epochs that a C epoch follows end with test activations that are sent.",
        "*Bytes* compares the predicted bytes of training with the ledger's.",
        "",
        "| Mbit/s | codec | cut | epochs | n | measured, s | predicted, s | error | bytes |",
        "|---|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"Command: `{' '.join(['python benchmarks/plan.py', *sys.argv[1:]])}`",
        "",
    ]
    print("\n".join(lines))
    chosen.output.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
