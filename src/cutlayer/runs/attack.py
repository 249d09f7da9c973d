"""A run under attack: its halves and its data as a target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from cutlayer.data.images import Images
from cutlayer.errors import ConfigError
from cutlayer.privacy.noise import Noise
from cutlayer.privacy.target import Target
from cutlayer.runs.config import RunConfig
from cutlayer.runs.run import Run
from cutlayer.runs.weights import halves_of, load_into, merged


@dataclass(frozen=True, eq=False)
class Attacked:
    """A run as an attacker finds it.

    Attributes:
        target: the first private and public images, and the halves.
        network: the uncut network with the run's weights.
        epochs: the epochs after which it is attacked.
    """

    target: Target
    network: nn.Module
    epochs: int


def attacked(
    run: Run | str | Path,
    *,
    images: int = 64,
    public: int | None = None,
    epochs: int | None = None,
    client: str | Path | None = None,
    seed: int = 0,
) -> Attacked:
    """A recipe's run as a target.

    Args:
        run: finished or not.
        images: the first so many training images are attacked (of client 0, if there are several).
        public: the attacker has the first so many test images; None for all.
        epochs: attack the halves as they were after so many epochs, if that checkpoint is there; by default the newest.
        client: folder of the client, for a run that was served to one client.
        seed: of the attack's draws.

    Raises:
        ConfigError: the run was begun from Python, or there are no such weights.
    """
    run = run if isinstance(run, Run) else Run(run)
    values = run.read_config()["config"]
    if "data" not in values:
        raise ConfigError(
            f"{run.folder} was begun from Python: expected a recipe's run; attack your own halves with "
            "cutlayer.privacy.assess(name, attack, Target(half, server, ...))"
        )
    config = RunConfig.from_dict(values)
    train, test = config.datasets()
    mine = config.divided(train)[0][0]
    halves = config.halves(train)
    if epochs is None:
        network = run.model(halves, client=client)
        done = len(run.records())
    else:
        network = merged(halves, *halves_of(run.folder, run.checkpoints, epochs, client), run.folder)
        done = epochs
    if config.model.bind != 1:
        raise ConfigError(
            f"bind {config.model.bind}: what crosses are sums of several samples, and attacks here take it for single "
            "ones, which would make the cut look private. Attack the same run without bind"
        )
    load_into(halves, network.state_dict())
    (private, labels), defence = _first(mine, images), config.method.defence
    target = Target(
        halves.client.eval(),
        halves.server.eval(),
        private,
        labels,
        *_first(test, public),
        codec=config.method.activations,
        noise=Noise.of(defence),
        seed=seed,
    )
    return Attacked(target, network, done)


def _first(images: object, count: int | None) -> tuple[Tensor, Tensor]:
    """The first images, float from 0 to 1, and their labels."""
    if not isinstance(images, Images):
        raise ConfigError(f"expected images to attack, got {type(images).__name__}")
    chosen = images.first(min(count, len(images)) if count is not None else None)
    return chosen.inputs.float() / 255, chosen.labels
