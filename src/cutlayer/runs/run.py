"""A run as its user sees it: its folder, and the network that came of it."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from torch import nn

from cutlayer.errors import ConfigError
from cutlayer.files import load_tensors
from cutlayer.models.cut import Halves
from cutlayer.records.folder import RunFolder
from cutlayer.runs.flat import upgraded
from cutlayer.runs.weights import final_halves, halves_of, loaded, merged, network_of
from cutlayer.stopping import Best


class Run(RunFolder):
    """A run's folder, and the network with the weights that are there."""

    def read_config(self) -> dict[str, Any]:
        """The content of config.json; the config in it as this version writes it, whatever version wrote it."""
        content = super().read_config()
        try:
            return {**content, "config": upgraded(content["config"])}
        except (ConfigError, TypeError, KeyError, AttributeError) as error:  # of an older version, and damaged
            raise ConfigError(f"{self.config_file}: the config cannot be read: {error}") from None

    def to_frame(self) -> Any:
        """As `History.to_frame`, of the epochs so far."""
        return self.history().to_frame()

    def plot(self, metric: str | None = None, axes: Any = None) -> Any:
        """As `History.plot`, of the epochs so far."""
        return self.history().plot(metric, axes)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        shown = self.history()._repr_html_() if self.exists() else ""
        return f"<p>{escape(repr(self))}</p>{shown}"

    def model(
        self,
        network: nn.Module | Halves | None = None,
        *,
        best: bool | Best = False,
        client: str | Path | None = None,
    ) -> nn.Module:
        """The uncut network with the weights of the finished run, or of its newest whole checkpoint; in eval mode.

        It takes what the run trained on: networks of recipes raw images, uint8 [B, C, H, W] with pixels from 0 to 255,
        which their first layer normalizes; your own network whatever your data set gave.

        Args:
            network: for its structure, the uncut network or its halves. A run of a recipe knows it.
            best: the best epoch's in place of the last one's: by what the run's `keep_best` says, or as given, if that
                epoch's checkpoint is still there.
            client: folder of the client (`join`), for a run that was served to one client, whose half the server never
                sees.

        Raises:
            ConfigError: there are no weights yet, or they are not of this network; the message says what to do.
            DamagedError: they are not what was written.
        """
        config = self.read_config()["config"]
        structure = network if network is not None else network_of(config, self.folder)
        if not best and self.model_file.exists():
            return loaded(structure, load_tensors(self.model_file)[0], self.model_file)
        found = final_halves(self.folder, client) if not best else None
        if found is None:
            found = halves_of(self.folder, self.checkpoints, self._best(config, best) if best else None, client)
        return merged(structure, *found, self.folder)

    def _best(self, config: dict[str, Any], best: bool | Best) -> int:
        """After how many epochs the best is."""
        if not isinstance(best, Best):
            chosen = config.get("training", {}).get("keep_best")
            if chosen is None:
                raise ConfigError(
                    f'{self.folder}: which epoch is the best was not asked for; give best=Best("accuracy")'
                )
            best = Best(chosen) if isinstance(chosen, str) else Best(chosen["metric"], chosen["goal"])
        epoch = best.epoch(self.records())
        if epoch is None:
            raise ConfigError(f"{self.folder}: no epoch has a test {best.metric}")
        return epoch + 1
