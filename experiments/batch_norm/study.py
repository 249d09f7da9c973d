"""Batch norm in B epochs: its three ways beside plain split learning, for one client and ten, digits and CIFAR-10.

    python experiments/batch_norm/study.py digits                                 # half an hour on one quiet core
    CUTLAYER_DATA=<folder with CIFAR-10> python experiments/batch_norm/study.py cifar10   # an hour on one quiet core
    python experiments/batch_norm/study.py digits --table                         # the table of what is there

Digits: the recipe (drop(0.05), 8 bits) over 50 epochs. CIFAR-10: narrow VGG11 on 2,000 images, drop(0.1) and
periodic(5), 8 bits. Writes results/NAME.jsonl (a line for each run) and results/NAME.md (the table made of it). Runs
that are in the file already are not run again; delete the file to start afresh. Seeds come one after the other.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from cutlayer import RunConfig, with_choices
from cutlayer.runs.fit import Result
from cutlayer.runs.recipes import cifar10_small, digits
from cutlayer.strategies import STRATEGIES
from cutlayer.studies import Outcome, Study, add_options, carry_out

RESULTS = Path(__file__).parent / "results"
SEEDS = 3
WAYS = ("plain", "train", "eval", "calibrated")
DIVISIONS = ("iid", "dirichlet:0.5")


def bases(study: str) -> dict[str, RunConfig]:
    """The settings of a study by what the table calls them, before a way and a seed are chosen."""
    if study == "digits":
        one = with_choices(digits(), threads=1, epochs=50, evaluate_every=50)
        rows = {"1 client": one, "1 client, 200 samples": with_choices(one, train_samples=200)}
        strategies = tuple(STRATEGIES)
        ten = with_choices(one, clients=10)
    else:
        one = with_choices(
            cifar10_small(),
            threads=1,
            train_samples=2000,
            test_samples=2000,
            epochs=30,
            evaluate_every=30,
            threshold=0.1,
        )
        rows = {"1 client": one, "1 client, periodic(5)": with_choices(one, schedule="periodic", period=5)}
        strategies = ("splitfed_v2", "parallel")
        ten = with_choices(one, clients=10, width=0.125, batch_size=32, epochs=15, evaluate_every=15)
    for strategy in strategies:
        for division in DIVISIONS:
            batch_size = ten.training.batch_size if strategy != "parallel" else max(2, ten.training.batch_size // 10)
            rows[f"10 clients, {strategy}, {division}"] = with_choices(
                ten,
                strategy=strategy,
                partition=division,
                batch_size=batch_size,
            )
    return rows


def chosen(base: RunConfig, way: str, seed: int) -> RunConfig:
    """One run. Plain split learning has no B epochs."""
    if way == "plain":
        return with_choices(base, seed=seed, schedule="always", codec="fp32")
    return with_choices(base, seed=seed, norm_in_b=way)


def measure(config: RunConfig, result: Result) -> dict:
    """What a run gave."""
    history = result.history
    return {
        "accuracy": history.test("accuracy"),
        "test_loss": history.test("loss"),
        "exchanges": history.exchanges,
        "exchanged": history.bytes(kinds=("activations", "gradients")),
        "all": history.bytes(),
        "client_flops": history.flops("client"),
        "seconds": round(history.seconds, 1),
    }


def study(name: str) -> Study:
    """All runs, seed by seed. Two schedules for the same clients share one plain run, as it obeys neither."""
    rows = bases(name).values()
    configs: list[RunConfig] = []
    for config in (chosen(base, way, seed) for seed in range(SEEDS) for base in rows for way in WAYS):
        if config not in configs:
            configs.append(config)
    return Study(RESULTS / f"{name}.jsonl", configs, measure)


def table(name: str, runs: Study) -> str:
    """The study as Markdown: mean and sample standard deviation of the accuracy over the seeds."""
    where = runs.outcomes()[0]["environment"]
    text = [
        f"`python experiments/batch_norm/study.py {name}`: test accuracy in % at the end of the run, mean ± sample "
        f"standard deviation over n seeds. torch {where['torch']}, {where['processor']}, one thread. *plain* is split "
        "learning in 32 bits, both ways in every epoch; the others are the method with this `norm_in_b`. *FLOPs* is "
        "the clients' compute, plain over method, with `eval` and with `calibrated`.",
        "",
        f"| setting | n | {' | '.join(WAYS)} | epochs A B C | FLOPs |",
        "|---|---|" + "---|" * (len(WAYS) + 2),
    ]
    for row, base in bases(name).items():
        ways = {way: runs.outcomes(chosen(base, way, seed) for seed in range(SEEDS)) for way in WAYS}
        if not all(ways.values()):
            continue
        cells = [accuracy(found) for found in ways.values()]
        states = " ".join(f"{mean(ways['calibrated'], state):.1f}" for state in "ABC")
        flops = ", ".join(f"{ratio(ways['plain'], ways[way]):.2f}x" for way in ("eval", "calibrated"))
        text.append(f"| {row} | {min(map(len, ways.values()))} | {' | '.join(cells)} | {states} | {flops} |")
    return "\n".join(text) + "\n"


def accuracy(lines: list[Outcome]) -> str:
    """Mean and spread, in %."""
    scores = [100 * line["accuracy"] for line in lines]
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.1f}{spread}"


def mean(lines: list[Outcome], state: str) -> float:
    """Epochs with this exchange."""
    return statistics.mean(line["exchanges"].count(state) for line in lines)


def ratio(plain: list[Outcome], method: list[Outcome]) -> float:
    """The clients' FLOPs, plain over method."""
    return statistics.mean(line["client_flops"] for line in plain) / statistics.mean(
        line["client_flops"] for line in method
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("digits", "cifar10"))
    add_options(parser)
    asked = parser.parse_args()
    runs = study(asked.study)
    carry_out(runs, asked, lambda: (RESULTS / f"{asked.study}.md").write_text(table(asked.study, runs)))


if __name__ == "__main__":
    main()
