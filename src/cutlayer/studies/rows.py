"""The rows of a study's table, and the plan of runs that fills it: each row with as many seeds as tell something."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cutlayer.errors import ConfigError, unknown
from cutlayer.method import Method, Training
from cutlayer.runs.client_half import ClientHalf
from cutlayer.runs.config import RunConfig
from cutlayer.strategies import ParallelSplit
from cutlayer.studies.presets import Preset


def as_preset(training: Training) -> Training:
    """No other training than the preset's."""
    return training


def unaugmented(training: Training) -> Training:
    """Without augmentation: once the client half stands still, what is stored is what it would send again."""
    return replace(training, augment=None)


@dataclass(frozen=True, eq=False)
class Row:
    """A row of a study's table.

    Attributes:
        name: for the command line.
        title: in the table.
        method: from the number of epochs.
        network: one of the preset's.
        clients, partition: as in `RunConfig`.
        seeds: most runs.
        claim: what the paper says of this case.
        against: name of the row of plain split learning that it is compared with; its own for such a row.
        presets: those that have the row; None for all.
        client_half: as in `RunConfig`.
        changes: of the preset's `ModelConfig`, such as {"narrow": 4}.
        trained: how, from how the preset has it; the presets' own by default.
    """

    name: str
    title: str
    method: Callable[[int], Method]
    network: str = "vgg11"
    clients: int = 1
    partition: str = "iid"
    seeds: int = 1
    claim: str = ""
    against: str = "plain"
    presets: tuple[str, ...] | None = None
    client_half: ClientHalf | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    trained: Callable[[Training], Training] = as_preset

    def config(self, preset: Preset, seed: int, device: str = "cpu") -> RunConfig:
        """The run with this seed."""
        method = self.method(preset.training.epochs)
        training = self.trained(replace(preset.training_of(self.network, seed), device=device))
        if self.clients > 1 and isinstance(method.fleet.strategy, ParallelSplit):
            # The clients' parts of a step make one batch.
            training = replace(training, batch_size=max(2, training.batch_size // self.clients))
        model = replace(preset.networks[self.network], **self.changes)
        clients, partition, half = self.clients, self.partition, self.client_half
        return RunConfig(preset.data, model, method, training, clients, partition, threads=1, client_half=half)

    def is_in(self, preset: Preset) -> bool:
        """Whether this preset has the row."""
        return self.network in preset.networks and (self.presets is None or preset.name in self.presets)


@dataclass(frozen=True, eq=False)
class Plan:
    """The runs of a study in one preset, in the order in which they tell most.

    Attributes:
        groups: rows, group by group; within one all rows have their first run before any has its second.
        device: where the runs are.
    """

    preset: Preset
    groups: Sequence[Sequence[Row]]
    device: str = "cpu"

    @property
    def rows(self) -> list[Row]:
        """The rows that this preset has."""
        return [row for group in self.groups for row in group if row.is_in(self.preset)]

    def runs(self, names: Sequence[str] | None = None, seeds: int | None = None) -> list[tuple[Row, RunConfig]]:
        """What is to be run, in order.

        Args:
            names: rows to run; None for all.
            seeds: most runs of a row; by default as many as row and preset say.

        Raises:
            ConfigError: a row that there is not.
        """
        known = [row.name for row in self.rows]
        if strange := [name for name in names or () if name not in known]:
            raise ConfigError(unknown("row", strange[0], known))
        most = min(self.preset.seeds, seeds or self.preset.seeds)
        chosen: list[tuple[Row, RunConfig]] = []
        for group in self.groups:
            rows = [row for row in group if row.is_in(self.preset) and (names is None or row.name in names)]
            for seed in range(most):
                chosen += [(row, self.config(row, seed)) for row in rows if seed < row.seeds]
        return chosen

    def config(self, row: Row, seed: int) -> RunConfig:
        """The run of a row with this seed."""
        return row.config(self.preset, seed, self.device)
