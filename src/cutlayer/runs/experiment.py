"""A config carried out: its data, its halves, its run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from cutlayer.backends.base import Backend
from cutlayer.backends.local import LOCAL
from cutlayer.durable import make_folder
from cutlayer.errors import ConfigError
from cutlayer.records.history import EpochRecord
from cutlayer.runs.beforehand import prepared
from cutlayer.runs.client_half import BEFOREHAND
from cutlayer.runs.config import RunConfig
from cutlayer.runs.fit import Result, fit
from cutlayer.runs.run import Run


def run_experiment(
    config: RunConfig,
    folder: str | Path | None = None,
    *,
    resume: bool = False,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    progress: bool | None = None,
    backend: Backend = LOCAL,
    init: str | Path | None = None,
) -> Result:
    """Carry out a config: what `cutlayer train` does.

    Args:
        config: of a recipe, or your own.
        folder: of the run, which then holds the config, too; without it nothing is written.
        resume, on_epoch, progress, backend, init: as in `fit`.

    Raises:
        ConfigError, DivergedError, StoreFullError: as in `fit`.
    """
    if not isinstance(config, RunConfig):
        raise ConfigError(f"expected a RunConfig, such as a recipe returns, got {type(config).__name__}")
    with threads(config.threads):
        train, test = config.datasets()
        if backend is LOCAL:
            train, test = train.on(config.training.device), test.on(config.training.device)
        parts, partition = config.divided(train)
        run = Run(folder, config.as_dict()) if folder is not None else None
        if run is not None and partition is not None:
            make_folder(run.folder)
            partition.save(run.folder / "partition.json")
        halves, flops = config.halves(train), 0
        if isinstance(config.client_half, BEFOREHAND):
            if run is not None and not resume:
                run.check_free()  # before anything of this run is written beside it
            apart = run.folder / "client_half" if run is not None else None
            halves, flops = prepared(halves, config.client_half, train, config.training, apart, on_epoch)
            if run is not None and flops:
                run.counts_beforehand.write({"flops": flops})
        result = fit(
            halves,
            parts,
            test,
            method=config.method,
            training=config.training,
            run=run,
            resume=resume,
            on_epoch=on_epoch,
            progress=progress,
            backend=backend,
            init=init,
        )
        return replace(result, history=replace(result.history, beforehand=flops)) if flops else result


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """PyTorch with so many threads, and afterwards with as many as before; None leaves them alone."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
