"""The grammar of codec specs: what is understood, what it is called, and what is refused with which words."""

import re

import pytest

from cutlayer.errors import ConfigError, RefusedError
from cutlayer.formats import PAIRS, evaluation_codec, get_codec, get_float_codec, get_pair, specs
from cutlayer.wire.frames import Frame, Step, pack, unpack


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("fp8_e4m3", "fp8_e4m3"),
        ("fp8_e4m3@1", "fp8_e4m3"),
        ("fp8_e4m3:tensor:nearest", "fp8_e4m3"),
        ("fp8_e4m3:stochastic:channel", "fp8_e4m3:channel:stochastic"),
        ("mxfp4+zstd@1", "mxfp4+zstd"),
        ("topk0.10>fp16", "topk0.1>fp16"),
        ("topk1e-3>fp16", "topk0.001>fp16"),
        ("randtopk.05>fp8_e4m3+zstd", "randtopk0.05,0.1>fp8_e4m3+zstd"),
        ("randtopk0.05,0.20>mxfp4:stochastic+zstd", "randtopk0.05,0.2>mxfp4:stochastic+zstd"),
    ],
)
def test_specs_have_one_canonical_name(spec: str, name: str) -> None:
    codec = get_codec(spec)
    assert codec.name == name
    assert get_codec(name) == codec
    assert get_float_codec(name) is get_float_codec(name)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("fp9", "unknown codec.*'fp9'; known: fp32, fp16, bf16"),
        ("", "unknown codec.*''; known: fp32"),
        ("mxfp4:channel", "unknown option of mxfp4 'channel'; known: tensor, nearest, stochastic"),
        ("mxfp4+lz4", "unknown lossless stage 'lz4'; known: zstd"),
        ("mxfp4+zstd+zstd", "unknown lossless stage 'zstd\\+zstd'; known: zstd"),
        ("top0.1>fp16", "unknown sparsification 'top0.1'; known: topk0.1>"),
        ("topk0.1,0.2>fp16", "unknown sparsification"),
        ("topk0.1>topk0.1>fp16", "unknown sparsification"),
        (">fp16", "unknown sparsification ''"),
        ("topk0>fp16", "expected a fraction above 0"),
        ("topk1.5>fp16", "expected a fraction above 0"),
        ("randtopk0.1,1.0>fp16", "a chance from 0 to below 1"),
        ("topk0.1>fp8_e4m3:channel", "leave ':channel' out"),
        ("mxfp4@2", "'mxfp4' in version '2': this release knows version 1"),
        ("mxfp4+zstd@3", "'zstd' in version '3': this release knows version 1"),
        ("x" * 1000, "at most 128 characters"),
    ],
)
def test_unknown_parts_are_refused_with_the_known_ones(spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        get_codec(spec)


def test_a_newer_version_carries_its_number_and_an_older_release_refuses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    newer = specs.Format(specs.FLOAT_FORMATS["mxfp4"].make, ("stochastic",), version=2)
    with monkeypatch.context() as release:
        release.setitem(specs.FLOAT_FORMATS, "mxfp4", newer)
        specs.get_float_codec.cache_clear()
        assert get_codec("mxfp4@2:stochastic+zstd").name == "mxfp4@2:stochastic+zstd"
        assert get_codec("mxfp4").name == "mxfp4@2"
        data = pack(Frame(Step(0, 0, 0), {"activations": get_codec("mxfp4").encode(torch.ones(2, 5))}))
    specs.get_float_codec.cache_clear()
    with pytest.raises(RefusedError, match=re.escape("this release knows version 1")):
        unpack(data)


@pytest.mark.parametrize(
    ("spec", "names"),
    [
        ("fp32", ("fp32", "fp32")),
        ("fp8", ("fp8_e4m3", "fp8_e5m2")),
        ("hfp8+zstd", ("hfp8_e4m3+zstd", "hfp8_e5m2+zstd")),
        ("topk0.1>mxfp8:stochastic+zstd",
         ("topk0.1>mxfp8_e4m3:stochastic+zstd", "topk0.1>mxfp8_e5m2:stochastic+zstd")),
        ("mxfp4+zstd/fp8_e5m2:stochastic", ("mxfp4+zstd", "fp8_e5m2:stochastic")),
    ],
)  # fmt: skip
def test_pairs_of_both_directions(spec: str, names: tuple[str, str]) -> None:
    assert tuple(codec.name for codec in get_pair(spec)) == names


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("fp8_e4m3:channel:stochastic+zstd", "fp8_e4m3:channel+zstd"),
        ("randtopk0.05,0.2>mxfp4:stochastic+zstd", "topk0.05>mxfp4+zstd"),
        ("topk0.1>fp16", "topk0.1>fp16"),
    ],
)
def test_evaluation_does_not_draw(spec: str, name: str) -> None:
    assert evaluation_codec(spec).name == name


def test_every_pair_has_its_codecs() -> None:
    for pair in PAIRS:
        assert tuple(codec.name for codec in get_pair(pair)) == PAIRS[pair]
