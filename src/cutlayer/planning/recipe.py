"""The load of a run's config: with its data, if they are here, and otherwise with as many samples as it has."""

from __future__ import annotations

import torch

from cutlayer.backends.client_data import client_data_of
from cutlayer.data.datasets import DATASETS
from cutlayer.data.images import Images
from cutlayer.errors import ConfigError
from cutlayer.planning.load import Load
from cutlayer.runs.config import RunConfig


def load_of(config: RunConfig) -> tuple[Load, bool]:
    """The load of a run, and whether its data were read. Raises ConfigError if a partition needs data that are not."""
    try:
        train, test = config.datasets()
        read = True
    except ConfigError:
        if config.data.name not in DATASETS or config.partition != "iid":
            raise
        outline, read = config.data.outline(), False
        wanted = config.data.train_samples, config.data.test_samples
        train, test = (
            Images(
                torch.zeros((there, *outline.inputs.shape[1:]), dtype=torch.uint8),
                torch.arange(there) % outline.classes,
                outline.mean,
                outline.std,
                outline.classes,
            ).first(first)
            for there, first in zip(DATASETS[config.data.name].samples, wanted, strict=True)
        )
    parts, _ = config.divided(train)
    return Load(client_data_of(parts, test), config.method, config.training), read
