"""From a run's files to the uncut network: which weights there are, and how the halves are put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cutlayer.describe import misfits
from cutlayer.errors import ConfigError
from cutlayer.files import load_tensors, save_sealed
from cutlayer.method import Training
from cutlayer.models.cut import Halves, copied
from cutlayer.records.checkpoint import Checkpoints
from cutlayer.runs.config import RunConfig
from cutlayer.training.halves import model_tensors

ATTEMPTS = 5
"""How often the checkpoint of a run under way is looked for."""
Weights = Mapping[str, Tensor]
WITH_THE_CLIENT = (
    "the server has seen its own half only. Give the client's folder: model(client=FOLDER), or "
    "cutlayer merge RUN --client FOLDER"
)


def network_of(config: Mapping[str, Any], run: Path) -> Halves:
    """The network that a run's config describes, in two. Raises ConfigError for a run that was begun from Python."""
    if "data" not in config:
        raise ConfigError(
            f"{run} was begun from Python: expected its network or its halves, as in "
            f"cutlayer.Run({str(run)!r}).model(network)"
        )
    # What else the config says, such as a device, need not be possible here.
    chosen = RunConfig.from_dict({name: config[name] for name in ("data", "model", "client_half") if name in config})
    model = replace(chosen.model, pretrained=False)  # the run's weights follow
    chosen = replace(
        chosen,
        model=model,
        training=Training(seed=config["training"]["seed"], batch_size=config["training"]["batch_size"]),
    )
    return chosen.halves(chosen.data.outline())


def loaded(network: nn.Module | Halves, weights: Weights, file: Path) -> nn.Module:
    """A copy of the network with these weights of the uncut one, on the CPU and in eval mode."""
    model = network.merged() if isinstance(network, Halves) else copied(network)
    if wrong := misfits(model, weights):
        raise ConfigError(f"{file} is not of a network such as this: {wrong}")
    model.load_state_dict(weights)
    return model.cpu().eval()


def merged(network: nn.Module | Halves, client: Weights, server: Weights, source: Path) -> nn.Module:
    """The uncut network with its halves' weights, on the CPU and in eval mode. What is in neither stays as it is."""
    model = network.merged() if isinstance(network, Halves) else copied(network)
    known = model.state_dict()
    weights = {**client, **server}
    if not weights.keys() <= known.keys() or len(weights) < len(client) + len(server):
        weights = {**_prefixed("client", client), **_prefixed("server", server)}  # halves that never were one network
    if unexpected := [name for name in weights if name not in known]:
        raise ConfigError(f"the halves in {source} hold what this network does not: {', '.join(unexpected)}")
    if wrong := misfits(model, {**known, **weights}):
        raise ConfigError(f"the halves in {source} are not of a network such as this: {wrong}")
    model.load_state_dict(weights, strict=False)
    return model.cpu().eval()


def _prefixed(side: str, weights: Weights) -> dict[str, Tensor]:
    return {f"{side}.{name}": value for name, value in weights.items()}


def load_into(halves: Halves, weights: Weights) -> None:
    """Load the uncut network's weights into its halves."""
    sides = {"client": halves.client, "server": halves.server}
    own = {side: half.state_dict() for side, half in sides.items()}
    apart = all(f"{side}.{name}" in weights for side, names in own.items() for name in names)
    for side, half in sides.items():
        half.load_state_dict({name: weights[f"{side}.{name}" if apart else name] for name in own[side]})


def server_of(checkpoint: Path) -> dict[str, Tensor]:
    """The server half in a checkpoint."""
    return model_tensors(load_tensors(checkpoint / "server.safetensors")[0])


def client_of(checkpoint: Path) -> dict[str, Tensor] | None:
    """The client half in a checkpoint: that which clients share, or the first's. None if it holds none."""
    shared = checkpoint / "shared" / "shared.safetensors"
    if shared.exists() and (tensors := load_tensors(shared)[0]):
        return tensors
    for file in (checkpoint / "clients" / "0.safetensors", checkpoint / "client.safetensors"):
        if file.exists():
            return model_tensors(load_tensors(file)[0])
    return None


def halves_of(
    folder: Path, checkpoints: Checkpoints, epochs: int | None, client: str | Path | None
) -> tuple[Weights, Weights]:
    """Both halves of a checkpoint, the newest or that after so many epochs.

    If the run, which is under way, deletes it meanwhile, those of the next.
    """
    for _ in range(ATTEMPTS):
        before = checkpoints.epochs()
        try:
            return _read_halves(folder, checkpoints, epochs, client)
        except (FileNotFoundError, ConfigError):
            if set(before) <= set(checkpoints.epochs()):
                raise
    raise ConfigError(
        f"{folder}: each checkpoint was deleted while it was read: the run writes them fast. Try again, or have it "
        "store more of them (keep_checkpoints)"
    )


def _read_halves(
    folder: Path, checkpoints: Checkpoints, epochs: int | None, client: str | Path | None
) -> tuple[Weights, Weights]:
    if epochs is not None and epochs not in checkpoints.epochs():
        raise ConfigError(
            f"{folder}: the best epoch's checkpoint, after {epochs} epochs, is not there any more; "
            f"those after {checkpoints.epochs()} are. A run with keep_best keeps it"
        )
    found = checkpoints.read(epochs)
    if found is None:
        raise ConfigError(f"{folder} has no weights yet: expected a checkpoint, after the first epoch")
    place, content = found
    own = client_of(place)
    if own is None and "took_part" in content["state"]:
        own = _of_client(client, content["state"])
    if own is None:
        raise ConfigError(f"{place} has no client half: no client has trained yet")
    return own, server_of(place)


def save_halves(folder: Path, server: nn.Module, shared: Weights, run: str) -> None:
    """Write what the server has at the end of a run: its half, and that which several clients share."""
    save_sealed(server.state_dict(), folder / "server.safetensors", {"run": run})
    if shared:
        save_sealed(shared, folder / "client.safetensors", {"run": run})


def final_halves(folder: Path, client: str | Path | None) -> tuple[Weights, Weights] | None:
    """Both halves of a run that was served, at its end; None if they are not there."""
    server = folder / "server.safetensors"
    own = folder / "client.safetensors"  # what several clients share
    if client is not None and not own.exists():
        own = Path(client) / "client.safetensors"
    if not server.exists() or (client is None and not own.exists()):
        if server.exists():
            raise ConfigError(f"{folder} was served: {WITH_THE_CLIENT}")
        return None
    if not own.exists():
        return None
    (client_half, of), (server_half, expected) = load_tensors(own), load_tensors(server)
    _require_same_run(expected.get("run"), of.get("run"), own)
    return client_half, server_half


def _of_client(folder: str | Path | None, state: dict[str, Any]) -> Weights | None:
    """Of a client's checkpoints the half that belongs to this checkpoint of the server."""
    if folder is None:
        raise ConfigError(f"the run is served: {WITH_THE_CLIENT}")
    (epochs,) = state["took_part"][:1]
    checkpoints = Checkpoints(Path(folder) / "checkpoints")
    found = checkpoints.read(epochs) if epochs in checkpoints.epochs() else None
    if found is None:
        raise ConfigError(f"{folder}: expected a checkpoint after {epochs} epochs, there are {checkpoints.epochs()}")
    _require_same_run(state["run"], found[1]["state"].get("run"), found[0])
    return client_of(found[0])


def _require_same_run(expected: str | None, got: str | None, folder: Path) -> None:
    if expected and got and expected != got:
        raise ConfigError(f"{folder} is of another run: expected {expected}, got {got}")
