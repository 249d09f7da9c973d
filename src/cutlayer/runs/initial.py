"""Beginning from another run's weights, which the new run stores, so that it does not depend on the other one."""

from __future__ import annotations

from pathlib import Path

import torch

from cutlayer.errors import ConfigError
from cutlayer.files import load_tensors
from cutlayer.models.cut import Halves
from cutlayer.records.folder import Initial
from cutlayer.runs.run import Run
from cutlayer.runs.weights import load_into


def initialize(halves: Halves, init: str | Path | Run | None, folder: Run | None, resume: bool) -> None:
    """Load into the halves what the run begins with, if that is another run's weights, and have the run store it.

    Args:
        halves: loaded in place.
        init: the other run, finished or not, of a network of the same structure.
        folder: the run that begins or is resumed.
        resume: whether it goes on, if it was begun before; then with what it was begun with.

    Raises:
        ConfigError: there are no such weights, they are of another network, or the run was begun with others.
    """
    source = init if isinstance(init, Run) or init is None else Run(init)
    if folder is not None and resume and folder.exists():
        begun = folder.read_config().get("init")
        if source is not None and not (begun and _is_that_of(folder, begun["run"], source, halves)):
            was = f"with the weights of {begun['run']}" if begun else "with weights of its own"
            raise ConfigError(f"{folder.folder} was begun {was}, and cannot be resumed with those of {source.folder}")
        if begun:
            load_into(halves, load_tensors(folder.initial_file)[0])
        return
    if source is None:
        return
    weights = source.model(halves).state_dict()
    if folder is not None:
        folder.initial = Initial(weights, str(source.folder), len(source.records()))
    load_into(halves, weights)


def _is_that_of(folder: Run, begun: str, source: Run, halves: Halves) -> bool:
    """Whether a run is the one whose weights `folder` stores: under whatever path, it may have been moved."""
    if source.folder.resolve() == Path(begun).resolve():
        return True
    if not source.exists():
        return False
    stored, weights = load_tensors(folder.initial_file)[0], source.model(halves).state_dict()
    return stored.keys() == weights.keys() and all(torch.equal(weights[name], stored[name]) for name in stored)
