"""What a client does before a run in which its half is frozen: trains it by itself, or leaves it as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset

from cutlayer.data.batches import Batches
from cutlayer.data.images import Images
from cutlayer.errors import ConfigError
from cutlayer.method import Method, Training
from cutlayer.models.auxiliary import auxiliary_head
from cutlayer.models.cut import Halves
from cutlayer.models.flops import FlopTable
from cutlayer.records.history import EpochRecord
from cutlayer.regularize import Regularize
from cutlayer.runs.client_half import ClientHalf, LocalHead
from cutlayer.runs.fit import fit
from cutlayer.seeds import seeded
from cutlayer.stopping import EarlyStopping
from cutlayer.training.calibration import CALIBRATION_BATCHES, calibrate, norm_layers


def prepared(
    halves: Halves,
    chosen: ClientHalf,
    train: Dataset,
    training: Training,
    folder: Path | None,
    on_epoch: Callable[[EpochRecord], None] | None,
) -> tuple[Halves, int]:
    """The halves of a run whose client half is made beforehand, that one frozen, and the client's FLOPs for it.

    Args:
        folder: for the local training, which goes on from there; None if it is not to.
    """
    if not isinstance(train, Images):
        raise ConfigError("a client half that is made beforehand: expected images of one client")
    feed = Batches(train, batch_size=training.batch_size, seed=training.seed, augment=training.augment)
    sample, flops = feed.sample().inputs, 0
    table = FlopTable(halves.client, tuple(sample.shape[1:]), sample.dtype)
    if isinstance(chosen, LocalHead):
        with seeded(training.seed, "local head"):
            head = auxiliary_head(table.output_shape, train.classes, chosen.channels)
        # What is for the server or for evaluation has no part in it.
        local = replace(
            training,
            epochs=chosen.epochs,
            evaluate_every=chosen.epochs,
            server=training.client,
            keep_best=None,
            early_stopping=EarlyStopping(),
            regularize=Regularize(),
            microbatches=1,
        )
        # Both parts are on the device: their frames go nowhere, and are not counted.
        result = fit(
            Halves(halves.client, head),
            train,
            method=Method(),
            training=local,
            run=folder,
            resume=folder is not None,
            on_epoch=on_epoch,
            progress=False,
        )
        halves.client.load_state_dict(result.halves.client.state_dict())
        flops += result.history.flops("client") + result.history.flops("server")
    if norm_layers(halves.client):
        calibrate(halves.client.train(), partial(_measure, halves.client, feed, training))
        flops += sum(table(size)[0] for size in feed.batch_sizes()[:CALIBRATION_BATCHES])
    halves.client.requires_grad_(False)
    return halves, flops


def _measure(half: nn.Module, feed: Batches, training: Training) -> None:
    device = torch.device(training.device)
    half.to(device)
    for step, batch in enumerate(islice(feed.epoch(0), CALIBRATION_BATCHES)):
        with seeded(training.seed, "calibrate", 0, -1, step, device=device), training.autocast():
            half(batch.inputs.to(device))
    half.cpu()
