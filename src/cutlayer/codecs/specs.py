"""The names of codecs: a short spec, in configs and in frames, that says how codecs are composed.

    transfer = [ memory ">" ] spec
    memory   = "delta" [ tolerance ] | "ef"
    spec     = [ sparsity ">" ] format { ":" option } [ "+" lossless ]
    sparsity = "topk" fraction | "randtopk" fraction [ "," chance ]
    format   = name [ "@" version ]
    option   = "channel" | "stochastic" | "tensor" | "nearest"
    lossless = "zstd" [ "@" version ]

Examples: `mxfp4+zstd`, `fp8_e4m3:channel:stochastic`, `topk0.1>fp16`, `randtopk0.05,0.1>fp8_e4m3+zstd`,
`delta0.02>mxfp4+zstd`. A memory is held by the sender (of `delta` by the receiver, too), outside the codec; it stands
in configs only, frames name the codec of their bytes. A version is written only if it is not 1, so that a release
that does not know it refuses the frame. A codec's `name` is its spec in canonical form: defaults left out, options in
order.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from cutlayer.codecs import elements, integers
from cutlayer.codecs.affine import AffineInteger
from cutlayer.codecs.base import Codec
from cutlayer.codecs.blocks import MX, NVFP4
from cutlayer.codecs.floats import FixedFloat8, PlainFloat, ScaledFloat8
from cutlayer.codecs.lossless import Lossless
from cutlayer.codecs.sparse import TopK
from cutlayer.errors import ConfigError, unknown

DEFAULTS = ("tensor", "nearest")
OPTIONS = ("channel", "stochastic")


@dataclass(frozen=True)
class Format:
    """A number format that a spec can name: how to make its codec, and what can be asked of it."""

    make: Callable[[str, frozenset[str]], Codec]
    options: tuple[str, ...] = ()
    version: int = 1


def _scaled(element: elements.Element) -> Format:
    return Format(
        lambda name, chosen: ScaledFloat8(name, element, "channel" in chosen, "stochastic" in chosen), OPTIONS
    )


def _fixed(element: elements.Element, gain: float = 1.0) -> Format:
    return Format(lambda name, chosen: FixedFloat8(name, element, gain, "stochastic" in chosen), ("stochastic",))


def _mx(element: elements.Element) -> Format:
    return Format(lambda name, chosen: MX(name, element, 32, "stochastic" in chosen), ("stochastic",))


def _affine(bits: int) -> Format:
    return Format(lambda name, chosen: AffineInteger(name, bits, "stochastic" in chosen), ("stochastic",))


FLOAT_FORMATS: dict[str, Format] = {
    "fp32": Format(lambda name, chosen: PlainFloat(name, torch.float32)),
    "fp16": Format(lambda name, chosen: PlainFloat(name, torch.float16)),
    "bf16": Format(lambda name, chosen: PlainFloat(name, torch.bfloat16)),
    "fp8_e4m3": _scaled(elements.E4M3),
    "fp8_e5m2": _scaled(elements.E5M2),
    "hfp8_e4m3": _fixed(elements.E4M3_HFP8),
    # Backward 1-5-2 with loss scaling: gradients at the cut are of the order of 1 / batch size and smaller, which would
    # fall below the smallest subnormal, 2^-16. With 2^12 magnitudes from 2^-28 to 14 are represented.
    "hfp8_e5m2": _fixed(elements.E5M2, 2.0**12),
    "mxfp8_e4m3": _mx(elements.E4M3),
    "mxfp8_e5m2": _mx(elements.E5M2),
    "mxfp6_e2m3": _mx(elements.E2M3),
    "mxfp6_e3m2": _mx(elements.E3M2),
    "mxfp4": _mx(elements.E2M1),
    "nvfp4": Format(lambda name, chosen: NVFP4(name, elements.E2M1, 16, "stochastic" in chosen), ("stochastic",)),
    "int8": _affine(8),
    "int4": _affine(4),
}
INTEGER_CODECS: dict[str, Codec] = {c.name: c for c in (integers.U8, integers.U16, integers.U32, integers.I64)}
SPARSITIES = ("topk", "randtopk")
LOSSLESS: dict[str, int] = {"zstd": 1}

# Names for both directions at once: (activations, gradients).
PAIRS: dict[str, tuple[str, str]] = {
    **{name: (name, name) for name in FLOAT_FORMATS},
    "fp8": ("fp8_e4m3", "fp8_e5m2"),
    "hfp8": ("hfp8_e4m3", "hfp8_e5m2"),
    "mxfp8": ("mxfp8_e4m3", "mxfp8_e5m2"),
    "mxfp6": ("mxfp6_e2m3", "mxfp6_e3m2"),
}

NUMBER = r"(\d*\.?\d+(?:e-?\d+)?)"
MAX_SPEC = 128  # characters; specs come from the network too


@dataclass(frozen=True)
class Spec:
    """A spec, parsed.

    Attributes:
        format: of the values, a name in `FLOAT_FORMATS`.
        options: those that are not the default, in the order of `OPTIONS`.
        fraction: of the values that is sent; None for all of them.
        chance: of `randtopk`; None if the largest values are sent.
        lossless: the stage that follows, as it is written, or "".
    """

    format: str
    options: tuple[str, ...] = ()
    fraction: float | None = None
    chance: float | None = None
    lossless: str = ""

    def codec(self) -> Codec:
        """The codec that it stands for; its name is the spec in canonical form."""
        known = FLOAT_FORMATS[self.format]
        codec = known.make(
            ":".join([_with_version(self.format, known.version), *self.options]), frozenset(self.options)
        )
        if self.fraction is not None:
            head = f"topk{self.fraction:g}" if self.chance is None else f"randtopk{self.fraction:g},{self.chance:g}"
            codec = TopK(f"{head}>{codec.name}", codec, self.fraction, self.chance or 0.0)
        return Lossless(f"{codec.name}+{self.lossless}", codec) if self.lossless else codec

    def deterministic(self) -> Spec:
        """The same without draws: rounding to nearest, and `topk` for `randtopk`."""
        return replace(self, options=tuple(o for o in self.options if o != "stochastic"), chance=None)


def parse(spec: str, direction: int | None = None) -> Spec:
    """A spec of activations or gradients, without a memory. Raises ConfigError with the known names.

    Args:
        direction: what the name of a pair stands for: 0 for its codec of activations, 1 for that of gradients; None if
            such a name is refused.
    """
    body, plus, stage = spec.partition("+")
    sparsity, arrow, written = body.rpartition(">")
    name, options = _format(written, spec, direction)
    fraction, chance = _sparsity(sparsity, options, spec) if arrow else (None, None)
    lossless = _versioned("lossless stage", stage, LOSSLESS, spec) if plus else ""
    return Spec(name, options, fraction, chance, lossless and _with_version(lossless, LOSSLESS[lossless]))


def get_codec(spec: str) -> Codec:
    """The codec of this spec, as it stands in configs and in frames. Raises ConfigError with the known names."""
    return INTEGER_CODECS.get(spec) or get_float_codec(spec)


@lru_cache(maxsize=256)
def get_float_codec(spec: str, direction: int | None = None) -> Codec:
    """The codec of this spec for activations or gradients, as `parse`. Raises ConfigError with the known names."""
    if len(spec) > MAX_SPEC:
        raise ConfigError(f"codec: expected a spec of at most {MAX_SPEC} characters, got {len(spec)}")
    return parse(spec, direction).codec()


@dataclass(frozen=True)
class Transfer:
    """What a config asks for in one direction.

    Attributes:
        name: its spec in canonical form.
        codec: of the bytes that cross.
        delta: None, or the tolerance of `delta`: the relative change below which a sample is not sent (`delta`).
        feedback: whether what the codec loses is remembered and added the next time (`feedback`).
    """

    name: str
    codec: Codec
    delta: float | None = None
    feedback: bool = False


@lru_cache(maxsize=256)
def get_transfer(spec: str, direction: int | None = None) -> Transfer:
    """The transfer of this spec, as `parse`. Raises ConfigError with the known names."""
    match = re.fullmatch(rf"(?:(ef)|(delta){NUMBER}?)>(.*)", spec[:MAX_SPEC])
    if not match:
        codec = get_float_codec(spec, direction)
        return Transfer(codec.name, codec)
    codec = get_float_codec(spec.partition(">")[2], direction)
    if match[1]:
        return Transfer(f"ef>{codec.name}", codec, feedback=True)
    tolerance = float(f"{float(match[3] or 0):g}")
    if tolerance >= 1:
        raise ConfigError(f"{spec!r}: expected a tolerance below 1, relative to a sample's norm, got {tolerance}")
    return Transfer(f"delta{tolerance:g}>{codec.name}" if tolerance else f"delta>{codec.name}", codec, tolerance)


def get_pair(spec: str) -> tuple[Transfer, Transfer]:
    """Transfers of (activations, gradients) from one spec, from two with a slash between, or from a name of `PAIRS`.

    A pair's name can stand where a format's does: `mxfp8+zstd` is `mxfp8_e4m3+zstd/mxfp8_e5m2+zstd`.
    """
    up, slash, down = spec.partition("/")
    return (get_transfer(up), get_transfer(down)) if slash else (get_transfer(spec, 0), get_transfer(spec, 1))


def evaluation_codec(transfer: Transfer) -> Codec:
    """The codec for evaluation: without draws (`topk` for `randtopk`, rounding to nearest) and without memory.

    With `delta` the receiver learns from references in fp16, which are more than the codec says in one sending.
    """
    spec = parse(transfer.codec.name).deterministic()
    return (spec if transfer.delta is None else Spec("fp16", lossless=spec.lossless)).codec()


def _format(written: str, spec: str, direction: int | None) -> tuple[str, tuple[str, ...]]:
    """Format and options of `name[@version][:option]...`."""
    head, *asked = written.split(":")
    name = _versioned("codec", head, {name: known.version for name, known in FLOAT_FORMATS.items()}, spec, direction)
    known = FLOAT_FORMATS[name]
    for option in asked:
        if option not in known.options and option not in DEFAULTS:
            raise ConfigError(f"{unknown(f'option of {name}', option, [*DEFAULTS, *known.options])}; in {spec!r}")
    return name, tuple(option for option in OPTIONS if option in asked)


def _with_version(name: str, version: int) -> str:
    return name if version == 1 else f"{name}@{version}"


def _versioned(what: str, written: str, known: dict[str, int], spec: str, direction: int | None = None) -> str:
    """The name in `name[@version]`, or what it stands for in a direction, checked with its version."""
    name, at, version = written.partition("@")
    if direction is not None and name in PAIRS:
        name = PAIRS[name][direction]
    if name not in known and name in PAIRS:
        raise ConfigError(f"{name!r} stands for two codecs; for one direction write {' or '.join(PAIRS[name])}")
    if name not in known:
        names = known if direction is None else PAIRS
        raise ConfigError(f"{unknown(what, name, names)}" + (f"; in {spec!r}" if spec != name else ""))
    if at and version != str(known[name]):
        raise ConfigError(
            f"{what} {name!r} in version {version!r}: this release knows version {known[name]}; both sides need the "
            "same release"
        )
    return name


def _sparsity(written: str, options: tuple[str, ...], spec: str) -> tuple[float, float | None]:
    """Fraction and chance of `topk<fraction>` or `randtopk<fraction>[,<chance>]`."""
    match = re.fullmatch(rf"(rand)?topk{NUMBER}(?:,{NUMBER})?", written)
    if not match or (match[3] and not match[1]):
        examples = ["topk0.1>", "randtopk0.1>", "randtopk0.1,0.2>"]
        raise ConfigError(f"{unknown('sparsification', written, examples)}; in {spec!r}")
    fraction, chance = float(match[2]), float(match[3] or 0.1) if match[1] else None
    if not (0 < fraction <= 1 and 0 <= (chance or 0.0) < 1):
        raise ConfigError(
            f"sparsification {written!r}: expected a fraction above 0 and up to 1, and a chance from 0 to below 1"
        )
    if "channel" in options:
        raise ConfigError(f"{spec!r}: values chosen by {written!r} have no channels; leave ':channel' out")
    return float(f"{fraction:g}"), None if chance is None else float(f"{chance:g}")
