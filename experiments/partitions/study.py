"""How uneven each partition of the digits is, over several seeds: prints the table of docs/partitions.md.

python experiments/partitions/study.py > experiments/partitions/results/digits.md
"""

from __future__ import annotations

import numpy as np

from cutlayer.data.datasets import load
from cutlayer.data.partition import make_partition
from cutlayer.report.partition import distances

SPECS = ("iid", "dirichlet:100", "dirichlet:1", "dirichlet:0.5", "dirichlet:0.1", "shards:2", "quantity:0.5")
CLIENTS, SEEDS = 10, 20


def main() -> None:
    labels = load("digits")[0].labels
    print(
        f"`python experiments/partitions/study.py`: {len(labels)} training images of the digits among {CLIENTS} "
        f"clients; median over {SEEDS} seeds, and their range. NumPy {np.__version__}.\n"
    )
    print("| partition | smallest client | largest client | classes of a client | mean total-variation distance |")
    print("|---|---|---|---|---|")
    for spec in SPECS:
        made = [make_partition(spec, labels, CLIENTS, seed) for seed in range(SEEDS)]
        counts = [partition.counts(labels) for partition in made]
        columns = (
            ([partition.sizes.min() for partition in made], "g"),
            ([partition.sizes.max() for partition in made], "g"),
            ([np.median((own > 0).sum(1)) for own in counts], "g"),
            ([distances(own).mean() for own in counts], ".3f"),
        )
        cells = [f"{np.median(v):{form}} ({min(v):{form}} to {max(v):{form}})" for v, form in columns]
        print(f"| `{spec}` | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
