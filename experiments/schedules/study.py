"""When to communicate: every schedule, three seeds, 32 and 8 bits; accuracy and bytes of each.

    python experiments/schedules/study.py digits     # 100 epochs each, about 15 minutes on one core
    python experiments/schedules/study.py cifar10    # narrow VGG11 on 10,000 images, one seed; hours on one core

Writes results/NAME.jsonl (a line for each run) and results/NAME.md (the table made of it). Runs that are in the file
already are not run again, so it can be interrupted; delete the file to start afresh.
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

RESULTS = Path(__file__).parent / "results"


def grid(base: Config, thresholds: tuple[float, ...], periods: tuple[int, ...]) -> list[Config]:
    """Plain split learning first, then every schedule."""
    settings: list[dict] = [{"schedule": "always"}]
    settings += [{"schedule": name, "threshold": t} for name in ("drift", "drop", "plateau") for t in thresholds]
    settings += [{"schedule": "periodic", "period": period} for period in periods]
    return [dataclasses.replace(base, **values) for values in settings]


def studies() -> dict[str, list[Config]]:
    """The runs of each study."""
    small = dataclasses.replace(digits(), threads=1)
    first = [
        dataclasses.replace(config, codec=codec, seed=seed)
        for codec in ("fp32", "fp8")
        for config in grid(small, (0.2, 0.05, 0.01), (5, 20))
        for seed in range(3)
    ]
    vgg = dataclasses.replace(cifar10_small(), threads=1, evaluate_every=5, threshold=0.05)
    settings: list[dict] = [
        {"schedule": "always", "codec": "fp32"},
        {"schedule": "drop", "threshold": 0.05, "codec": "fp8"},
        {"schedule": "drop", "threshold": 0.01, "codec": "fp8"},
        {"schedule": "drift", "threshold": 0.05, "codec": "fp8"},
    ]
    return {
        "digits": first,
        "cifar10": [dataclasses.replace(vgg, **values) for values in settings],
    }


def key(config: Config) -> str:
    """What tells the runs of a study apart."""
    parameter = {"always": "", "periodic": f"({config.period})"}.get(config.schedule, f"({config.threshold})")
    return f"{config.schedule}{parameter} {config.codec}"


def run(config: Config) -> dict:
    """Carry out one config and say what it gave."""
    torch.set_num_threads(config.threads or 1)
    train, test = config.datasets()
    history = fit(config.halves(train), train, test, method=config.method(), training=config.training()).history
    return {
        "key": key(config),
        "seed": config.seed,
        "accuracy": history.test("accuracy"),
        "test_loss": history.test("loss"),
        "exchanges": history.exchanges,
        "bytes_up": history.bytes("up"),
        "bytes_down": history.bytes("down"),
        "traffic_reduction": history.traffic_reduction,
        "client_flops_reduction": history.client_flops_reduction,
        "seconds": round(history.seconds, 1),
        "config": config.as_dict(),
        "environment": environment(),
    }


def table(name: str, lines: list[dict]) -> str:
    """The study as a Markdown table: mean and sample standard deviation over the seeds."""
    rows = [
        "| schedule and codec | runs | test accuracy, % | epochs A / B / C | MB up + down | traffic | all bytes "
        "| client FLOPs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    plain = [line["bytes_up"] + line["bytes_down"] for line in lines if line["key"] == "always fp32"]
    for which in dict.fromkeys(line["key"] for line in lines):
        same = [line for line in lines if line["key"] == which]

        def mean(field: str, same: list[dict] = same) -> float:
            return statistics.mean(line[field] for line in same)

        spread = statistics.stdev(100 * line["accuracy"] for line in same) if len(same) > 1 else None
        states = " / ".join(f"{statistics.mean(line['exchanges'].count(s) for line in same):.3g}" for s in "ABC")
        totals = [line["bytes_up"] + line["bytes_down"] for line in same]
        reduced = f"{statistics.mean(statistics.mean(plain) / total for total in totals):.2f}x" if plain else ""
        rows.append(
            f"| {which} | {len(same)} | {100 * mean('accuracy'):.2f}{'' if spread is None else f' ± {spread:.2f}'} "
            f"| {states} | {statistics.mean(totals) / 1e6:.1f} | {mean('traffic_reduction'):.2f}x | {reduced} "
            f"| {mean('client_flops_reduction'):.2f}x |"
        )
    config, where = lines[0]["config"], lines[0]["environment"]
    about = (
        f"`python experiments/schedules/study.py {name}`: {config['model']} of width {config['width']}, cut after "
        f"{config['cut']}, {config['epochs']} epochs, batch {config['batch_size']}, "
        f"{config['train_samples'] or 'all'} training samples. torch {where['torch']}, {where['processor']}, one "
        "thread. ± is the sample standard deviation over the seeds. Bytes are all of training; reductions are relative "
        "to plain split learning in 32 bits, *traffic* counting activations and gradients, *all bytes* labels, ids and "
        "headers, too.\n"
    )
    return about + "\n" + "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=studies())
    name = parser.parse_args().study
    file = RESULTS / f"{name}.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    # A field that a config has gained since then had its default.
    known = [Config.from_dict(line["config"]) for line in lines]
    for config in studies()[name]:
        if config not in known:
            lines.append(run(config))
            with file.open("a") as out:
                out.write(json.dumps(lines[-1]) + "\n")
            about = lines[-1]
            print(f"{about['key']} seed {about['seed']}: {about['accuracy']:.4f}, {about['traffic_reduction']:.2f}x")
        (RESULTS / f"{name}.md").write_text(table(name, lines))


if __name__ == "__main__":
    main()
