"""What each codec costs in accuracy: a narrow VGG11 on real CIFAR-10, every codec in both directions.

    CUTLAYER_DATA=<folder with CIFAR-10> python experiments/codecs/study.py          # an hour on one quiet core
    CUTLAYER_DATA=<folder with CIFAR-10> python experiments/codecs/study.py ARM ...  # only these, with seed 0
    CUTLAYER_DATA=<folder with CIFAR-10> python experiments/codecs/study.py --best   # seeds 1 and 2 of the best so far

Plain split learning (every epoch exchanges both ways), so only the codecs differ. Every arm carries `+zstd`, which
changes no value. First every arm with seed 0; then seeds 1 and 2 for 32 bits and for the best: of the arms that lose
no more than 3 points of accuracy (mean of the last three epochs), those that no other beats in both accuracy and
bytes, and of these the four with the fewest bytes.

Writes results/cifar10.jsonl (a line for each run) and results/cifar10.md (the table made of it). Runs that are in the
file already are not run again, so it can be interrupted; delete the file to start afresh.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from cutlayer.codecs import get_pair
from cutlayer.codecs.base import numel
from cutlayer.records.environment import environment
from cutlayer.runs.config import Config
from cutlayer.runs.fit import fit

RESULTS = Path(__file__).parent / "results"
LAST = 3  # epochs whose accuracy is averaged
LOSS, FRONT = 0.03, 4  # the rule for what is run with three seeds

PLAIN = "fp32"
ARMS = {
    "both directions, 32 to 8 bits": [
        PLAIN, "fp16", "bf16", "fp8", "fp8:channel", "fp8:stochastic", "hfp8", "mxfp8", "int8",
    ],
    "both directions, below 8 bits": [
        "mxfp6", "mxfp4", "mxfp4/mxfp4:stochastic", "nvfp4", "nvfp4/nvfp4:stochastic", "int4", "int4/fp8_e5m2",
        "int4/mxfp4:stochastic",
    ],
    "changes of activations": [
        "delta>mxfp4/mxfp4:stochastic", "delta0.3>mxfp4/mxfp4:stochastic", "delta>topk0.1>fp8_e4m3/mxfp4:stochastic",
        "delta0.3>mxfp4/topk0.1>fp8_e5m2",
    ],
    "error feedback": ["fp32/ef>topk0.1>fp8_e5m2", "mxfp4/ef>mxfp4"],
    "one direction, the other in 32 bits": [
        "mxfp4/fp32", "int4/fp32", "fp32/mxfp4", "fp32/int4", "topk0.1>fp8_e4m3/fp32", "randtopk0.1>fp8_e4m3/fp32",
        "fp32/topk0.1>fp8_e5m2",
    ],
    "sparse": ["mxfp4/topk0.1>fp8_e5m2", "topk0.1>fp8", "randtopk0.25>fp8_e4m3/fp8_e5m2"],
}  # fmt: skip


def config(arm: str, seed: int = 0) -> Config:
    """The run of an arm."""
    up, slash, down = arm.partition("/")
    lossless = arm if arm == PLAIN else f"{up}+zstd{slash}{down and f'{down}+zstd'}"
    return Config(
        data="cifar10",
        train_samples=4000,
        test_samples=2000,
        model="vgg11",
        width=0.25,
        cut="layer4",
        schedule="always",
        codec=lossless,
        epochs=15,
        batch_size=64,
        threads=1,
        seed=seed,
    )


def run(arm: str, chosen: Config) -> dict:
    """Carry out one config and say what it gave."""
    torch.set_num_threads(chosen.threads or 1)
    train, test = chosen.datasets()
    shape = tuple(chosen.halves(train).client(train.inputs[:2]).shape[1:])
    history = fit(chosen.halves(train), train, test, method=chosen.method(), training=chosen.training()).history
    values = history.baseline.exchanged_bytes / 8 * chosen.epochs  # of four bytes, in each direction
    sent = {kind: history.bytes(kinds=(kind,)) for kind in ("activations", "gradients")}
    return {
        "arm": arm,
        "seed": chosen.seed,
        "accuracies": [record.test["accuracy"] for record in history.epochs],
        "test_loss": history.test("loss"),
        "bytes": sent,
        "bits": {kind: 8 * size / values for kind, size in sent.items()},
        "format_bits": [8 * t.codec.layout(shape).row_bytes / numel(shape) for t in get_pair(arm)],
        "traffic_reduction": history.traffic_reduction,
        "seconds": round(history.seconds, 1),
        "config": chosen.as_dict(),
        "environment": environment(),
    }


def score(line: dict) -> float:
    """The accuracy that arms are judged by."""
    return statistics.mean(line["accuracies"][-LAST:])


def best(lines: list[dict]) -> list[str]:
    """The arms that deserve three seeds, by the rule above."""
    first = [line for line in lines if line["seed"] == 0]
    plain = next(score(line) for line in first if line["arm"] == PLAIN)

    def size(line: dict) -> int:
        return sum(line["bytes"].values())

    front = [
        line
        for line in first
        if score(line) >= plain - LOSS
        and not any(score(other) >= score(line) and size(other) < size(line) for other in first)
    ]
    names = [line["arm"] for line in sorted(front, key=size)[:FRONT]]
    return names if PLAIN in names else [PLAIN, *names]


def table(lines: list[dict]) -> str:
    """The study as Markdown: mean, and sample standard deviation over the seeds where there are several."""
    config, where = lines[0]["config"], lines[0]["environment"]
    text = [
        f"`python experiments/codecs/study.py`: {config['model']} of width {config['width']} on "
        f"{config['train_samples']} images of CIFAR-10, cut after {config['cut']}, {config['epochs']} epochs of plain "
        f"split learning, batch {config['batch_size']}, no augmentation, {config['test_samples']} test images. torch "
        f"{where['torch']}, {where['processor']}, one thread.",
        "",
        f"Accuracy is the mean of the last {LAST} epochs; ± is the sample standard deviation over the seeds. *Bits* "
        "are those of a value, as the format has it and, behind the arrow, as it crossed the wire with `+zstd` (scales "
        "included), mean over the run; *traffic* is relative to 32 bits both ways.",
    ]
    for title, arms in ARMS.items():
        text += ["", f"| {title} | runs | accuracy, % | last epoch, % | bits up | bits down | traffic |"]
        text += ["|---|---|---|---|---|---|---|"]
        text += [row(arm, same) for arm in arms if (same := [line for line in lines if line["arm"] == arm])]
    return "\n".join(text) + "\n"


def row(arm: str, same: list[dict]) -> str:
    """One arm's line of the table."""
    scores = [100 * score(line) for line in same]
    spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    last = statistics.mean(100 * line["accuracies"][-1] for line in same)
    bits = {kind: statistics.mean(line["bits"][kind] for line in same) for kind in same[0]["bits"]}
    written = zip(same[0]["format_bits"], bits.values(), strict=True)
    both = [f"{of_format:.3g} → {sent:.2f}" if arm != PLAIN else "32" for of_format, sent in written]
    traffic = statistics.mean(line["traffic_reduction"] for line in same)
    return (
        f"| {arm} | {len(same)} | {statistics.mean(scores):.2f}{spread} | {last:.2f} | {both[0]} | {both[1]} "
        f"| {traffic:.2f}x |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", help="some of those in ARMS")
    parser.add_argument("--best", action="store_true", help="only seeds 1 and 2, of the best so far")
    asked = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "cifar10.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def need(arm: str, seed: int) -> None:
        chosen = config(arm, seed)
        # A field that a config has gained since then had its default.
        if any(Config.from_dict(line["config"]) == chosen for line in lines):
            return
        lines.append(run(arm, chosen))
        with file.open("a") as out:
            out.write(json.dumps(lines[-1]) + "\n")
        (RESULTS / "cifar10.md").write_text(table(lines))
        print(f"{arm} seed {seed}: {score(lines[-1]):.4f}, {lines[-1]['traffic_reduction']:.2f}x", flush=True)

    everything = [] if asked.best else [arm for arms in ARMS.values() for arm in arms]
    for arm in asked.arms or everything:
        need(arm, 0)
    for seed in () if asked.arms else (1, 2):
        for arm in best(lines):
            need(arm, seed)
    (RESULTS / "cifar10.md").write_text(table(lines))


if __name__ == "__main__":
    main()
