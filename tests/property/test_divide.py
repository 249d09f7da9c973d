"""What holds for every way to divide samples, whatever the labels, the number of clients and the seed."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cutlayer.data.partition import Partition, dirichlet, iid, label_shards, make_partition, quantity_skew
from cutlayer.data.partition.ranges import from_text, to_text

labels = st.lists(st.integers(0, 12), min_size=1, max_size=200).map(np.array)
seeds = st.integers(0, 2**63)
alphas = st.floats(1e-6, 1e6)


def check(partition: Partition, again: Partition, samples: int, clients: int, least: int) -> None:
    assert len(partition) == clients
    assert sorted(np.concatenate(partition.clients).tolist()) == list(range(samples))  # each sample exactly once
    assert all((np.diff(own) > 0).all() and own.dtype == np.int64 for own in partition.clients)
    assert partition.sizes.min() >= least
    assert partition == again
    if clients == 1:
        assert partition.clients[0].tolist() == list(range(samples))


@given(st.data(), labels, seeds)
def test_iid(data: st.DataObject, labels: np.ndarray, seed: int) -> None:
    clients = data.draw(st.integers(1, len(labels)))
    partition = iid(len(labels), clients, seed)
    check(partition, iid(len(labels), clients, seed), len(labels), clients, 1)
    assert np.ptp(partition.sizes) <= 1


@given(st.data(), labels, seeds, alphas)
def test_dirichlet_and_quantity_skew(data: st.DataObject, labels: np.ndarray, seed: int, alpha: float) -> None:
    clients = data.draw(st.integers(1, len(labels)))
    least = data.draw(st.integers(0, len(labels) // clients))
    for make in (
        lambda: dirichlet(labels, clients, alpha, seed, min_samples=least),
        lambda: quantity_skew(len(labels), clients, alpha, seed, min_samples=least),
    ):
        check(make(), make(), len(labels), clients, least)


@given(st.data(), labels, seeds)
def test_label_shards(data: st.DataObject, labels: np.ndarray, seed: int) -> None:
    clients = data.draw(st.integers(1, len(labels)))
    shards = data.draw(st.integers(1, len(labels) // clients))
    partition = label_shards(labels, clients, shards, seed)
    check(partition, label_shards(labels, clients, shards, seed), len(labels), clients, shards)
    assert np.ptp(partition.sizes) <= shards
    # A shard touches as many classes as borders lie in it, and one more.
    touched = (partition.counts(labels) > 0).sum()
    assert touched <= clients * shards + len(np.unique(labels)) - 1


@given(st.data(), labels, seeds)
def test_files_read_back(data: st.DataObject, labels: np.ndarray, seed: int) -> None:
    clients = data.draw(st.integers(1, len(labels)))
    partition = make_partition("iid", labels, clients, seed, data.draw(st.none() | st.text()))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "p.json"
        partition.save(file)
        read = Partition.load(file)
    assert read == partition
    read.check(labels)
    assert read.counts(labels).tolist() == partition.class_counts.tolist()


@given(st.sets(st.integers(0, 300)))
def test_ranges_read_back(numbers: set[int]) -> None:
    array = np.array(sorted(numbers), np.int64)
    assert from_text(to_text(array), 301).tolist() == array.tolist()
