"""What can be found out about a run from its folder, however broken: for a report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cutlayer.data.partition.value import Partition
from cutlayer.errors import ConfigError, CutlayerError
from cutlayer.files import unsealed
from cutlayer.records.history import Baseline, EpochRecord, History
from cutlayer.records.lines import Lines
from cutlayer.report.view import RunView
from cutlayer.runs.config import RunConfig
from cutlayer.runs.run import Run

MOST_CLASSES, MOST_CLIENTS, MOST_PICTURES, PICTURE_BYTES = 20, 30, 12, 4 << 20


def view_of(folder: str | Path) -> RunView:
    """What there is of a run, and what is missing. Raises ConfigError if there is nothing at all."""
    run, missing = Run(folder), []
    if not run.folder.is_dir() or not (run.exists() or run.metrics_file.exists()):
        raise ConfigError(run.nothing_here())
    content: dict = {}
    try:
        content = run.read_config()
    except ConfigError as error:
        missing.append(f"choices, hardware and what plain split learning would cost: {error}")
    config = content.get("config", {})
    records = _records(run, missing)
    length = config.get("training", {}).get("epochs")
    if length is not None and len(records) < length and not run.model_file.exists():
        missing.append(f"epochs {len(records) + 1} to {length}: the run is not at its end")
    history = _history(run, content, records, missing)
    return RunView(
        name=run.folder.name or str(folder),
        history=history,
        config=config,
        facts=content.get("facts", {}),
        environment=content.get("environment", {}),
        confusion=_confusion(run, config, missing) if config else (),
        clients=_clients(run, missing),
        attacks=_attacks(run, missing),
        pictures=_pictures(run.folder),
        missing=missing,
        changes=[str(change) for change in content.get("changes", [])],
    )


def _records(run: Run, missing: list[str]) -> list[EpochRecord]:
    """The epochs up to the first that cannot be read."""
    try:
        return run.records()
    except CutlayerError as error:
        missing.append(f"epochs from the first that cannot be read: {error}")
    count = run.metrics_file.read_bytes().count(b"\n")
    for first in range(count, 0, -1):
        try:
            return run.records(first)
        except CutlayerError:
            continue
    return []


def _history(run: Run, content: dict, records: list[EpochRecord], missing: list[str]) -> History:
    baseline = Baseline.from_dict(content["baseline"]) if "baseline" in content else Baseline(0, 0)
    try:
        given_up = run.given_up()
    except CutlayerError as error:
        missing.append(f"bytes of epochs that were given up: {error}")
        given_up = {}
    try:
        beforehand = run.beforehand()
    except CutlayerError as error:
        missing.append(f"what the client computed beforehand: {error}")
        beforehand = 0
    final: dict = {}
    if run.merged_file.exists():
        try:
            final = unsealed(run.merged_file.read_bytes())[0]
        except (CutlayerError, json.JSONDecodeError) as error:
            missing.append(f"scores of the merged model: {run.merged_file}: {error}")
    merged = final.get("scores", {}) if final.get("epochs") == len(records) else {}
    return History(records, baseline, given_up, merged, beforehand)


def _confusion(run: Run, config: dict, missing: list[str]) -> Sequence[Sequence[int]]:
    """Counted here: the newest weights there are, on the test data."""
    try:
        if "data" not in config:
            raise ConfigError("the run was begun from Python, so its data are not known here")
        chosen = RunConfig.from_dict(config)
        _, test = chosen.datasets()
        if test.classes > MOST_CLASSES:
            return ()
        return confusion(run.model(), test.inputs, test.labels, test.classes)
    except (CutlayerError, OSError, RuntimeError) as error:
        missing.append(f"confusion matrix: {error}")
        return ()


def confusion(model: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor, classes: int) -> list[list[int]]:
    """Of the samples of each class (rows), how many a network takes for which (columns).

    Args:
        inputs: [N, ...].
        labels: int64 [N].
    """
    with torch.no_grad():
        found = torch.cat([model.eval()(part).argmax(1) for part in inputs.split(256)])
    counts = torch.bincount(labels * classes + found, minlength=classes * classes)
    return counts.reshape(classes, classes).tolist()


def _clients(run: Run, missing: list[str]) -> Sequence[Sequence[int]]:
    file = run.folder / "partition.json"
    if not file.exists():
        return ()
    try:
        counts = Partition.load(file).class_counts
    except (CutlayerError, OSError) as error:
        missing.append(f"who has what: {error}")
        return ()
    if counts is None or counts.shape[1] > MOST_CLASSES:
        return ()
    if len(counts) > MOST_CLIENTS:
        missing.append(f"who has what: of {len(counts)} clients the first {MOST_CLIENTS} are shown")
    return counts[:MOST_CLIENTS].tolist()


def _attacks(run: Run, missing: list[str]) -> Sequence[Mapping[str, Any]]:
    """What attacks got back, that reconstruct images."""
    try:
        return [line for line in Lines(run.folder / "attacks.jsonl").read() if "baseline" in line]
    except CutlayerError as error:
        missing.append(f"what attacks got back: {error}")
        return ()


def _pictures(folder: Path) -> list[tuple[str, bytes]]:
    """Pictures of a privacy gallery, wherever in the run they are."""
    files = [file for file in sorted(folder.rglob("*.png")) if "checkpoints" not in file.parts]
    small = [file for file in files if file.stat().st_size <= PICTURE_BYTES]
    return [(str(file.relative_to(folder)), file.read_bytes()) for file in small[:MOST_PICTURES]]
