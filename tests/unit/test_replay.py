import itertools
from pathlib import Path

import pytest
import torch

from cutlayer import ConfigError, RefusedError, StoreFullError, StoreOptions
from cutlayer.codecs import get_float_codec
from cutlayer.memory.store import ReplayStore
from cutlayer.records import state_dicts

CODEC = get_float_codec("fp8_e4m3")


def put(store: ReplayStore, ids: list[int], values: torch.Tensor) -> None:
    store.put(torch.tensor(ids), CODEC.encode(values), torch.tensor(ids) % 7)


@pytest.mark.parametrize("placement", ["memory", "disk"])
def test_the_newest_activation_of_each_sample(placement, tmp_path: Path) -> None:
    store = ReplayStore(10, StoreOptions(placement, folder=str(tmp_path)))
    old, new = torch.randn(6, 4), 100 * torch.randn(3, 4)
    put(store, [0, 2, 4, 6, 8, 9], old)
    put(store, [4, 1, 8], new)
    assert store.on_disk == (placement == "disk")
    assert len(store) == 7
    encoded, labels = store.get(torch.tensor([8, 0, 1]))
    old_decoded, new_decoded = CODEC.decode(CODEC.encode(old)), CODEC.decode(CODEC.encode(new))
    assert torch.equal(CODEC.decode(encoded), torch.stack([new_decoded[2], old_decoded[0], new_decoded[1]]))
    assert labels.tolist() == [1, 0, 1]
    assert list(tmp_path.iterdir()) == []  # the file has no name, so nothing is left behind


def test_batches_are_shuffled_across_samples_and_complete() -> None:
    store = ReplayStore(20)
    put(store, list(range(0, 20, 2)), torch.arange(10.0).reshape(10, 1))

    def draw(seed: int | None, **kwargs) -> list[list[float]]:
        shuffle = None if seed is None else torch.Generator().manual_seed(seed)
        return [CODEC.decode(encoded)[:, 0].tolist() for encoded, _ in store.batches(4, shuffle, **kwargs)]

    assert draw(None) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert draw(None, drop_last=True) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert sorted(itertools.chain(*draw(1))) == list(range(10))
    assert draw(1) == draw(1) != draw(2)
    assert [len(batch) for batch in draw(1)] == [4, 4, 2]


def test_budgets() -> None:
    def first_put(options: StoreOptions) -> ReplayStore:
        store = ReplayStore(3 << 20, options)
        put(store, [0], torch.ones(1, 1))  # 1 byte of code, 4 of scale, 8 of label for each of 3 Mi samples
        return store

    with pytest.raises(
        StoreFullError, match=r"3145728 samples \[1\] in fp8_e4m3 takes 39.0 MiB, the budget on memory is 38"
    ):
        first_put(StoreOptions("memory", memory_budget_mib=38))
    assert not first_put(StoreOptions("auto", memory_budget_mib=40)).on_disk
    assert first_put(StoreOptions("auto", memory_budget_mib=38)).on_disk
    with pytest.raises(StoreFullError, match="the budget on disk is 10"):
        first_put(StoreOptions("auto", memory_budget_mib=38, disk_budget_mib=10))
    with pytest.raises(ConfigError, match=r"store folder '/no/such': expected an existing folder"):
        StoreOptions(folder="/no/such")
    with pytest.raises(ConfigError, match="known: auto, memory, disk"):
        StoreOptions("tape")  # type: ignore[arg-type]


def test_a_store_on_disk_does_not_take_memory(tmp_path: Path) -> None:
    """Anonymous memory stays flat while 256 MiB are written."""

    def anonymous_mib() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024

    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    store = ReplayStore(256, StoreOptions("disk", folder=str(tmp_path)))
    values = torch.ones(8, 1 << 20)
    put(store, list(range(8)), values)
    before = anonymous_mib()
    for start in range(8, 256, 8):
        put(store, list(range(start, start + 8)), values)
    assert store.nbytes > 256 << 20
    assert anonymous_mib() - before < 64


def test_what_does_not_fit_is_refused() -> None:
    store = ReplayStore(4)
    put(store, [0], torch.ones(1, 3))
    for ids in ([4], [-1]):
        with pytest.raises(RefusedError, match="sample ids from 0 to 3"):
            put(store, ids, torch.ones(1, 3))
    with pytest.raises(
        RefusedError, match=r"expected activations in fp8_e4m3 of shape \[3\], got fp8_e4m3 of shape \[2\]"
    ):
        put(store, [1], torch.ones(1, 2))
    other = get_float_codec("fp8_e5m2").encode(torch.ones(1, 3))
    with pytest.raises(RefusedError, match="got fp8_e5m2"):
        store.put(torch.tensor([1]), other, torch.tensor([0]))
    code = CODEC.encode(torch.ones(1, 3))
    for labels in (torch.zeros(1, 2).long(), torch.zeros(1), torch.zeros(2).long()):
        with pytest.raises(RefusedError, match=r"labels: expected int64 \[1\], got"):
            store.put(torch.tensor([0]), code, labels)
    assert len(store) == 1
    assert CODEC.decode(store.get(torch.tensor([0]))[0]).tolist() == [[1, 1, 1]]


def test_saved_and_loaded(tmp_path: Path) -> None:
    store, empty = ReplayStore(9), ReplayStore(3)
    put(store, [1, 5, 7], torch.randn(3, 2, 2))
    parts = {"a": store, "b": empty}
    states = {name: state_dicts.write(part.state_dict(), tmp_path / name) for name, part in parts.items()}
    states = {name: state_dicts.read(tmp_path / name, facts) for name, facts in states.items()}
    again = ReplayStore(9)
    again.load_state_dict(states["a"])
    for (kept, labels), (kept_again, labels_again) in zip(store.batches(2), again.batches(2), strict=True):
        assert torch.equal(CODEC.decode(kept), CODEC.decode(kept_again))
        assert torch.equal(labels, labels_again)
    empty_again = ReplayStore(3)
    empty_again.load_state_dict(states["b"])
    assert len(empty_again) == 0
    with pytest.raises(ConfigError, match="holds 9 samples, the data set has 8"):
        ReplayStore(8).load_state_dict(states["a"])
