import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

from cutlayer import ConfigError, CropFlip
from cutlayer.data.batches import Batches
from cutlayer.data.datasets import load

RECORDS = np.random.default_rng(0).integers(0, 256, (6, 20, 3073), dtype=np.uint8)
RECORDS[:, :, 0] %= 10
NAMES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


def write_binary(folder: Path) -> None:
    folder.mkdir()
    for name, records in zip(NAMES, RECORDS, strict=True):
        (folder / f"{name}.bin").write_bytes(records.tobytes())


def write_python(folder: Path) -> None:
    folder.mkdir()
    for name, records in zip(NAMES, RECORDS, strict=True):
        content = {b"data": records[:, 1:].copy(), b"labels": records[:, 0].tolist(), b"batch_label": b"x"}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))


def write_idx(folder: Path, compressed: bool = True) -> tuple[np.ndarray, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(1).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    labels = np.arange(5, dtype=np.uint8)
    for part in ("train", "t10k"):
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            raw = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
            file = folder / f"{part}-{name}-ubyte{'.gz' if compressed else ''}"
            file.write_bytes(gzip.compress(raw) if compressed else raw)
    return images, labels


@pytest.mark.parametrize(
    ("write", "sub"), [(write_binary, "cifar-10-batches-bin"), (write_python, "cifar-10-batches-py")]
)
def test_cifar10_from_either_form(write, sub: str, tmp_path: Path) -> None:
    write(tmp_path / sub)
    for folder in (tmp_path, tmp_path / sub):
        train, test = load("cifar10", str(folder))
        assert train.inputs.shape == (100, 3, 32, 32)
        assert torch.equal(train.labels, torch.from_numpy(RECORDS[:5, :, 0].reshape(-1).astype(np.int64)))
        # Record: label, then the red, green and blue planes, row by row.
        assert test.inputs[3, 1, 2, 5] == RECORDS[5, 3, 1 + 1024 + 2 * 32 + 5]


def test_missing_files_are_named_with_where_to_get_them(tmp_path: Path, monkeypatch) -> None:
    write_binary(tmp_path / "cifar-10-batches-bin")
    (tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin").unlink()
    with pytest.raises(ConfigError, match=r"missing: \S*data_batch_3.bin\. Get it from https://www.cs.toronto.edu"):
        load("cifar10", str(tmp_path))
    monkeypatch.setenv("CUTLAYER_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"nowhere/train-images-idx3-ubyte.gz.*github.com/zalandoresearch"):
        load("fashion_mnist")
    with pytest.raises(ConfigError, match="unknown data set 'mnist'; known: digits, cifar10, fashion_mnist"):
        load("mnist")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    write_binary(tmp_path / "cifar-10-batches-bin")
    (tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin").write_bytes(b"x" * 3000)
    with pytest.raises(ConfigError, match=r"data_batch_2.bin: expected records of 3073 bytes, got a file of 3000"):
        load("cifar10", str(tmp_path))
    write_idx(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(ConfigError, match=r"t10k-labels-idx1-ubyte\.gz: not a gzip file"):
        load("fashion_mnist", str(tmp_path))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x01\0\0\0\x05abc"))
    with pytest.raises(ConfigError, match="not an idx file of unsigned bytes, or cut short"):
        load("fashion_mnist", str(tmp_path))


def test_a_python_batch_cannot_run_code(tmp_path: Path) -> None:
    write_python(tmp_path / "cifar-10-batches-py")
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (marker,))

    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(ConfigError, match="holds arrays and lists only, this one asks for"):
        load("cifar10", str(tmp_path))
    assert not marker.exists()


@pytest.mark.parametrize("compressed", [True, False])
@pytest.mark.parametrize(
    ("at", "given"),
    [
        ("fashion-mnist", ""),
        ("", ""),
        ("FashionMNIST/raw", ""),  # as torchvision's FashionMNIST(root) leaves them
        ("FashionMNIST/raw", "FashionMNIST"),
        ("FashionMNIST/raw", "FashionMNIST/raw"),
    ],
)
def test_fashion_mnist(at: str, given: str, compressed: bool, tmp_path: Path) -> None:
    images, labels = write_idx(tmp_path / at, compressed)
    train, test = load("fashion_mnist", str(tmp_path / given))
    for part in (train, test):
        assert part.inputs.shape == (5, 1, 32, 32)
        assert np.array_equal(part.inputs[:, 0, 2:30, 2:30].numpy(), images)
        assert part.inputs.sum() == images.sum()  # nothing but zeros around them
        assert part.labels.tolist() == labels.tolist()


def test_digits_are_a_fixed_split() -> None:
    train, test = load("digits")
    assert (len(train), len(test)) == (1437, 360)
    both = torch.cat([train.inputs, test.inputs]).flatten(1)
    assert len(torch.unique(both, dim=0)) == 1797
    assert int(train.inputs.max()) == 255


def test_the_real_cifar10(cifar10_dir: Path) -> None:
    train, test = load("cifar10", str(cifar10_dir))
    assert train.labels.bincount().tolist() == [5000] * 10
    assert test.labels.bincount().tolist() == [1000] * 10
    mean, std = train.inputs.float().mean((0, 2, 3)) / 255, train.inputs.float().std((0, 2, 3)) / 255
    assert mean.tolist() == pytest.approx(train.mean, abs=1e-4)
    assert std.tolist() == pytest.approx(train.std, abs=1e-4)


def test_crop_and_flip_against_a_loop() -> None:
    inputs = torch.arange(8 * 2 * 5 * 6, dtype=torch.float32).reshape(8, 2, 5, 6) + 1
    augment = CropFlip(padding=2)
    out = augment(inputs, torch.Generator().manual_seed(3))
    draw = torch.Generator().manual_seed(3)
    tops, lefts = torch.randint(5, (8, 1), generator=draw), torch.randint(5, (8, 1), generator=draw)
    mirrored = torch.rand(8, 1, generator=draw) < 0.5
    for image, top, left, mirror, got in zip(inputs, tops, lefts, mirrored, out, strict=True):
        padded = torch.zeros(2, 9, 10)
        padded[:, 2:7, 2:8] = image
        crop = padded[:, int(top) : int(top) + 5, int(left) : int(left) + 6]
        assert torch.equal(got, crop.flip(2) if mirror else crop)
    assert mirrored.unique().tolist() == [False, True]
    whole = CropFlip(padding=0, flip=False)(inputs, torch.Generator())
    assert torch.equal(whole, inputs)


def ids(feed: Batches, epoch: int) -> list[int]:
    return torch.cat([batch.ids for batch in feed.epoch(epoch)]).tolist()


def test_batches_cover_the_data_and_carry_its_positions() -> None:
    data = TensorDataset(torch.arange(10.0), torch.arange(10) * 10)
    feed = Batches(data, batch_size=4, seed=1)
    assert sorted(ids(feed, 0)) == list(range(10))
    assert ids(feed, 0) == ids(feed, 0) != ids(feed, 1)
    assert ids(Batches(data, batch_size=4, seed=1, client=1), 0) != ids(feed, 0)
    for batch in feed.epoch(0):
        assert torch.equal(batch.inputs.long(), batch.ids)
        assert torch.equal(batch.labels, batch.ids * 10)
    assert ids(Batches(data, batch_size=4, shuffle=False), 3) == list(range(10))
    assert len(ids(Batches(data, batch_size=4, drop_last=True), 0)) == 8
    loader = Batches(DataLoader(data, batch_size=3, drop_last=True))
    assert (ids(loader, 0), loader.batch_size) == (list(range(9)), 3)
    own = Batches(DataLoader(data, batch_sampler=[[3, 1], [4, 4, 9]]))
    assert (ids(own, 0), own.batch_size) == ([3, 1, 4, 4, 9], 3)


def test_a_batch_sampler_around_a_sampler_with_a_generator_of_its_own() -> None:
    data, draw = TensorDataset(torch.arange(33.0), torch.arange(33)), torch.Generator().manual_seed(1)
    sampler = BatchSampler(RandomSampler(data, generator=draw), 32, drop_last=True)
    feed, state = Batches(DataLoader(data, batch_sampler=sampler)), draw.get_state()
    assert ids(feed, 0) == ids(feed, 0) != ids(feed, 1)
    assert torch.equal(draw.get_state(), state)
    assert feed.drop_last


def test_sources_that_cannot_be_used_are_explained() -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            yield from ()

    with pytest.raises(ConfigError, match=r"expected a map-style data set.*got Stream"):
        Batches(Stream())
    with pytest.raises(ConfigError, match="the data set is empty"):
        Batches(TensorDataset(torch.zeros(0, 2), torch.zeros(0)))
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        Batches(TensorDataset(torch.zeros(1, 2), torch.zeros(1)), batch_size=0)
    with pytest.raises(ConfigError, match="automatic batching"):
        Batches(DataLoader(TensorDataset(torch.zeros(1, 2), torch.zeros(1)), batch_size=None))
    with pytest.raises(ConfigError, match=r"pairs that collate to two tensors, got \['Tensor', 'Tensor', 'Tensor'\]"):
        Batches(TensorDataset(*[torch.zeros(2, 2)] * 3)).sample()
