"""Coders for the lossless stage: bits a value and milliseconds on the E4M3 codes of real activations and gradients.

    CUTLAYER_DATA=<folder with CIFAR-10> python benchmarks/codecs.py make FILE
    pip install brotli constriction lz4                     # those that are not installed are left out
    python benchmarks/lossless.py FILE [--repeat 9]

One thread; processor time, the median. Compares `+zstd` (`cutlayer/formats/lossless.py`) with other coders.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from safetensors.torch import load_file

from cutlayer.codecs import get_codec
from cutlayer.records.environment import environment
from cutlayer.streams import compression_parameters

Coder = tuple[str, Callable[[Any], Any], Callable[[Any], Any]]  # name, compress, decompress


def zstd(name: str, compressor: zstandard.ZstdCompressor) -> Coder:
    return name, compressor.compress, zstandard.ZstdDecompressor().decompress


def zlib_with(name: str, level: int, strategy: int) -> Coder:
    def compress(data: bytes) -> bytes:
        coder = zlib.compressobj(level, strategy=strategy)
        return coder.compress(data) + coder.flush()

    return name, compress, zlib.decompress


def coders() -> Iterator[Coder]:
    """Name, compress and decompress of each coder that is there."""
    yield zstd("zstd, search switched off", zstandard.ZstdCompressor(compression_params=compression_parameters()))
    for level in (1, 3, 19, -1, -5):
        yield zstd(f"zstd level {level}", zstandard.ZstdCompressor(level=level))
    yield zlib_with("zlib, Huffman only", 6, zlib.Z_HUFFMAN_ONLY)
    yield zlib_with("zlib level 1", 1, zlib.Z_DEFAULT_STRATEGY)
    if (lz4 := found("lz4.frame")) is not None:
        yield "lz4", lz4.compress, lz4.decompress
    if (brotli := found("brotli")) is not None:
        for quality in (1, 5):
            yield f"brotli {quality}", lambda data, q=quality: brotli.compress(data, quality=q), brotli.decompress
    if (constriction := found("constriction")) is not None:
        yield rans(constriction)


def found(name: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def rans(constriction) -> Coder:
    """rANS with the codes' own frequencies, whose 256 numbers are not counted."""
    coder = constriction.stream.stack.AnsCoder

    def compress(data: bytes) -> tuple:
        codes = np.frombuffer(data, np.uint8)
        counts = np.bincount(codes, minlength=256).astype(np.float32) + 1e-3
        model = constriction.stream.model.Categorical(counts / counts.sum(), perfect=False)
        stack = coder()
        stack.encode_reverse(codes.astype(np.int32), model)
        return stack.get_compressed().tobytes(), model, len(codes)

    def decompress(packed: tuple) -> bytes:
        words, model, size = packed
        return coder(np.frombuffer(words, np.uint32)).decode(model, size).astype(np.uint8).tobytes()

    return "rANS (constriction)", compress, decompress


def median_ms(work: Callable[[object], object], given: object, repeat: int) -> float:
    work(given)
    seconds = []
    for _ in range(repeat):
        start = time.thread_time()
        work(given)
        seconds.append(time.thread_time() - start)
    return 1000 * statistics.median(seconds)


def line(coder: Coder, given: object, values: int, repeat: int) -> str:
    """A line of the table."""
    name, compress, decompress = coder
    packed = compress(given)
    bits = 8 * len(packed[0] if isinstance(packed, tuple) else packed) / values
    there, back = median_ms(compress, given, repeat), median_ms(decompress, packed, repeat)
    return f"| {name} | {bits:.2f} | {there:.1f} | {back:.1f} |"


def show(file: Path, repeat: int) -> None:
    torch.set_num_threads(1)
    where = environment()
    print(f"{where['processor']}, Python {where['python']}, zstandard {zstandard.__version__}, n = {repeat}")
    for name, values in load_file(file).items():
        encoded = get_codec("fp8_e4m3").encode(values)
        codes = encoded.rows.numpy().tobytes()
        share = np.bincount(encoded.rows.reshape(-1).numpy(), minlength=256) / len(codes)
        entropy = -float((share[share > 0] * np.log2(share[share > 0])).sum())
        print(f"\n{name}: {len(codes)} codes, {100 * share[0]:.0f} % zeros, entropy {entropy:.2f} bits\n")
        print("| coder | bits a value | encode ms | decode ms |\n|---|---|---|---|")
        stage = whole_stage(len(encoded), encoded.shape)
        assert torch.equal(stage[2](stage[1](encoded)).rows, encoded.rows), "+zstd does not give back what it took"
        print(line(stage, encoded, len(codes), repeat))
        for coder in coders():
            assert coder[2](coder[1](codes)) == codes, f"{coder[0]} does not give back what it took"
            print(line(coder, codes, len(codes), repeat), flush=True)


def whole_stage(batch: int, shape: tuple[int, ...]) -> Coder:
    """What `+zstd` does: streams with many zeros cut in two, what does not pay left as it is."""
    codec = get_codec("fp8_e4m3+zstd")
    return (
        "`+zstd`",
        lambda encoded: b"".join(codec.pack(encoded)),
        lambda payload: codec.unpack(memoryview(payload), batch, shape),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--repeat", type=int, default=9)
    chosen = parser.parse_args()
    show(chosen.file, chosen.repeat)


if __name__ == "__main__":
    main()
