"""What a run does in which epoch with whose batches: as far as it is known before training, and whatever the cut is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cutlayer.backends.client_data import ClientData
from cutlayer.codecs.integers import narrowest
from cutlayer.errors import ConfigError
from cutlayer.method import Method, Training
from cutlayer.schedule import Budget, Exchange, LossBased, Outlook, Schedule, State


@dataclass(frozen=True, kw_only=True)
class Stated(Schedule):
    """Exchanges that are stated beforehand, epoch by epoch, such as "AABC"."""

    exchanges: str = "A"

    def start(self) -> State:
        """The first of them."""
        return State(Exchange(self.exchanges[0]))

    def rule(self, state: State, loss: float) -> Exchange:
        """The one that is stated for the next epoch; after the last one it stays."""
        return Exchange(self.exchanges[min(state.epoch + 1, len(self.exchanges) - 1)])


def stated(text: str, epochs: int) -> str:
    """Exchanges from "5A 1B 94C", or epoch by epoch from "AABCC". Raises ConfigError if they do not make up a run."""
    if not re.fullmatch(r"(\d*\s*[ABC][\s,]*)+", text.strip()):
        raise ConfigError(f"exchanges: expected epochs of A, B and C, such as '5A 1B 94C' or 'AABCC', got {text!r}")
    parts = re.findall(r"(\d*)\s*([ABC])", text)
    found = "".join(letter * int(count or 1) for count, letter in parts)
    if len(found) != epochs:
        raise ConfigError(f"exchanges: expected {epochs} epochs in all, got {len(found)} in {text!r}")
    if not found.startswith("A"):
        raise ConfigError(f"exchanges: the first epoch is always A, got {text!r}")
    if "C" in found and "B" not in found[: found.index("C")]:
        raise ConfigError(f"exchanges: a C epoch needs a B epoch before it, got {text!r}")
    return found


def known_exchanges(schedule: Schedule, training: Training) -> str | None:
    """The exchanges of a run; None for a schedule that decides by the loss, or by what was spent."""
    if isinstance(schedule, LossBased | Budget):
        return None
    schedule = schedule.for_run(Outlook(training.epochs, training.server_rates))
    state, letters = schedule.start(), ""
    for _ in range(training.epochs):
        letters += state.exchange.value
        state = schedule.next(state, 1.0)
    return letters


class Outline(Dataset):
    """So many samples that all look like those that are given, to plan without data.

    Args:
        inputs: [B, ...].
        labels: [B, ...].
    """

    def __init__(self, inputs: Tensor, labels: Tensor, samples: int) -> None:
        self.inputs, self.labels, self.samples = inputs, labels, samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        place = index % len(self.labels)
        return self.inputs[place], self.labels[place]


@dataclass(frozen=True)
class Steps:
    """Steps of an epoch whose frames have the same length, but for their numbers.

    Attributes:
        number: of one of them; those of the others take as many bytes in a header.
        samples: in each frame.
        ids: name of the codec of the sample ids.
        microbatch, microbatches, whole: as in `messages.Step`, which has samples in place of `whole`.
    """

    number: int
    samples: int
    ids: str
    microbatch: int = 0
    microbatches: int = 1
    whole: int = 0


class Load:
    """The batches of every client of a run.

    Attributes:
        feeds: each client's batches for training and, if it has any, for evaluation.
        label: labels of one or two samples.
    """

    def __init__(self, data: Sequence[ClientData], method: Method, training: Training) -> None:
        if method.fleet.dropout:
            raise ConfigError("dropout: expected none; a plan is of clients that stay to the end of an epoch")
        self.data, self.method, self.training = list(data), method, training
        self.feeds = [held.feeds(number, training) for number, held in enumerate(data)]
        self._steps: dict[tuple[int, int, int, int], Counter[Steps]] = {}

    @cached_property
    def first(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels of the first client's first batch, at most."""
        feed = self.feeds[0][0]
        batch = next(iter(feed.epoch(0)))
        return batch.inputs, batch.labels

    @property
    def clients(self) -> int:
        """How many clients there are."""
        return len(self.feeds)

    @cached_property
    def sizes(self) -> list[Counter[int]]:
        """Of each client, how many batches of each size an epoch has."""
        return [Counter(train.batch_sizes()) for train, _ in self.feeds]

    @property
    def samples(self) -> int:
        """Training samples of all clients."""
        return sum(len(train) for train, _ in self.feeds)

    def steps(self, client: int, epoch: int, microbatches: int = 1, every: int = 1) -> Counter[Steps]:
        """The steps of an epoch, each in so many microbatches, as far as they differ in length.

        Args:
            every: of so many batches, the first is a step.
        """
        key = client, epoch, microbatches, every
        if key not in self._steps:
            train = self.feeds[client][0]
            self._steps[key] = _grouped(train.order(epoch)[::every], len(train), microbatches)
        return self._steps[key]

    @cached_property
    def evaluation(self) -> list[Counter[Steps]]:
        """The batches of each client's evaluation."""
        return [_grouped(test.order(0), len(test)) if test is not None else Counter() for _, test in self.feeds]


def _grouped(batches: Sequence[Sequence[int]], samples: int, microbatches: int = 1) -> Counter[Steps]:
    found: Counter[Steps] = Counter()
    for number, ids in enumerate(batches):
        size = -(-len(ids) // microbatches)
        pieces = [ids[start : start + size] for start in range(0, len(ids), size)]
        for microbatch, piece in enumerate(pieces):
            codec = narrowest(torch.tensor([0 if samples <= 256 else max(piece)])).name
            whole = len(ids) if len(pieces) > 1 else 0
            found[Steps(same_width(number), len(piece), codec, microbatch, len(pieces), whole)] += 1
    return found


def same_width(number: int) -> int:
    """The smallest whole number that msgpack writes in as many bytes."""
    return next(least for least in (1 << 32, 1 << 16, 256, 128, 0) if number >= least)
