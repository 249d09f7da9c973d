"""The data sets that have a name: three public ones, read from their own files, in one registry."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from cutlayer.data.images import Images
from cutlayer.errors import ConfigError, unknown
from cutlayer.seeds import generator

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar.html"
FASHION_MNIST_URL = "https://github.com/zalandoresearch/fashion-mnist"

# Mean and standard deviation of each channel.
DIGITS_STATS = (0.305,), (0.376,)
CIFAR10_STATS = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
FASHION_MNIST_STATS = (0.219,), (0.332,)


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

    `folder` holds the four `*-ubyte.gz` files, gzipped or not, or a folder `fashion-mnist` with them, or torchvision's
    `FashionMNIST/raw`.
    """
    names = [f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
    places = [folder, *(folder / sub for sub in ("fashion-mnist", "FashionMNIST/raw", "FashionMNIST", "raw"))]
    there = [place for place in places if any((place / f"{n}{end}").is_file() for n in names for end in ("", ".gz"))]
    place = there[0] if there else folder
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


@dataclass(frozen=True)
class DataSet:
    """What is known of a data set by its name.

    Attributes:
        read: from the folder with its files to the training and the test part.
        shape: (C, H, W) of an image.
        samples: of the training and the test part.
        mean, std: as in `Images`.
        classes: their number.
    """

    read: Callable[[Path], tuple[Images, Images]]
    shape: tuple[int, int, int]
    samples: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: int = 10


DATASETS: dict[str, DataSet] = {
    "digits": DataSet(lambda folder: digits(), (1, 8, 8), (1437, 360), *DIGITS_STATS),
    "cifar10": DataSet(cifar10, (3, 32, 32), (50_000, 10_000), *CIFAR10_STATS),
    "fashion_mnist": DataSet(fashion_mnist, (1, 32, 32), (60_000, 10_000), *FASHION_MNIST_STATS),
}


def outline(name: str) -> Images:
    """A data set without its samples: what a network is built from, on a server that never sees them."""
    known = _known(name)
    inputs, labels = torch.empty((0, *known.shape), dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
    return Images(inputs, labels, known.mean, known.std, known.classes)


def load(name: str, folder: str | None = None) -> tuple[Images, Images]:
    """Training and test part of a data set. `folder` defaults to the environment variable CUTLAYER_DATA, or `data`."""
    return _known(name).read(Path(folder or os.environ.get("CUTLAYER_DATA") or "data").expanduser())


def _known(name: str) -> DataSet:
    if name not in DATASETS:
        raise ConfigError(unknown("data set", name, DATASETS))
    return DATASETS[name]
