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
import statistics
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from cutlayer import Always, DataConfig, Method, ModelConfig, RunConfig, Training
from cutlayer.codecs import get_pair
from cutlayer.codecs.base import numel
from cutlayer.runs.fit import Result
from cutlayer.studies import Outcome, Study, add_options, carry_out

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


def config(arm: str, seed: int = 0) -> RunConfig:
    """The run of an arm."""
    up, slash, down = arm.partition("/")
    lossless = arm if arm == PLAIN else f"{up}+zstd{slash}{down and f'{down}+zstd'}"
    return RunConfig(
        DataConfig("cifar10", train_samples=4000, test_samples=2000),
        ModelConfig("vgg11", width=0.25, cut="layer4"),
        Method.of(Always(), lossless),
        Training(epochs=15, batch_size=64, seed=seed),
        threads=1,
    )


def measure(arm_of: dict[tuple[str, str], str], chosen: RunConfig, result: Result) -> dict:
    """What a run gave."""
    arm = arm_of[chosen.method.activations, chosen.method.gradients]
    history, outline = result.history, chosen.data.outline()
    shape = tuple(result.halves.client(outline.inputs.new_zeros((1, *outline.inputs.shape[1:]))).shape[1:])
    values = history.baseline.exchanged_bytes / 8 * chosen.training.epochs  # of four bytes, in each direction
    sent = {kind: history.bytes(kinds=(kind,)) for kind in ("activations", "gradients")}
    return {
        "arm": arm,
        "seed": chosen.training.seed,
        "accuracies": [record.test["accuracy"] for record in history.epochs],
        "test_loss": history.test("loss"),
        "bytes": sent,
        "bits": {kind: 8 * size / values for kind, size in sent.items()},
        "format_bits": [8 * t.codec.layout(shape).row_bytes / numel(shape) for t in get_pair(arm)],
        "traffic_reduction": history.traffic_reduction,
        "seconds": round(history.seconds, 1),
    }


def study(arms: Iterable[str], seeds: Iterable[int]) -> Study:
    """These arms with these seeds."""
    every = [(arm, config(arm).method) for some in ARMS.values() for arm in some]
    arm_of = {(method.activations, method.gradients): arm for arm, method in every}
    configs = [config(arm, seed) for seed in seeds for arm in arms]
    return Study(RESULTS / "cifar10.jsonl", configs, partial(measure, arm_of))


def score(line: Outcome) -> float:
    """The accuracy that arms are judged by."""
    return statistics.mean(line["accuracies"][-LAST:])


def best(lines: list[Outcome]) -> list[str]:
    """The arms that deserve three seeds, by the rule above."""
    first = [line for line in lines if line["seed"] == 0]
    plain = next(score(line) for line in first if line["arm"] == PLAIN)

    def size(line: Outcome) -> int:
        return sum(line["bytes"].values())

    front = [
        line
        for line in first
        if score(line) >= plain - LOSS
        and not any(score(other) >= score(line) and size(other) < size(line) for other in first)
    ]
    names = [line["arm"] for line in sorted(front, key=size)[:FRONT]]
    return names if PLAIN in names else [PLAIN, *names]


def table(runs: Study) -> str:
    """The study as Markdown: mean, and sample standard deviation over the seeds where there are several."""
    lines, about = runs.outcomes(), config(PLAIN)
    where = lines[0]["environment"]
    text = [
        f"`python experiments/codecs/study.py`: {about.model.name} of width {about.model.width} on "
        f"{about.data.train_samples} images of CIFAR-10, cut after {about.model.cut}, {about.training.epochs} epochs "
        f"of plain split learning, batch {about.training.batch_size}, no augmentation, {about.data.test_samples} test "
        f"images. torch {where['torch']}, {where['processor']}, one thread.",
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


def row(arm: str, same: list[Outcome]) -> str:
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
    add_options(parser)
    asked = parser.parse_args()

    def carry_out_and_write(runs: Study) -> None:
        carry_out(runs, asked, lambda: (RESULTS / "cifar10.md").write_text(table(runs)))

    if not asked.best:
        carry_out_and_write(study(asked.arms or [arm for arms in ARMS.values() for arm in arms], [0]))
    if not asked.arms:
        carry_out_and_write(study(best(study([], []).outcomes()), (1, 2)))


if __name__ == "__main__":
    main()
