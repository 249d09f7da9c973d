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
import dataclasses
import json
import statistics
from pathlib import Path

import torch

from cutlayer.records.environment import environment
from cutlayer.runs.config import Config
from cutlayer.runs.fit import fit
from cutlayer.runs.recipes import cifar10_small, digits
from cutlayer.strategies import STRATEGIES

RESULTS = Path(__file__).parent / "results"
SEEDS = 3
WAYS = ("plain", "train", "eval", "calibrated")
DIVISIONS = ("iid", "dirichlet:0.5")


def bases(study: str) -> dict[str, Config]:
    """The settings of a study by what the table calls them, before a way and a seed are chosen."""
    if study == "digits":
        one = dataclasses.replace(digits(), threads=1, epochs=50, evaluate_every=50)
        rows = {"1 client": one, "1 client, 200 samples": dataclasses.replace(one, train_samples=200)}
        modes = tuple(STRATEGIES)
        ten = dataclasses.replace(one, clients=10)
    else:
        one = dataclasses.replace(
            cifar10_small(),
            threads=1,
            train_samples=2000,
            test_samples=2000,
            epochs=30,
            evaluate_every=30,
            threshold=0.1,
        )
        rows = {"1 client": one, "1 client, periodic(5)": dataclasses.replace(one, schedule="periodic", period=5)}
        modes = ("splitfed_v2", "parallel")
        ten = dataclasses.replace(one, clients=10, width=0.125, batch_size=32, epochs=15, evaluate_every=15)
    for mode in modes:
        for division in DIVISIONS:
            batch_size = ten.batch_size if mode != "parallel" else max(2, ten.batch_size // 10)
            rows[f"10 clients, {mode}, {division}"] = dataclasses.replace(
                ten,
                mode=mode,  # type: ignore[arg-type]
                partition=division,
                batch_size=batch_size,
            )
    return rows


def chosen(base: Config, way: str, seed: int) -> Config:
    """One run. Plain split learning has no B epochs."""
    if way == "plain":
        return dataclasses.replace(base, seed=seed, schedule="always", codec="fp32")
    return dataclasses.replace(base, seed=seed, norm_in_b=way)  # type: ignore[arg-type]


def run(config: Config) -> dict:
    """Carry out one config and say what it gave."""
    torch.set_num_threads(1)
    train, test = config.datasets()
    parts, _ = config.divided(train)
    history = fit(config.halves(train), parts, test, method=config.method(), training=config.training()).history
    return {
        "accuracy": history.test("accuracy"),
        "test_loss": history.test("loss"),
        "exchanges": history.exchanges,
        "exchanged": history.bytes(kinds=("activations", "gradients")),
        "all": history.bytes(),
        "client_flops": history.flops("client"),
        "seconds": round(history.seconds, 1),
        "config": config.as_dict(),
        "environment": environment(),
    }


def table(study: str, lines: list[dict]) -> str:
    """The study as Markdown: mean and sample standard deviation of the accuracy over the seeds."""
    where = lines[0]["environment"]
    text = [
        f"`python experiments/batch_norm/study.py {study}`: test accuracy in % at the end of the run, mean ± sample "
        f"standard deviation over n seeds. torch {where['torch']}, {where['processor']}, one thread. *plain* is split "
        "learning in 32 bits, both ways in every epoch; the others are the method with this `norm_in_b`. *FLOPs* is "
        "the clients' compute, plain over method, with `eval` and with `calibrated`.",
        "",
        f"| setting | n | {' | '.join(WAYS)} | epochs A B C | FLOPs |",
        "|---|---|" + "---|" * (len(WAYS) + 2),
    ]
    known = [(Config.from_dict(line["config"]), line) for line in lines]
    for name, base in bases(study).items():
        ways = {
            way: [line for config, line in known if config in [chosen(base, way, seed) for seed in range(SEEDS)]]
            for way in WAYS
        }
        if not all(ways.values()):
            continue
        cells = [accuracy(found) for found in ways.values()]
        states = " ".join(f"{mean(ways['calibrated'], state):.1f}" for state in "ABC")
        flops = ", ".join(f"{ratio(ways['plain'], ways[way]):.2f}x" for way in ("eval", "calibrated"))
        text.append(f"| {name} | {min(map(len, ways.values()))} | {' | '.join(cells)} | {states} | {flops} |")
    return "\n".join(text) + "\n"


def accuracy(lines: list[dict]) -> str:
    """Mean and spread, in %."""
    scores = [100 * line["accuracy"] for line in lines]
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.1f}{spread}"


def mean(lines: list[dict], state: str) -> float:
    """Epochs with this exchange."""
    return statistics.mean(line["exchanges"].count(state) for line in lines)


def ratio(plain: list[dict], method: list[dict]) -> float:
    """The clients' FLOPs, plain over method."""
    return statistics.mean(line["client_flops"] for line in plain) / statistics.mean(
        line["client_flops"] for line in method
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("digits", "cifar10"))
    parser.add_argument("--table", action="store_true", help="only write the table of the runs that are there")
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{arguments.study}.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    known = [Config.from_dict(line["config"]) for line in lines]
    todo = [
        chosen(base, way, seed) for seed in range(SEEDS) for base in bases(arguments.study).values() for way in WAYS
    ]
    for config in [] if arguments.table else todo:
        if config in known:
            continue
        lines.append(run(config))
        with file.open("a") as out:
            out.write(json.dumps(lines[-1]) + "\n")
        print(f"{config.mode} {config.partition} {config.norm_in_b} {config.seed}: {lines[-1]['accuracy']:.4f}")
        (RESULTS / f"{arguments.study}.md").write_text(table(arguments.study, lines))
    if lines:
        (RESULTS / f"{arguments.study}.md").write_text(table(arguments.study, lines))


if __name__ == "__main__":
    main()
