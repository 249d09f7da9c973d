"""The ways to divide samples among clients that the literature uses; each deals out every sample exactly once."""

from __future__ import annotations

import math

import numpy as np

from cutlayer.data.partition.value import Labels, Partition, label_array
from cutlayer.errors import ConfigError
from cutlayer.seeds import derive

MIN_SAMPLES = 10
# Draws until each client has enough, as published code does without a limit; after these, samples are moved.
DRAWS = 100


def iid(samples: int, clients: int, seed: int = 0) -> Partition:
    """Independent and identically distributed: a random share for each client, of sizes that differ by one at most.

    The "IID" of McMahan et al. 2017, arXiv 1602.05629.
    """
    _check(samples, clients, 1)
    order = _draw(seed, "iid").permutation(samples)
    return _partition(np.array_split(order, clients), samples, "iid", {}, seed)


def dirichlet(
    labels: Labels, clients: int, alpha: float, seed: int = 0, *, min_samples: int = MIN_SAMPLES
) -> Partition:
    """Label distribution skew: each class is divided among the clients in proportions drawn from Dir(alpha).

    Of the two usual variants this is the one per class: Yurochkin et al. 2019, arXiv 1905.12022, and
    "distribution-based label imbalance" in NIID-Bench, Li et al. 2022, arXiv 2102.02079, whose code also balances
    sizes. That is left out here, so the sizes of the clients differ as well. In the other variant, Hsu et al. 2019,
    arXiv 1909.06335, each client draws its own class proportions and all have the same size. In both, a small alpha
    gives a client few classes, and a large one approaches `iid`.

    A draw in which a client has fewer than `min_samples` is drawn anew, as in that code, up to 100 times. Then clients
    with too few get single samples from whoever has most, of the class which that client has most of; `parameters` then
    says how many were `moved`.

    Args:
        labels: the class of each sample, integers [samples] from 0.
        clients: how many.
        alpha: concentration, above 0. Common: 0.1 (strong skew), 0.5, 1, 100 (almost none).
        seed: of the draw.
        min_samples: the fewest that a client is to have; with 0 a client may have none.

    Raises:
        ConfigError: for arguments out of range, or fewer samples than `clients` x `min_samples`.
    """
    array = label_array(labels)
    parts, facts = _skewed(array, clients, alpha, min_samples, _draw(seed, "dirichlet"))
    return _partition(parts, len(array), "dirichlet", facts, seed)


def label_shards(labels: Labels, clients: int, shards_per_client: int, seed: int = 0) -> Partition:
    """Few classes for each client: samples sorted by label, cut into equal shards, so many dealt to each client.

    The "pathological non-IID" of McMahan et al. 2017, arXiv 1602.05629 (there 2 shards of 300 for each of 100 clients).
    A shard at the border of two classes holds both. Sizes differ by `shards_per_client` at most.

    Args:
        labels: the class of each sample, integers [samples] from 0.
        clients: how many.
        shards_per_client: shards that each client gets, at least 1.
        seed: of the draw.

    Raises:
        ConfigError: for arguments out of range, or fewer samples than shards.
    """
    array = label_array(labels)
    if shards_per_client < 1:
        raise ConfigError(f"expected at least one shard for each client, got {shards_per_client}")
    _check(len(array), clients, shards_per_client)
    draw = _draw(seed, "shards")
    shuffled = draw.permutation(len(array))  # so that chance decides which samples of a class share a shard
    by_label = shuffled[np.argsort(array[shuffled], kind="stable")]
    shards = np.array_split(by_label, clients * shards_per_client)
    dealt = draw.permutation(len(shards)).reshape(clients, shards_per_client)
    parts = [np.concatenate([shards[shard] for shard in hand]) for hand in dealt]
    return _partition(parts, len(array), "label_shards", {"shards_per_client": shards_per_client}, seed)


def quantity_skew(
    samples: int, clients: int, alpha: float, seed: int = 0, *, min_samples: int = MIN_SAMPLES
) -> Partition:
    """Quantity skew: random samples, but sizes of the clients in proportions drawn from Dir(alpha).

    That of NIID-Bench, Li et al. 2022, arXiv 2102.02079. Too small clients are treated as in `dirichlet`.

    Args:
        samples: how many there are to divide.
        clients: how many.
        alpha: concentration, above 0; a small one gives some clients most of the samples.
        seed: of the draw.
        min_samples: the fewest that a client is to have; with 0 a client may have none.

    Raises:
        ConfigError: for arguments out of range, or fewer samples than `clients` x `min_samples`.
    """
    parts, facts = _skewed(np.zeros(samples, np.int64), clients, alpha, min_samples, _draw(seed, "quantity"))
    return _partition(parts, samples, "quantity_skew", facts, seed)


# --- parts of the above ------------------------------------------------------------------------------------------


def _draw(seed: int, name: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(derive(seed, "partition", name)))


def _check(samples: int, clients: int, least: int) -> None:
    if clients < 1 or samples < 1:
        raise ConfigError(f"expected at least one client and one sample, got {clients} and {samples}")
    if samples < clients * least:
        raise ConfigError(
            f"{samples} samples are too few for {clients} clients with at least {least} each; take fewer clients, or "
            "ask for fewer samples each"
        )


def _partition(
    parts: list[np.ndarray], samples: int, method: str, parameters: dict[str, float | int], seed: int
) -> Partition:
    return Partition(tuple(np.sort(part) for part in parts), samples, method, parameters, seed)


def _skewed(
    classes: np.ndarray, clients: int, alpha: float, min_samples: int, draw: np.random.Generator
) -> tuple[list[np.ndarray], dict[str, float | int]]:
    """Positions of each client's samples, with each class [samples] divided in proportions from Dir(alpha).

    And what to write down of it: the parameters, and the number of samples that were moved to reach `min_samples`.
    """
    if not 0 < alpha < math.inf:
        raise ConfigError(f"expected an alpha above 0, got {alpha}")
    if min_samples < 0:
        raise ConfigError(f"expected min_samples of at least 0, got {min_samples}")
    _check(len(classes), clients, min_samples)
    members = [np.flatnonzero(classes == one) for one in np.unique(classes)]
    sizes = np.array([len(own) for own in members])
    counts = np.empty((clients, len(members)), np.int64)
    for _ in range(DRAWS):
        shares = draw.dirichlet(np.full(clients, alpha), len(members)).T
        bounds = np.minimum(np.round(shares.cumsum(0) * sizes).astype(np.int64), sizes)
        bounds[-1] = sizes  # the sum of the shares is 1 but for rounding
        counts = np.diff(bounds, axis=0, prepend=0)
        if counts.sum(1).min() >= min_samples:
            break
    moved = _top_up(counts, min_samples)
    parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
    for own, column in zip(members, counts.T, strict=True):
        for part, samples in zip(parts, np.split(draw.permutation(own), column.cumsum()[:-1]), strict=True):
            part.append(samples)
    facts = {"alpha": alpha, "min_samples": min_samples, **({"moved": moved} if moved else {})}
    return [np.concatenate(part) for part in parts], facts


def _top_up(counts: np.ndarray, least: int) -> int:
    """Move single samples in counts int64 [clients, classes] from the largest client until each has `least`.

    Returns how many. Ends, as while a client has fewer than `least`, the largest has more: there are enough in all.
    """
    sizes, moved = counts.sum(1), 0
    for poor in np.flatnonzero(sizes < least):
        while sizes[poor] < least:
            rich = sizes.argmax()
            of = counts[rich].argmax()
            counts[rich, of] -= 1
            counts[poor, of] += 1
            sizes[rich] -= 1
            sizes[poor] += 1
            moved += 1
    return moved
