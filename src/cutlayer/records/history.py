"""What a run measured: a record for each epoch, and the figures that follow from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import groupby
from typing import Any, Self, TypeVar

import msgspec

from cutlayer.errors import ConfigError, DamagedError, some, unknown
from cutlayer.records.drawing import draw, html_table
from cutlayer.schedule import Exchange

Value = TypeVar("Value")


def _of(kind: type[Value], values: Any) -> Value:
    """A dataclass from JSON values. Raises DamagedError if a field is unknown, missing, or of another type."""
    try:
        if strange := set(values) - {field.name for field in fields(kind)}:  # type: ignore[arg-type]
            raise DamagedError(f"it is damaged (unexpected entries {', '.join(sorted(strange))})")
        return msgspec.convert(values, kind)
    except (TypeError, msgspec.ValidationError) as error:
        raise DamagedError(f"it is damaged ({error})") from None


@dataclass(frozen=True)
class EpochRecord:
    """One epoch.

    Attributes:
        epoch: from 0.
        exchange: "A", "B" or "C".
        loss: mean training loss over the epoch's samples.
        samples: samples trained on.
        test: loss and metrics on the test data; empty if the epoch was not evaluated.
        bytes: by direction ("up", "down") and kind, see `ledger.Ledger`.
        flops: by party ("client", "server") and pass ("forward", "backward", "evaluation").
        seconds: by phase.
        states: the exchange of each client, such as "ABBA", if clients have states of their own; `exchange` is then
            the most that any of them had.
        absent: clients that did not take part in an epoch that exchanges something, or were lost before its end.
    """

    epoch: int
    exchange: str
    loss: float
    samples: int
    test: dict[str, float] = field(default_factory=dict)
    bytes: dict[str, dict[str, int]] = field(default_factory=dict)
    flops: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    states: str = ""
    absent: list[int] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The record from its JSON values. Raises DamagedError for what `as_dict` never returns."""
        return _of(cls, values)


def crossed(*costs: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """Bytes of all kinds by direction, of bytes by direction and kind."""
    return {way: sum(sum(bytes.get(way, {}).values()) for bytes in costs) for way in ("up", "down")}


@dataclass(frozen=True)
class Baseline:
    """What an epoch of all clients costs in plain split learning in 32 bits, in the same mode; see `plain`.

    Attributes:
        exchanged_bytes: activations and gradients, one of each for every sample; activations alone if the client half
            is frozen.
        client_flops: forward and backward of the client half, as far as it is trained.
        samples: samples trained on; 0 in a run of an older version, which did not say.
        all_bytes: all frames of training, labels, ids, headers and weights among them; 0 in older runs.
        first_bytes: the same in the first epoch, when there are no weights yet to hand on.
    """

    exchanged_bytes: int
    client_flops: int
    samples: int = 0
    all_bytes: int = 0
    first_bytes: int = 0

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The baseline from its JSON values. Raises DamagedError for what it never was."""
        return _of(cls, values)


@dataclass(frozen=True)
class History:
    """The epochs of a run, and totals over them. Evaluation is counted apart from training throughout.

    Reductions are relative to plain split learning in 32 bits of the samples that were trained on: those that clients
    sent and those that came from the store. A client that takes no part saves nothing.

    Attributes:
        given_up: bytes, by direction, of epochs that an interruption undid and that were trained again; no other
            figure counts them.
        merged: loss and metrics of the merged model in 32 bits on the test data, taken at the end of `fit` and not over
            the wire; empty before the end, and if no process has both halves and the test data.
        beforehand: FLOPs of the client before the first epoch, in making its half (`RunConfig.client_half`).
    """

    epochs: Sequence[EpochRecord]
    baseline: Baseline
    given_up: Mapping[str, int] = field(default_factory=dict)
    merged: Mapping[str, float] = field(default_factory=dict)
    beforehand: int = 0

    def __repr__(self) -> str:
        """Short: epochs, newest loss and scores, reductions."""
        counts = ", ".join(f"{self.count(exchange)} {exchange.value}" for exchange in Exchange)
        last = [f"loss {self.losses[-1]:.4g}"] if self.epochs else []
        scores = next((record.test for record in reversed(self.epochs) if record.test), {})
        last += [f"test {name} {value:.4g}" for name, value in scores.items()]
        ratios = (("traffic", self.traffic_reduction), ("client FLOPs", self.client_flops_reduction))
        last += [f"{name} {_compared(ratio)}" for name, ratio in ratios if math.isfinite(ratio)]
        return f"History({'; '.join([f'{len(self.epochs)} epochs ({counts})', *last])})"

    def to_frame(self) -> Any:
        """A pandas.DataFrame with a row for each epoch; nested values by dotted names, such as "test.accuracy".

        Raises ConfigError without pandas.
        """
        try:
            import pandas
        except ModuleNotFoundError:
            raise ConfigError("History.to_frame() needs pandas: pip install pandas") from None
        return pandas.DataFrame([flat(record.as_dict()) for record in self.epochs])

    def plot(self, metric: str | None = None, axes: Any = None) -> Any:
        """Training loss, a test metric and the exchanges by epoch, as matplotlib axes.

        Args:
            metric: by default the first that is not the loss.
            axes: to draw into; by default new ones.

        Raises ConfigError without matplotlib, or for an unknown metric.
        """
        known = list(dict.fromkeys(name for record in self.epochs for name in record.test))
        if metric is not None and metric not in known:
            raise ConfigError(unknown("metric", metric, known))
        return draw(self.epochs, metric or next((name for name in known if name != "loss"), None), axes)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        counts = ", ".join(f"{self.count(exchange)} {exchange.value}" for exchange in Exchange)
        runs = [f"{len(list(same))}{exchange}" for exchange, same in groupby(self.exchanges)]
        rows = [("epochs", f"{len(self.epochs)} ({counts})"), ("exchanges", some(runs, 20))]
        rows += [("training loss", f"{self.losses[-1]:.4g}")] if self.epochs else []
        scores = next((record.test for record in reversed(self.epochs) if record.test), {})
        rows += [(f"test {name}", f"{value:.4g}") for name, value in scores.items()]
        rows += [("sent", f"{self.bytes() / 1e6:.4g} MB"), ("client", f"{self.flops('client') / 1e9:.4g} GFLOPs")]
        for name, ratio in (("traffic", self.traffic_reduction), ("client FLOPs", self.client_flops_reduction)):
            rows += [(f"{name} reduced", f"{ratio:.4g}x")] if math.isfinite(ratio) else []
        return html_table("History", rows)

    @property
    def exchanges(self) -> str:
        """The states of the epochs, such as "AABCC"."""
        return "".join(record.exchange for record in self.epochs)

    @property
    def losses(self) -> list[float]:
        """Training loss by epoch."""
        return [record.loss for record in self.epochs]

    def test(self, metric: str = "accuracy") -> float | None:
        """The newest value of a test metric ("loss" among them); None if there was no evaluation yet.

        The test activations went over the wire, so it is that of the network with the codec in it; see `merged`.
        """
        known = {name for record in self.epochs for name in record.test}
        if known and metric not in known:
            raise ConfigError(unknown("metric", metric, sorted(known)))
        return next((r.test[metric] for r in reversed(self.epochs) if metric in r.test), None)

    def count(self, exchange: Exchange) -> int:
        """Epochs with this exchange."""
        return self.exchanges.count(exchange.value)

    def bytes(self, direction: str | None = None, kinds: Sequence[str] | None = None) -> int:
        """Bytes of training in a direction (both for None), of these kinds (all but "evaluation" for None)."""
        return sum(
            size
            for record in self.epochs
            for way, sizes in record.bytes.items()
            for kind, size in sizes.items()
            if direction in (None, way) and (kind in kinds if kinds is not None else kind != "evaluation")
        )

    def flops(self, party: str) -> int:
        """FLOPs of a party's training; of the client's evaluation see `evaluation_flops`."""
        passes = [item for record in self.epochs for item in record.flops.get(party, {}).items()]
        trained = sum(count for what, count in passes if what != "evaluation")
        return trained + (self.beforehand if party == "client" else 0)

    @property
    def evaluation_flops(self) -> int:
        """FLOPs of the clients' evaluation, and of the measuring of batch norm's statistics for it."""
        return sum(record.flops.get("client", {}).get("evaluation", 0) for record in self.epochs)

    @property
    def seconds(self) -> float:
        """Seconds in all phases."""
        return sum(sum(record.seconds.values()) for record in self.epochs)

    @property
    def traffic_reduction(self) -> float:
        """Activations and gradients, with their scales, of plain split learning, divided by those of the run.

        This is how the paper counts. NaN before any was sent.
        """
        return self._reduction(self.baseline.exchanged_bytes, self.bytes(kinds=("activations", "gradients")))

    @property
    def all_bytes_reduction(self) -> float:
        """All bytes of training of plain split learning in the same mode, divided by those of the run.

        NaN before any was sent, and for runs of an older version.
        """
        more = self.baseline.first_bytes - self.baseline.all_bytes
        first = self.epochs[0].samples * more / self.baseline.samples if self.epochs and more else 0.0
        return self._reduction(self.baseline.all_bytes, self.bytes(), first) if self.baseline.all_bytes else math.nan

    @property
    def client_flops_reduction(self) -> float:
        """Client FLOPs of plain split learning, divided by those of the run; NaN without any."""
        return self._reduction(self.baseline.client_flops, self.flops("client"))

    def _reduction(self, each: int, spent: int, more: float = 0.0) -> float:
        """What plain epochs of this cost each, and some more, divided by what was spent."""
        if not self.baseline.samples:
            plain = float(each * len(self.epochs))
        else:
            plain = each * sum(record.samples for record in self.epochs) / self.baseline.samples
        return (plain + more) / spent if spent else math.nan


def _compared(reduction: float) -> str:
    """What a reduction says, in words."""
    if abs(reduction - 1) < 0.005:
        return "as in plain split learning"
    return f"{reduction:.4g}x less" if reduction > 1 or reduction <= 0 else f"{1 / reduction:.4g}x more"


def flat(values: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested values by dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}": value}
    return found
