"""Partitions by spec strings, as configs and the command line name them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cutlayer.data.partition.divide import dirichlet, iid, label_shards, quantity_skew
from cutlayer.data.partition.value import Labels, Partition, label_array
from cutlayer.errors import ConfigError, unknown

KNOWN = ("iid", "dirichlet:ALPHA[:MIN_SAMPLES]", "shards:PER_CLIENT", "quantity:ALPHA[:MIN_SAMPLES]", "FILE.json")


def make_partition(spec: str, labels: Labels, clients: int, seed: int = 0, data: str | None = None) -> Partition:
    """The partition that a spec string names, with what the labels tell.

    Args:
        spec: "iid", "dirichlet:0.5" (alpha; "dirichlet:0.5:1" with min_samples), "shards:2" (per client),
            "quantity:0.5", or the path of a file made by `Partition.save`, which must fit labels and clients.
        labels: the class of each sample of the data set, integers [samples] from 0.
        clients: how many.
        seed: of the draw; a file needs none.
        data: the data set's name, to write down or to compare with the file's.

    Raises:
        ConfigError: for a spec that is unknown or cannot be carried out, or a file that does not fit.
    """
    array = label_array(labels)
    match _parse(spec):
        case "iid", []:
            partition = iid(len(array), clients, seed)
        case "dirichlet", [alpha]:
            partition = dirichlet(array, clients, alpha, seed)
        case "dirichlet", [alpha, least]:
            partition = dirichlet(array, clients, alpha, seed, min_samples=_whole(least))
        case "shards", [each]:
            partition = label_shards(array, clients, _whole(each), seed)
        case "quantity", [alpha]:
            partition = quantity_skew(len(array), clients, alpha, seed)
        case "quantity", [alpha, least]:
            partition = quantity_skew(len(array), clients, alpha, seed, min_samples=_whole(least))
        case _ if spec.endswith(".json") or Path(spec).is_file():
            return _from_file(spec, array, clients, data)
        case _:
            raise ConfigError(unknown("partition", spec, KNOWN))
    return partition.of(array, data)


def _parse(spec: str) -> tuple[str, list[float]] | None:
    """Name and numbers of a spec, None for what has not this form."""
    name, *rest = spec.split(":")
    try:
        return name, [float(number) for number in rest]
    except ValueError:
        return None


def _from_file(file: str, labels: np.ndarray, clients: int, data: str | None) -> Partition:
    partition = Partition.load(file)
    try:
        partition.check(labels, data)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    if len(partition) != clients:
        raise ConfigError(f"{file}: expected a partition among {clients} clients, got one among {len(partition)}")
    return partition


def _whole(number: float) -> int:
    if not number.is_integer():
        raise ConfigError(f"expected a whole number, got {number}")
    return int(number)
