"""A study: many configs carried out, with a line for each in a file. What the file has is not run again."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cutlayer.durable import flush_to_disk, make_folder, writing
from cutlayer.errors import ConfigError, CutlayerError, DamagedError
from cutlayer.method import Method, Training
from cutlayer.records.environment import environment
from cutlayer.records.history import EpochRecord
from cutlayer.runs.config import RunConfig
from cutlayer.runs.experiment import run_experiment
from cutlayer.runs.fit import Result
from cutlayer.runs.flat import read_config
from cutlayer.schedule import Always
from cutlayer.studies.jobs import each

Measure = Callable[[RunConfig, Result], Mapping[str, Any]]


@dataclass(frozen=True)
class Outcome:
    """A line of a study's file.

    Attributes:
        config: what was run.
        values: what the line holds: the figures by name, "config" and "environment".
    """

    config: RunConfig
    values: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        """A figure."""
        return self.values[name]


def usual_figures(config: RunConfig, result: Result) -> dict[str, Any]:
    """What a study writes down of a run, if nothing else is said."""
    history = result.history
    metrics = next((record.test for record in reversed(history.epochs) if record.test), {})
    return {
        **{("test_loss" if name == "loss" else name): value for name, value in metrics.items()},
        "exchanges": history.exchanges,
        "bytes_up": history.bytes("up"),
        "bytes_down": history.bytes("down"),
        "traffic_reduction": history.traffic_reduction,
        "client_flops_reduction": history.client_flops_reduction,
        "seconds": round(history.seconds, 1),
    }


class _TimeIsUp(Exception):  # noqa: N818 (no error)
    """A run is to go on another time."""


class Study:
    """Configs, and the file with what came of them: a JSON object a line, of this version or 0.1.

    Args:
        file: the file, which need not be there yet.
        configs: what is to be run, in this order.
        measure: the figures of a run, from its config and result. For several jobs a function of a module, which
            another process can import.
        folder: for a run folder of each run, so that one that was interrupted goes on from its newest checkpoint. Of a
            run that is done config and metrics stay there, its checkpoints go. None: runs begin anew.
        others: files of other studies, whose runs count here if they are the same; they are only read.

    Raises:
        ConfigError: two of the configs are one run.
    """

    def __init__(
        self,
        file: str | Path,
        configs: Iterable[RunConfig],
        measure: Measure = usual_figures,
        folder: str | Path | None = None,
        others: Iterable[Path] = (),
    ) -> None:
        self.file, self.configs, self.measure = Path(file), list(configs), measure
        self.others = [other for other in others if other != self.file]
        self.folder = None if folder is None else Path(folder)
        deciding = [decisive(config) for config in self.configs]
        for number, config in enumerate(deciding):
            if config in deciding[:number]:
                raise ConfigError(f"run {number + 1} of the study is run {deciding.index(config) + 1} again: {config}")

    def outcomes(self, configs: Iterable[RunConfig] | None = None) -> list[Outcome]:
        """What is there: of these configs, or of all that the file has, in its order.

        Raises DamagedError that names a line which cannot be read; a last one that a kill cut short is left out.
        """
        found = [outcome for file in (self.file, *self.others) for outcome in _read(file)]
        if configs is None:
            return found
        wanted = [decisive(config) for config in configs]
        return [outcome for outcome in found if decisive(outcome.config) in wanted]

    def todo(self) -> list[RunConfig]:
        """The configs that are not in the file."""
        done = [decisive(outcome.config) for outcome in self.outcomes()]
        return [config for config in self.configs if decisive(config) not in done]

    def run_folder(self, config: RunConfig) -> Path | None:
        """The folder of a run, named by what decides its result; None without a folder for them."""
        if self.folder is None:
            return None
        what = json.dumps(decisive(config).as_dict(), sort_keys=True)
        return self.folder / hashlib.sha256(what.encode()).hexdigest()[:16]

    def run(
        self, jobs: int = 1, on_done: Callable[[Outcome], None] | None = None, minutes: float | None = None
    ) -> list[Outcome]:
        """Carry out what is not in the file; return the outcomes of all configs that are done.

        Each line is written as a whole as soon as its run is done, so a kill loses of the runs under way the epoch
        under way, or, without a folder for them, all; and no more.

        Args:
            jobs: runs side by side. More than one are processes of one thread each, for configs that do not say how
                many.
            on_done: called with each new outcome, in this process.
            minutes: after which no run begins and those under way end with their epoch, to go on another time.

        Raises:
            ConfigError: another process is at work on the file.
            CutlayerError: some runs failed; the others have been carried out.
        """
        if jobs < 1:
            raise ConfigError(f"jobs must be at least 1, got {jobs}")
        if minutes is not None and self.folder is None:
            raise ConfigError("minutes: expected a folder for the runs, which go on another time")
        until = None if minutes is None else time.time() + 60 * minutes
        failed: list[tuple[RunConfig, Exception]] = []
        with self._locked():
            work = partial(_line, measure=self.measure, until=until)
            todo = [(config, self.run_folder(config)) for config in self.todo()]
            for (config, folder), line in each(work, todo, jobs):
                if isinstance(line, Exception):
                    failed.append((config, line))
                    continue
                if line is None:
                    continue
                self._append(line)
                if folder is not None:
                    for checkpoints in [*folder.rglob("checkpoints")]:
                        shutil.rmtree(checkpoints, ignore_errors=True)
                if on_done is not None:
                    on_done(Outcome(config, line))
        if failed:
            config, error = failed[0]
            raise CutlayerError(f"{len(failed)} runs failed; the first, {config}: {error}") from error
        return self.outcomes(self.configs)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The file for this process alone, without a last line that was cut short."""
        with writing(self.file):
            make_folder(self.file.parent)
            file = self.file.open("ab", buffering=0)
            flush_to_disk(self.file.parent)
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{self.file}: another process is at work on this study") from None
            content = self.file.read_bytes()
            whole = content.rfind(b"\n") + 1
            if content[whole:].endswith(b"}"):  # whole but for its end, as editors leave it
                file.write(b"\n")
            else:
                file.truncate(whole)
            yield

    def _append(self, line: Mapping[str, Any]) -> None:
        with writing(self.file), self.file.open("ab", buffering=0) as file:
            file.write(json.dumps(line).encode() + b"\n")
            os.fsync(file.fileno())


def _read(file: Path) -> Iterator[Outcome]:
    """The lines of a study's file."""
    *lines, last = file.read_bytes().split(b"\n") if file.exists() else [b""]
    lines += [last] if last.endswith(b"}") else []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            config = read_config(_on_this_machine(values["config"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedError(f"{file}, line {number} is damaged: {error}; restore or remove it") from None
        except ConfigError:  # such as a folder that this machine lacks: not of this study
            continue
        yield Outcome(config, values)


def _on_this_machine(config: dict[str, Any]) -> dict[str, Any]:
    """A config's JSON values with a device that is here, so that what came of another one can be read."""
    training = config.get("training", config)
    try:
        Training(device=training.get("device", "cpu"))
    except ConfigError:
        training = {**training, "device": "cpu"}
        return {**config, "training": training} if "training" in config else training
    return config


def _line(item: tuple[RunConfig, Path | None], measure: Measure, until: float | None) -> dict[str, Any] | None:
    """The line of a run; None if its time is up before it is done."""
    config, folder = item

    def check_time(record: EpochRecord | None = None) -> None:
        if until is not None and time.time() >= until:
            raise _TimeIsUp

    try:
        check_time()
        result = run_experiment(config, folder, resume=folder is not None, on_epoch=check_time, progress=False)
    except _TimeIsUp:
        return None
    return {**measure(config, result), "config": config.as_dict(), "environment": environment()}


def decisive(config: RunConfig) -> RunConfig:
    """The config with all that cannot change a result as it is by default: two that are equal then are one run.

    Where a run was, its environment says; on another device it is the same run of a study.
    """
    method, usual = config.method, Method()
    method = replace(method, store=usual.store, fleet=replace(method.fleet, live=usual.fleet.live))
    if isinstance(method.schedule, Always):  # A epochs alone
        method = replace(method, schedule=Always(), norm_in_b=usual.norm_in_b)
    files = {
        name: getattr(Training(), name) for name in ("checkpoint_every", "keep_checkpoints", "keep_best", "device")
    }
    data, training = replace(config.data, folder=None), replace(config.training, **files)
    return replace(config, data=data, method=method, training=training)
