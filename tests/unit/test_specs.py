"""The grammar of codec specs: what is understood, what it is called, and what is refused with which words."""

import re

import pytest

from cutlayer import Always, Method
from cutlayer.codecs import PAIRS, evaluation_codec, get_codec, get_float_codec, get_pair, get_transfer, specs
from cutlayer.errors import ConfigError, RefusedError
from cutlayer.wire.frames import Frame, pack, unpack
from cutlayer.wire.messages import Step


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
        ("fp8@1:channel", ("fp8_e4m3:channel", "fp8_e5m2:channel")),
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
        ("delta0.1>mxfp4:stochastic", "fp16"),
        ("delta>randtopk0.1>fp8_e4m3+zstd", "fp16+zstd"),
    ],
)
def test_evaluation_has_no_draws_and_no_memory(spec: str, name: str) -> None:
    assert evaluation_codec(get_transfer(spec)).name == name


@pytest.mark.parametrize(
    ("spec", "name", "codec", "delta", "feedback"),
    [
        ("mxfp4", "mxfp4", "mxfp4", None, False),
        ("delta>mxfp4+zstd@1", "delta>mxfp4+zstd", "mxfp4+zstd", 0.0, False),
        ("delta0>fp16", "delta>fp16", "fp16", 0.0, False),
        ("delta0.050>topk0.10>fp16", "delta0.05>topk0.1>fp16", "topk0.1>fp16", 0.05, False),
        ("ef>randtopk0.1>fp8_e5m2", "ef>randtopk0.1,0.1>fp8_e5m2", "randtopk0.1,0.1>fp8_e5m2", None, True),
    ],
)
def test_memories_stand_in_front(spec: str, name: str, codec: str, delta: float | None, feedback: bool) -> None:
    transfer = get_transfer(spec)
    assert (transfer.name, transfer.codec.name, transfer.delta, transfer.feedback) == (name, codec, delta, feedback)
    assert get_transfer(name) == transfer


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("delta1>fp16", "a tolerance below 1, relative to a sample's norm, got 1.0"),
        ("delta-0.1>fp16", "unknown sparsification 'delta-0.1'"),
        ("ef0.5>fp16", "unknown sparsification 'ef0.5'"),
        ("delta>delta>fp16", "unknown sparsification 'delta'"),
        ("topk0.1>delta>fp16", "unknown sparsification 'topk0.1>delta'"),
        ("delta>", "unknown codec ''"),
        ("delta>" + "x" * 1000, "at most 128 characters"),
    ],
)
def test_memories_in_other_places_are_refused(spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        get_transfer(spec)


def test_a_memory_belongs_to_one_direction_and_to_no_frame() -> None:
    with pytest.raises(ConfigError, match="'delta>' is for activations alone"):
        Method.of(Always(), "delta>fp16")
    with pytest.raises(ConfigError, match="'ef>' is for gradients alone"):
        Method.of(Always(), "ef>fp16")
    method = Method.of(Always(), "delta>mxfp4/ef>mxfp4")
    assert (method.activations, method.gradients) == ("delta>mxfp4", "ef>mxfp4")
    for spec in (method.activations, method.gradients):
        with pytest.raises(ConfigError, match="unknown sparsification"):
            get_codec(spec)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            "hfp8:channel",
            "unknown option of hfp8_e4m3 'channel'; known: tensor, nearest, stochastic; in 'hfp8:channel'",
        ),
        ("fp8@2", "'fp8_e4m3' in version '2': this release knows version 1"),
        ("fp8/fp8", "'fp8' stands for two codecs; for one direction write fp8_e4m3 or fp8_e5m2"),
        ("fp32/", "unknown codec ''"),
    ],
)
def test_what_no_pair_is_is_refused(spec: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        get_pair(spec)


def test_every_pair_has_its_codecs() -> None:
    for pair in PAIRS:
        assert tuple(codec.name for codec in get_pair(pair)) == PAIRS[pair]
