"""1. The data: three public data sets read from their own files, batches with sample ids, augmentation."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torch.utils.data.dataloader import default_collate

from cutlayer.errors import ConfigError, unknown
from cutlayer.seeds import derive, generator, seeded

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar.html"
FASHION_MNIST_URL = "https://github.com/zalandoresearch/fashion-mnist"

# Mean and standard deviation of each channel.
DIGITS_STATS = (0.305,), (0.376,)
CIFAR10_STATS = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
FASHION_MNIST_STATS = (0.219,), (0.332,)


@dataclass(frozen=True, eq=False)
class Images(Dataset):
    """Images and labels in memory.

    Attributes:
        inputs: uint8 [N, C, H, W].
        labels: int64 [N].
        mean, std: of each channel, in units of the pixels' full range, for a model to normalize with.
    """

    inputs: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: int = 10

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.labels[index]

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs uint8 [B, C, H, W] and labels int64 [B] of these samples, in one gather."""
        return self.inputs[indices], self.labels[indices]

    def first(self, count: int | None) -> Images:
        """The first `count` samples, or all of them for None."""
        if count is None:
            return self
        if not 0 < count <= len(self):
            raise ConfigError(f"expected a number of samples from 1 to {len(self)}, got {count}")
        return Images(self.inputs[:count], self.labels[:count], self.mean, self.std, self.classes)


# --- data sets ---------------------------------------------------------------------------------------------------


def digits() -> tuple[Images, Images]:
    """Scikit-learn's digits: 1,437 training and 360 test images of 8x8 pixels, a fixed split."""
    from sklearn.datasets import load_digits

    raw: Any = load_digits()
    inputs = torch.from_numpy(np.round(raw.data * (255 / 16)).astype(np.uint8)).reshape(-1, 1, 8, 8)
    labels = torch.from_numpy(raw.target.astype(np.int64))
    order = torch.randperm(len(labels), generator=generator(0, "digits"))
    train, test = order[:1437], order[1437:]
    return (
        Images(inputs[train], labels[train], *DIGITS_STATS),
        Images(inputs[test], labels[test], *DIGITS_STATS),
    )


def cifar10(folder: Path) -> tuple[Images, Images]:
    """CIFAR-10 (Krizhevsky 2009) from its published binary or Python batches: 50,000 and 10,000 images of 32x32.

    `folder` is `cifar-10-batches-bin` or `cifar-10-batches-py`, or a folder that holds one of them.
    """
    names = [f"data_batch_{i}" for i in range(1, 6)]
    for sub, suffix, read in (("bin", ".bin", _cifar10_binary), ("py", "", _cifar10_python)):
        for place in (folder / f"cifar-10-batches-{sub}", folder):
            files = [place / f"{name}{suffix}" for name in (*names, "test_batch")]
            if any(file.is_file() for file in files):
                _require(files, "CIFAR-10", CIFAR10_URL)
                parts = [read(file) for file in files]
                inputs, labels = (torch.from_numpy(np.concatenate(part)) for part in zip(*parts[:5], strict=True))
                test_inputs, test_labels = map(torch.from_numpy, parts[5])
                return Images(inputs, labels, *CIFAR10_STATS), Images(test_inputs, test_labels, *CIFAR10_STATS)
    _require(
        [folder / "cifar-10-batches-bin" / f"{name}.bin" for name in (*names, "test_batch")],
        "CIFAR-10",
        CIFAR10_URL,
    )
    raise AssertionError("unreachable: no file of the data set is there")


def _cifar10_binary(file: Path) -> tuple[np.ndarray, np.ndarray]:
    raw = np.fromfile(file, np.uint8)
    if raw.size == 0 or raw.size % 3073:
        raise ConfigError(
            f"{file}: expected records of 3073 bytes, got a file of {raw.size}; get it again: {CIFAR10_URL}"
        )
    records = raw.reshape(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(np.int64)


class _ArraysOnly(pickle.Unpickler):
    """Reads the published Python batches, which are pickles, without letting a file run code."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy._core", "numpy.core")
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np.empty(0).__reduce__()[0]
        allowed = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
        if (module, name) in allowed:
            return allowed[module, name]
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode(encoding)
        raise ConfigError(f"a CIFAR-10 batch holds arrays and lists only, this one asks for {module}.{name}")


def _cifar10_python(file: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        batch = _ArraysOnly(io.BytesIO(file.read_bytes()), encoding="bytes").load()
        inputs = np.ascontiguousarray(batch[b"data"], np.uint8).reshape(-1, 3, 32, 32)
        return inputs, np.asarray(batch[b"labels"], np.int64)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{file}: not a CIFAR-10 Python batch ({error}); get it again: {CIFAR10_URL}") from error


def fashion_mnist(folder: Path) -> tuple[Images, Images]:
    """Fashion-MNIST (Xiao et al. 2017) from its idx files: 60,000 and 10,000 images, padded from 28x28 to 32x32.

    `folder` holds the four `*-ubyte.gz` files, gzipped or not, or a folder `fashion-mnist` with them.
    """
    place = folder / "fashion-mnist" if (folder / "fashion-mnist").is_dir() else folder
    names = [f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
    files = [place / name if (place / name).is_file() else place / f"{name}.gz" for name in names]
    _require(files, "Fashion-MNIST", FASHION_MNIST_URL)
    arrays = [_idx(file) for file in files]
    parts = []
    for inputs, labels in (arrays[:2], arrays[2:]):
        if len(inputs) != len(labels):
            raise ConfigError(
                f"{place}: {len(inputs)} images but {len(labels)} labels; get it again: {FASHION_MNIST_URL}"
            )
        padded = pad(torch.from_numpy(inputs).unsqueeze(1), (2, 2, 2, 2))
        parts.append(Images(padded, torch.from_numpy(labels.astype(np.int64)), *FASHION_MNIST_STATS))
    return parts[0], parts[1]


def _idx(file: Path) -> np.ndarray:
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (gzip.BadGzipFile, EOFError) as error:
        raise ConfigError(f"{file}: not a gzip file ({error}); get it again: {FASHION_MNIST_URL}") from error
    dimensions = raw[3] if len(raw) > 3 else 0
    shape = struct.unpack_from(f">{dimensions}I", raw, 4) if len(raw) >= 4 + 4 * dimensions else ()
    data = np.frombuffer(raw, np.uint8)[4 + 4 * dimensions :]
    if raw[:3] != b"\0\0\x08" or data.size != np.prod(shape, dtype=np.int64):
        raise ConfigError(f"{file}: not an idx file of unsigned bytes, or cut short; get it again: {FASHION_MNIST_URL}")
    return data.reshape(shape).copy()


def _require(files: list[Path], what: str, url: str) -> None:
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise ConfigError(
            f"{what} is not complete; missing: {', '.join(missing)}. Get it from {url}, unpack it, and give the folder "
            "with --data-dir or in the environment variable CUTLAYER_DATA."
        )


DATASETS: dict[str, Callable[[Path], tuple[Images, Images]]] = {
    "digits": lambda folder: digits(),
    "cifar10": cifar10,
    "fashion_mnist": fashion_mnist,
}


def outline(name: str) -> Images:
    """A data set without its samples: what a network is built from, on a server that never sees them."""
    outlines = {
        "digits": ((1, 8, 8), *DIGITS_STATS),
        "cifar10": ((3, 32, 32), *CIFAR10_STATS),
        "fashion_mnist": ((1, 32, 32), *FASHION_MNIST_STATS),
    }
    if name not in outlines:
        raise ConfigError(unknown("data set", name, outlines))
    shape, mean, std = outlines[name]
    return Images(torch.empty((0, *shape), dtype=torch.uint8), torch.empty(0, dtype=torch.int64), mean, std)


def load(name: str, folder: str | None = None) -> tuple[Images, Images]:
    """Training and test part of a data set. `folder` defaults to the environment variable CUTLAYER_DATA, or `data`."""
    if name not in DATASETS:
        raise ConfigError(unknown("data set", name, DATASETS))
    return DATASETS[name](Path(folder or os.environ.get("CUTLAYER_DATA") or "data").expanduser())


# --- augmentation ------------------------------------------------------------------------------------------------

Augment = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class CropFlip:
    """Random crop after zero padding, and horizontal flip: the usual augmentation for CIFAR-10, on a whole batch.

    Attributes:
        padding: pixels added on each side before the crop.
        flip: whether half of the images are mirrored.
    """

    padding: int = 4
    flip: bool = True

    def __call__(self, inputs: Tensor, draw: torch.Generator) -> Tensor:
        """Augment a batch [B, C, H, W] of any dtype."""
        batch, _, height, width = inputs.shape
        span = 2 * self.padding + 1
        top = torch.randint(span, (batch, 1), generator=draw)
        left = torch.randint(span, (batch, 1), generator=draw)
        rows, columns = top + torch.arange(height), left + torch.arange(width)
        if self.flip:
            mirrored = torch.rand(batch, 1, generator=draw) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        padded = pad(inputs, (self.padding,) * 4)
        sample = torch.arange(batch)[:, None, None]
        crop = padded.permute(0, 2, 3, 1)[sample, rows[:, :, None], columns[:, None, :]]
        return crop.permute(0, 3, 1, 2).contiguous()


# --- batches -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples of one step: ids int64 [B] (positions in the data set), inputs [B, ...] and labels [B, ...]."""

    ids: Tensor
    inputs: Tensor
    labels: Tensor


class _Indexed(Dataset):
    """A data set whose samples carry their index."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.dataset[index]


class _CollateIndexed:
    def __init__(self, collate: Callable[[list], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[tuple[int, Any]]) -> tuple[Tensor, Any]:
        indices, items = zip(*samples, strict=True)
        return torch.tensor(indices), self.collate(list(items))


class Feed:
    """The batches of one client's data, epoch by epoch, the same for the same seed.

    Args:
        source: a map-style `Dataset` of (input, label) pairs, shuffled anew each epoch, or a `DataLoader`, whose
            batch size, sampler, collate function and workers are kept.
        batch_size: samples in a batch, for a `Dataset`.
        seed: the run's seed.
        client: the client's number, part of the name of each draw.
        shuffle: for a `Dataset`, whether its order changes from epoch to epoch.
        drop_last: for a `Dataset`, whether a last, smaller batch is left out.
        augment: applied to the inputs of each batch with a generator of its own.
    """

    def __init__(
        self,
        source: Dataset | DataLoader,
        *,
        batch_size: int = 128,
        seed: int = 0,
        client: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        augment: Augment | None = None,
    ) -> None:
        loader = source if isinstance(source, DataLoader) else None
        self.dataset: Any = loader.dataset if loader is not None else source
        if isinstance(self.dataset, IterableDataset) or not hasattr(self.dataset, "__len__"):
            raise ConfigError(
                "expected a map-style data set (with __getitem__ and __len__), whose samples have stable positions; "
                f"got {type(self.dataset).__name__}. The replay store keeps activations by sample."
            )
        if len(self) == 0:
            raise ConfigError("the data set is empty; expected at least one sample")
        if loader is not None and loader.batch_sampler is None:
            raise ConfigError("expected a DataLoader with automatic batching, got one with batch_size=None")
        self.loader, self.seed, self.client, self.augment = loader, seed, client, augment
        self.shuffle, self.drop_last = shuffle, drop_last
        self.batch_size = batch_size if loader is None else max(map(len, self._indices(0)), default=0)
        if self.batch_size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {self.batch_size}")

    def __len__(self) -> int:
        """Samples in the data set."""
        return len(self.dataset)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of this epoch."""
        for step, (ids, (inputs, labels)) in enumerate(self._fetch(self._indices(epoch), epoch)):
            if self.augment is not None:
                inputs = self.augment(inputs, generator(self.seed, "augment", self.client, epoch, step))
            yield Batch(ids, inputs, labels)

    def batch_sizes(self) -> list[int]:
        """Sizes of the batches of an epoch (the first, where a sampler's differ from epoch to epoch)."""
        return [len(batch) for batch in self._indices(0)]

    def sample(self) -> Batch:
        """The first one or two samples, not augmented, to see shapes and types with."""
        ids, (inputs, labels) = next(self._fetch([list(range(min(2, len(self))))], 0))
        return Batch(ids, inputs, labels)

    def _indices(self, epoch: int) -> list[list[int]]:
        if self.loader is None:
            count = len(self)
            order = torch.arange(count)
            if self.shuffle:
                order = torch.randperm(count, generator=generator(self.seed, "order", self.client, epoch))
            batches = [part.tolist() for part in order.split(self.batch_size)]
            return batches[:-1] if self.drop_last and len(batches[-1]) < self.batch_size else batches
        # A sampler draws from its own generator, if it has one, or from the global one; both are seeded by name here.
        for owner in (self.loader, self.loader.sampler, self.loader.batch_sampler):
            own = getattr(owner, "generator", None)
            if own is not None:
                own.manual_seed(derive(self.seed, "order", self.client, epoch))
        with seeded(self.seed, "order", self.client, epoch):
            return [list(batch) for batch in self.loader.batch_sampler]  # type: ignore[union-attr]

    def _fetch(self, indices: list[list[int]], epoch: int) -> Iterator[tuple[Tensor, Any]]:
        if isinstance(self.dataset, Images):
            for batch in indices:
                ids = torch.tensor(batch)
                yield ids, self.dataset.fetch(ids)
            return
        loader = self.loader
        batches = DataLoader(
            _Indexed(self.dataset),
            batch_sampler=indices,
            collate_fn=_CollateIndexed(loader.collate_fn if loader is not None else default_collate),
            num_workers=loader.num_workers if loader is not None else 0,
            generator=generator(self.seed, "workers", self.client, epoch),
        )
        source = iter(batches)
        for step in range(len(indices)):
            # A data set may draw in __getitem__ (random transforms), in this process when there are no workers.
            with seeded(self.seed, "fetch", self.client, epoch, step):
                ids, item = next(source)
            if not isinstance(item, (tuple, list)) or len(item) != 2 or not all(isinstance(t, Tensor) for t in item):
                parts = (
                    [type(part).__name__ for part in item] if isinstance(item, (tuple, list)) else type(item).__name__
                )
                raise ConfigError(
                    f"expected a data set of (input, label) pairs that collate to two tensors, got {parts}"
                )
            yield ids, item
