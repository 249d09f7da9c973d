"""Several clients: every mode, plain and with the method, for equal and unequal data.

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
import json
import statistics
from pathlib import Path

import torch

from cutlayer.records.environment import environment
from cutlayer.runs.config import Config
from cutlayer.runs.fit import fit
from cutlayer.strategies import STRATEGIES

RESULTS = Path(__file__).parent / "results"
SEEDS = 3
METHODS = {
    # Plain split learning has no B epochs, so norm_in_b changes nothing there; "train" finds the runs of before.
    "plain": {"schedule": "always", "codec": "fp32", "norm_in_b": "train"},
    "method": {"schedule": "drop", "codec": "fp8"},
}


def config(clients: int, partition: str, mode: str, method: str, seed: int) -> Config:
    """One run. The parts of a step of parallel split learning make one batch of 30; elsewhere a batch has 32."""
    return Config(
        data="cifar10",
        train_samples=2000,
        test_samples=1000,
        clients=clients,
        partition=partition,
        mode=mode,  # type: ignore[arg-type]
        model="vgg11",
        width=0.125,
        cut="layer4",
        threshold=0.1,
        batch_size=30 // clients if mode == "parallel" and clients > 1 else 32,
        epochs=15,
        threads=1,
        seed=seed,
        **METHODS[method],  # type: ignore[arg-type]
    )


def settings() -> list[tuple[int, str, str]]:
    """(clients, partition, mode) of all rows."""
    rows = [
        (clients, partition, mode)
        for clients in (5, 10)
        for partition in ("iid", "dirichlet:0.5")
        for mode in STRATEGIES
    ]
    return [(1, "iid", "splitfed_v2"), *rows]


def run(chosen: Config) -> dict:
    """Carry out one config and say what it gave."""
    torch.set_num_threads(1)
    train, test = chosen.datasets()
    parts, _ = chosen.divided(train)
    history = fit(chosen.halves(train), parts, test, method=chosen.method(), training=chosen.training()).history
    return {
        "accuracy": history.test("accuracy"),
        "exchanges": history.exchanges,
        "exchanged": history.bytes(kinds=("activations", "gradients")),
        "weights": history.bytes(kinds=("weights",)),
        "all": history.bytes(),
        "client_flops": history.flops("client"),
        "seconds": round(history.seconds, 1),
        "config": chosen.as_dict(),
        "environment": environment(),
    }


def table(lines: list[dict]) -> str:
    """The study as Markdown: means over the seeds, and the sample standard deviation of the accuracy."""
    about, where = lines[0]["config"], lines[0]["environment"]
    text = [
        f"`python experiments/clients/study.py`: {about['model']} of width {about['width']} on "
        f"{about['train_samples']} images of CIFAR-10 in all, cut after {about['cut']}, {about['epochs']} epochs, "
        f"{about['test_samples']} test images; the method is drop({about['threshold']}) in 8 bits. torch "
        f"{where['torch']}, {where['processor']}, one thread.",
        "",
        "Accuracy: mean ± sample standard deviation over the seeds, in %, at the end. *Traffic* is that of activations "
        "and gradients, plain over method, as the paper counts it; *all bytes* and *MiB* count all bytes of training: "
        "weights of client halves, labels, ids and headers, too. *FLOPs* is the clients' compute, plain over method.",
        "",
        "| clients | data | mode | n | plain, % | method, % | plain, MiB | method, MiB | traffic | all bytes "
        "| FLOPs | epochs A B C |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for clients, partition, mode in settings():
        wanted = [[config(clients, partition, mode, method, seed) for seed in range(SEEDS)] for method in METHODS]
        both = [[line for line in lines if Config.from_dict(line["config"]) in configs] for configs in wanted]
        if all(both):
            text.append(row(clients, partition, mode if clients > 1 else "-", *both))
    return "\n".join(text) + "\n"


def row(clients: int, partition: str, mode: str, plain: list[dict], method: list[dict]) -> str:
    """A line of the table."""

    def accuracy(lines: list[dict]) -> str:
        scores = [100 * line["accuracy"] for line in lines]
        spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        return f"{statistics.mean(scores):.1f}{spread}"

    def mean(lines: list[dict], *names: str) -> float:
        return statistics.mean(sum(line[name] for name in names) for line in lines)

    def times(*names: str) -> str:
        return f"{mean(plain, *names) / mean(method, *names):.1f}x"

    epochs = " ".join(f"{statistics.mean(line['exchanges'].count(x) for line in method):.1f}" for x in "ABC")
    cells = [
        str(clients),
        partition,
        mode,
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
    parser.add_argument("--table", action="store_true", help="only make the table of the runs that are there")
    only_table = parser.parse_args().table
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "cifar10.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for seed in range(SEEDS) if not only_table else ():
        for setting in settings():
            for method in METHODS:
                chosen = config(*setting, method, seed)
                # A field that a config has gained since then had its default.
                if any(Config.from_dict(line["config"]) == chosen for line in lines):
                    continue
                lines.append(run(chosen))
                with file.open("a") as out:
                    out.write(json.dumps(lines[-1]) + "\n")
                (RESULTS / "cifar10.md").write_text(table(lines))
                done = lines[-1]
                print(*setting, method, seed, done["accuracy"], done["exchanges"], done["seconds"], flush=True)
    (RESULTS / "cifar10.md").write_text(table(lines))


if __name__ == "__main__":
    main()
