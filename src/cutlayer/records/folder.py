"""A run is a folder: config.json, metrics.jsonl (a line per epoch), checkpoints, and the merged model at its end."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cutlayer.describe import differences, misfits
from cutlayer.durable import flush_to_disk, make_folder, replace
from cutlayer.errors import ConfigError, DamagedError
from cutlayer.files import load_tensors, locked, save_sealed, sealed, unsealed
from cutlayer.method import Training
from cutlayer.records.checkpoint import Checkpoints
from cutlayer.records.count_files import Counts, content_of
from cutlayer.records.environment import environment
from cutlayer.records.history import Baseline, EpochRecord, History, crossed
from cutlayer.records.lines import Lines
from cutlayer.records.noted import delivered
from cutlayer.records.resumable import hindrances
from cutlayer.records.state_dicts import Stateful

ENTRIES = ("config", "facts", "baseline", "environment", "init", "changes")  # of config.json
NO_MODEL_YET = "Run(folder).model() gives that of the newest checkpoint, and puts a served run's halves together"

log = logging.getLogger("cutlayer.run")


@dataclass(frozen=True, eq=False)
class Initial:
    """What a run begins with in place of weights from its seed.

    Attributes:
        weights: of the uncut network.
        run: the run that they are from.
        epochs: that run's epochs.
    """

    weights: Mapping[str, Tensor]
    run: str
    epochs: int


class RunFolder:
    """A run's folder.

    Args:
        folder: where it is, or will be.
        config: what to write to config.json, and to compare with when the run is resumed, in place of a description of
            `fit`'s arguments.
    """

    def __init__(self, folder: str | Path, config: dict[str, Any] | None = None) -> None:
        self.folder, self.config = Path(folder), config
        self.checkpoints = Checkpoints(self.folder / "checkpoints")
        self.metrics_file = self.folder / "metrics.jsonl"
        self.config_file = self.folder / "config.json"
        self.model_file = self.folder / "model.safetensors"
        self.merged_file = self.folder / "merged.json"
        self.counts_given_up = Counts(self.folder / "given_up.json")
        self.counts_beforehand = Counts(self.folder / "beforehand.json")
        self.metrics = Lines(self.metrics_file)
        self.initial_file = self.folder / "initial.safetensors"
        self.initial: Initial | None = None

    def __repr__(self) -> str:
        """Short: its path, and how far it is."""
        done = self.metrics_file.read_bytes().count(b"\n") if self.metrics_file.exists() else 0
        return f"{type(self).__name__}({str(self.folder)!r}, {f'{done} epochs' if self.exists() else 'not begun'})"

    def exists(self) -> bool:
        """Whether a run has been begun here."""
        return self.config_file.exists()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock out other processes that would write to the run. Raises ConfigError if one does."""
        with locked(self.folder, "this run"):
            yield

    def open(
        self,
        arguments: dict[str, Any],
        facts: dict[str, Any],
        baseline: Baseline,
        resume: bool,
        parts: Mapping[str, Stateful],
    ) -> tuple[list[EpochRecord], dict[str, Any] | None]:
        """Begin the run, or bring everything to the newest checkpoint of one that is to be resumed.

        Returns the epochs done, and the state in the checkpoint if there is one. Raises ConfigError if there is a
        run and it is not to be resumed, or was begun with other arguments or facts.
        """
        config = self.config if self.config is not None else arguments
        if not (resume and self.exists()):
            self.create(config, baseline, facts)
            return [], None
        self.check(config, facts)
        self._check_length(config)
        found = self.checkpoints.load(parts)
        epochs, state = found if found is not None else (0, None)
        records = self.rewind(epochs)
        self.adopt(config, epochs)
        return records, state

    def check_free(self) -> None:
        """Raise ConfigError if the folder holds a run."""
        if self.exists():
            how = f"(cutlayer train --resume {self.folder}; in Python: resume=True)"
            raise ConfigError(f"{self.folder} holds a run already; resume it, or choose another folder {how}")

    def create(self, config: dict[str, Any], baseline: Baseline, facts: dict[str, Any] | None = None) -> None:
        """Begin the run. Raises ConfigError if there is one already."""
        self.check_free()
        make_folder(self.folder)
        content = {"config": config, "facts": facts or {}, "baseline": vars(baseline), "environment": environment()}
        if self.initial is not None:
            save_sealed(self.initial.weights, self.initial_file)
            content["init"] = {"run": self.initial.run, "epochs": self.initial.epochs}
        self._write_config(content)

    def _write_config(self, content: dict[str, Any]) -> None:
        replace(self.config_file, json.dumps(sealed(content), indent=2) + "\n")

    def check(self, config: dict[str, Any], facts: dict[str, Any] | None = None) -> None:
        """Raise ConfigError that names what differs from what the run was begun with, and may not."""
        if different := hindrances(self.read_config(), config, facts or {}):
            named = "; ".join(f"{path}: {how}" for path, how in different.items())
            raise ConfigError(f"{self.folder} was begun with something else and cannot be resumed with this: {named}")

    def _check_length(self, config: dict[str, Any]) -> None:
        """Raise ConfigError if more epochs are done than there are to be. Nothing is changed before that is known."""
        length = config.get("training", {}).get("epochs")
        if length is None or not differences(self.read_config()["config"], config):
            return
        found = self.checkpoints.read()
        epochs = found[1]["epoch"] if found is not None else 0
        if length < epochs:
            raise ConfigError(f"{self.folder} has {epochs} epochs already, and cannot end after {length}")

    def adopt(self, config: dict[str, Any], epochs: int) -> None:
        """Write down choices that were changed, after so many epochs, when the run was resumed."""
        content = self.read_config()
        changes = differences(content["config"], config)
        if not changes:
            return
        named = [f"after {epochs} epochs: {path} {how}" for path, how in changes.items()]
        self._write_config({**content, "config": config, "changes": [*content.get("changes", []), *named]})
        if lengths := [how for path, how in changes.items() if path.split(".")[-1] == "epochs"]:
            log.warning(
                "%s goes on after %d epochs with another length: it %s. From here on learning rates follow the new "
                "length, so the result is that of an undisturbed run of this length only if they are constant",
                self.folder,
                epochs,
                lengths[0],
            )

    def note(self, changes: Sequence[str], baseline: Baseline) -> None:
        """Have config.json say that clients came or went, and what savings are measured against since."""
        content = self.read_config()
        if new := [change for change in changes if change not in content.get("changes", [])]:
            said = [*content.get("changes", []), *new]
            self._write_config({**content, "changes": said, "baseline": vars(baseline)})

    def forget_models(self, records: Sequence[EpochRecord], training: Training) -> None:
        """Before training goes on after these epochs: delete the models of a shorter run, and who has got them."""
        if not training.ending.reached(records):
            halves = self.folder / "server.safetensors", self.folder / "client.safetensors"
            for file in (self.model_file, *halves, delivered(self.folder).file):
                file.unlink(missing_ok=True)
            flush_to_disk(self.folder)

    def read_config(self) -> dict[str, Any]:
        """The content of config.json: what ENTRIES names, "init" and "changes" if there are any."""
        if not self.exists():
            raise ConfigError(self.nothing_here())
        try:
            content, checked = unsealed(self.config_file.read_bytes())
            if not checked and (strange := [name for name in content if name not in ENTRIES]):
                raise DamagedError(f"it is damaged (unexpected entries {', '.join(strange)})")
            for name in ("config", "baseline"):
                if not isinstance(content.get(name), dict):
                    raise DamagedError(f"it is damaged (expected an object {name!r}, got {content.get(name)!r})")
            Baseline.from_dict(content["baseline"])
        except DamagedError as error:
            raise DamagedError(f"{self.config_file}: {error}; restore it, or begin anew elsewhere") from None
        return content

    def nothing_here(self) -> str:
        """What to say of a folder that holds no run."""
        said = f"{self.folder} holds no run: expected {self.config_file}"
        if not (self.folder / "client.safetensors").exists() and not self.checkpoints.epochs():
            return said
        return (
            f"{said}. It looks like a client's folder (cutlayer join), which has that client's half and no more: "
            "metrics and config are in the server's folder (cutlayer serve --run-dir)"
        )

    def append(self, record: EpochRecord) -> None:
        """Add an epoch to the metrics."""
        self.metrics.append(record.as_dict())

    def records(self, epochs: int | None = None) -> list[EpochRecord]:
        """The epochs so far, or the first so many. A last line that a kill cut short is left out.

        Raises DamagedError that names a line that is not what was written.
        """
        records = []
        for number, values in enumerate(self.metrics.read(epochs)):
            try:
                records.append(EpochRecord.from_dict(values))
            except DamagedError as error:
                raise DamagedError(f"{self.metrics_file}, line {number + 1}: {error}; restore it") from None
            if records[-1].epoch != number:
                found = f"expected epoch {number}, got {records[-1].epoch}"
                raise DamagedError(f"{self.metrics_file}, line {number + 1} is damaged: {found}; restore it")
        return records

    def checkpointed(self) -> list[EpochRecord]:
        """The epochs up to the newest checkpoint, which a resumed run goes on from."""
        epochs = self.checkpoints.epochs()
        return self.records(epochs[-1] if epochs else 0)

    def rewind(self, epochs: int) -> list[EpochRecord]:
        """Drop the epochs after the first `epochs`, which a resumed run trains again; return those that stay."""
        records = self.records(epochs)
        if len(records) < epochs:
            raise DamagedError(
                f"{self.metrics_file}: expected the {epochs} epochs of the checkpoint, found {len(records)}"
            )
        undone: list[EpochRecord] = []
        with suppress(DamagedError):  # a line that is damaged says nothing any more
            undone = self.records()[epochs:]
        self.give_up(crossed(*(record.bytes for record in undone)))
        self.metrics.rewrite(record.as_dict() for record in records)
        return records

    def history(self) -> History:
        """What the run measured so far."""
        records = self.records()
        final = content_of(self.merged_file)
        # A run that was extended is not at its end again yet.
        merged = final.get("scores", {}) if final.get("epochs") == len(records) else {}
        if not isinstance(merged, dict) or not all(isinstance(value, (int, float)) for value in merged.values()):
            raise DamagedError(f"{self.merged_file} is damaged: expected scores that are numbers, got {merged}")
        baseline = Baseline.from_dict(self.read_config()["baseline"])
        return History(records, baseline, self.given_up(), merged, self.beforehand())

    def save_model(self, model: nn.Module) -> None:
        """Write the merged model's weights."""
        save_sealed(model.state_dict(), self.model_file)

    def save_merged(self, scores: Mapping[str, float], epochs: int) -> None:
        """Write what the merged model's evaluation after so many epochs gave."""
        content = sealed({"epochs": epochs, "scores": dict(scores)})
        replace(self.merged_file, json.dumps(content, indent=2) + "\n")

    def give_up(self, size: Mapping[str, int]) -> None:
        """Count bytes, by direction, of epochs that are trained again."""
        if any(size.values()):
            before = self.given_up()
            self.counts_given_up.write({way: before.get(way, 0) + count for way, count in size.items()})

    def given_up(self) -> dict[str, int]:
        """All bytes that `give_up` counted, by direction; empty if there are none."""
        return self.counts_given_up.read()

    def beforehand(self) -> int:
        """The client's FLOPs before the first epoch; 0 if there were none."""
        return self.counts_beforehand.read().get("flops", 0)

    def load_weights(self, model: nn.Module) -> nn.Module:
        """Load the finished run's merged weights into a network of the same structure; return it."""
        if not self.model_file.exists():
            done = len(self.records())
            raise ConfigError(
                f"{self.folder} has no model.safetensors: it is written at the end of a run in one place, {done} "
                f"epochs are done. {NO_MODEL_YET}"
            )
        weights = load_tensors(self.model_file)[0]
        if wrong := misfits(model, weights):
            raise ConfigError(f"{self.model_file} is not of a network such as this: {wrong}")
        model.load_state_dict(weights)
        return model
