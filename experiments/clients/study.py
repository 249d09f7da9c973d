"""Several clients: every strategy, plain and with the method, for equal and unequal data.

    CUTLAYER_DATA=<folder with CIFAR-10> python experiments/clients/study.py           # about an hour on one quiet core
    CUTLAYER_DATA=<folder with CIFAR-10> python experiments/clients/study.py --table   # the table of what is there

A narrow VGG11 on 2,000 images of CIFAR-10, divided among 1, 5 and 10 clients, evenly (IID) or by Dirichlet(0.5). Plain
is split learning in 32 bits, both ways in every epoch; the method is drop(0.1) in 8 bits. The threshold was chosen on
one client with seed 0 (which is among the seeds), before any run with several clients.

Writes results/cifar10.jsonl (a line for each run) and results/cifar10.md (the table made of it). Runs that are in the
file already are not run again, so it can be interrupted; delete the file to start afresh. Seeds come one after the
other, so that an interrupted study has whole seeds.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from cutlayer import DataConfig, ModelConfig, RunConfig, Training, with_choices
from cutlayer.runs.fit import Result
from cutlayer.strategies import STRATEGIES
from cutlayer.studies import Outcome, Study, add_options, carry_out

RESULTS = Path(__file__).parent / "results"
SEEDS = 3
THRESHOLD = 0.1
METHODS = {
    "plain": {"schedule": "always", "codec": "fp32"},
    "method": {"schedule": "drop", "threshold": THRESHOLD, "codec": "fp8"},
}


def config(clients: int, partition: str, strategy: str, method: str, seed: int) -> RunConfig:
    """One run. The parts of a step of parallel split learning make one batch of 30; elsewhere a batch has 32."""
    batch_size = 30 // clients if strategy == "parallel" and clients > 1 else 32
    base = RunConfig(
        DataConfig("cifar10", train_samples=2000, test_samples=1000),
        ModelConfig("vgg11", width=0.125, cut="layer4"),
        training=Training(epochs=15, batch_size=batch_size, seed=seed),
        clients=clients,
        partition=partition,
        threads=1,
    )
    return with_choices(base, strategy=strategy, **METHODS[method])


def settings() -> list[tuple[int, str, str]]:
    """(clients, partition, strategy) of all rows."""
    rows = [
        (clients, partition, strategy)
        for clients in (5, 10)
        for partition in ("iid", "dirichlet:0.5")
        for strategy in STRATEGIES
    ]
    return [(1, "iid", "splitfed_v2"), *rows]


def measure(chosen: RunConfig, result: Result) -> dict:
    """What a run gave."""
    history = result.history
    return {
        "accuracy": history.test("accuracy"),
        "exchanges": history.exchanges,
        "exchanged": history.bytes(kinds=("activations", "gradients")),
        "weights": history.bytes(kinds=("weights",)),
        "all": history.bytes(),
        "client_flops": history.flops("client"),
        "seconds": round(history.seconds, 1),
    }


def study() -> Study:
    """All runs, seed by seed."""
    configs = [config(*row, method, seed) for seed in range(SEEDS) for row in settings() for method in METHODS]
    return Study(RESULTS / "cifar10.jsonl", configs, measure)


def table(runs: Study) -> str:
    """The study as Markdown: means over the seeds, and the sample standard deviation of the accuracy."""
    about, where = runs.configs[0], runs.outcomes()[0]["environment"]
    text = [
        f"`python experiments/clients/study.py`: {about.model.name} of width {about.model.width} on "
        f"{about.data.train_samples} images of CIFAR-10 in all, cut after {about.model.cut}, {about.training.epochs} "
        f"epochs, {about.data.test_samples} test images; the method is drop({THRESHOLD}) in 8 bits. torch "
        f"{where['torch']}, {where['processor']}, one thread.",
        "",
        "Accuracy: mean ± sample standard deviation over the seeds, in %, at the end. *Traffic* is that of activations "
        "and gradients, plain over method, as the paper counts it; *all bytes* and *MiB* count all bytes of training: "
        "weights of client halves, labels, ids and headers, too. *FLOPs* is the clients' compute, plain over method.",
        "",
        "| clients | data | strategy | n | plain, % | method, % | plain, MiB | method, MiB | traffic | all bytes "
        "| FLOPs | epochs A B C |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for clients, partition, strategy in settings():
        wanted = [[config(clients, partition, strategy, method, seed) for seed in range(SEEDS)] for method in METHODS]
        both = [runs.outcomes(configs) for configs in wanted]
        if all(both):
            text.append(row(clients, partition, strategy if clients > 1 else "-", *both))
    return "\n".join(text) + "\n"


def row(clients: int, partition: str, strategy: str, plain: list[Outcome], method: list[Outcome]) -> str:
    """A line of the table."""

    def accuracy(lines: list[Outcome]) -> str:
        scores = [100 * line["accuracy"] for line in lines]
        spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        return f"{statistics.mean(scores):.1f}{spread}"

    def mean(lines: list[Outcome], *names: str) -> float:
        return statistics.mean(sum(line[name] for name in names) for line in lines)

    def times(*names: str) -> str:
        return f"{mean(plain, *names) / mean(method, *names):.1f}x"

    epochs = " ".join(f"{statistics.mean(line['exchanges'].count(x) for line in method):.1f}" for x in "ABC")
    cells = [
        str(clients),
        partition,
        strategy,
        str(min(len(plain), len(method))),
        accuracy(plain),
        accuracy(method),
        f"{mean(plain, 'all') / 2**20:.0f}",
        f"{mean(method, 'all') / 2**20:.1f}",
        times("exchanged"),
        times("all"),
        times("client_flops"),
        epochs,
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    asked, runs = parser.parse_args(), study()
    carry_out(runs, asked, lambda: (RESULTS / "cifar10.md").write_text(table(runs)))


if __name__ == "__main__":
    main()
